from __future__ import annotations

import dataclasses

import pytest

from kvm_ioctl import exits
from kvm_ioctl.exit_codes import ExitReason, InternalError, IoDirection, MsrExitReason, SystemEvent
from kvm_ioctl.exits import Exit, decode, decode_memory_fault
from kvm_ioctl.kvm_run import kvm_run

OUT, IN = IoDirection.KVM_EXIT_IO_OUT, IoDirection.KVM_EXIT_IO_IN


def run_of(reason: int, size_bytes: int = 8192) -> kvm_run:
    """A forged page as KVM leaves it, with the port data page behind."""
    run: kvm_run = kvm_run.over(bytearray(size_bytes))
    run.exit_reason = reason
    return run


def forged_io(direction: int) -> kvm_run:
    buffer = bytearray(8192)
    buffer[4096:4100] = b"\x01\x02\x03\x04"
    run: kvm_run = kvm_run.over(buffer)
    run.exit_reason = ExitReason.KVM_EXIT_IO
    run.io.direction, run.io.size, run.io.port, run.io.count = direction, 2, 0x3F8, 2
    run.io.data_offset = 4096
    return run


def test_out_brings_its_data() -> None:
    exit_ = decode(forged_io(OUT))
    assert exit_ == exits.IoExit(OUT, 2, 0x3F8, 2, b"\x01\x02\x03\x04")
    assert isinstance(exit_, exits.IoExit)
    assert exit_.is_out
    assert exit_.value == 0x04030201


def test_in_has_no_data_yet() -> None:
    exit_ = decode(forged_io(IN))
    assert exit_ == exits.IoExit(IN, 2, 0x3F8, 2, b"")
    assert not exit_.is_out  # type: ignore[attr-defined]


def test_exit_outlives_the_page() -> None:
    run = forged_io(OUT)
    exit_ = decode(run)
    run.clear()
    assert exit_.data == b"\x01\x02\x03\x04"  # type: ignore[attr-defined]


@pytest.mark.parametrize(("is_write", "data"), [(1, b"\xaa\xbb"), (0, b"")])
def test_mmio(is_write: int, data: bytes) -> None:
    run = run_of(ExitReason.KVM_EXIT_MMIO)
    run.mmio.phys_addr, run.mmio.len, run.mmio.is_write = 0xFEE00000, 2, is_write
    run.mmio.data[:3] = b"\xaa\xbb\xcc"
    assert decode(run) == exits.MmioExit(0xFEE00000, data, 2, bool(is_write))


def test_fail_entry() -> None:
    run = run_of(ExitReason.KVM_EXIT_FAIL_ENTRY)
    run.fail_entry.hardware_entry_failure_reason, run.fail_entry.cpu = 0xFFFFFFFF, 3
    assert decode(run) == exits.FailEntryExit(0xFFFFFFFF, 3)


def test_internal_error_with_instruction_bytes() -> None:
    run = run_of(ExitReason.KVM_EXIT_INTERNAL_ERROR)
    run.emulation_failure.suberror, run.emulation_failure.ndata = 1, 4
    run.emulation_failure.flags, run.emulation_failure.insn_size = 1, 3
    run.emulation_failure.insn_bytes[:4] = b"\x0f\x01\xd8\xff"
    exit_ = decode(run)
    assert isinstance(exit_, exits.InternalErrorExit)
    assert exit_.suberror is InternalError.KVM_INTERNAL_ERROR_EMULATION
    assert exit_.insn_bytes == b"\x0f\x01\xd8"
    assert len(exit_.data) == 4


def test_internal_error_of_another_kind_has_no_instruction() -> None:
    run = run_of(ExitReason.KVM_EXIT_INTERNAL_ERROR)
    run.internal.suberror, run.internal.ndata = 3, 2
    run.internal.data[:3] = [1, 2, 3]
    expected = exits.InternalErrorExit(InternalError.KVM_INTERNAL_ERROR_DELIVERY_EV, (1, 2), b"")
    assert decode(run) == expected


def test_internal_error_with_an_unknown_suberror() -> None:
    run = run_of(ExitReason.KVM_EXIT_INTERNAL_ERROR)
    run.internal.suberror = 99
    assert decode(run) == exits.InternalErrorExit(99, (), b"")


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        (ExitReason.KVM_EXIT_X86_RDMSR, exits.RdmsrExit),
        (ExitReason.KVM_EXIT_X86_WRMSR, exits.WrmsrExit),
    ],
)
def test_msr(reason: ExitReason, kind: type[exits.MsrExit]) -> None:
    run = run_of(reason)
    run.msr.index, run.msr.data, run.msr.reason = 0xC0000080, 0x1000, 1
    assert decode(run) == kind(0xC0000080, 0x1000, MsrExitReason.KVM_MSR_EXIT_REASON_INVAL)


def test_debug() -> None:
    run = run_of(ExitReason.KVM_EXIT_DEBUG)
    arch = run.debug.arch
    arch.exception, arch.pc, arch.dr6, arch.dr7 = 1, 0x1234, 0x4000, 0x400
    assert decode(run) == exits.DebugExit(1, 0x1234, 0x4000, 0x400)


@pytest.mark.parametrize(("number", "kind"), [(1, SystemEvent.KVM_SYSTEM_EVENT_SHUTDOWN), (77, 77)])
def test_system_event(number: int, kind: int) -> None:
    run = run_of(ExitReason.KVM_EXIT_SYSTEM_EVENT)
    run.system_event.type, run.system_event.ndata = number, 1
    run.system_event.data[0] = 5
    assert decode(run) == exits.SystemEventExit(kind, (5,))


def test_hypercall() -> None:
    run = run_of(ExitReason.KVM_EXIT_HYPERCALL)
    run.hypercall.nr, run.hypercall.flags = 12, 1
    run.hypercall.args[:] = [1, 2, 3, 4, 5, 6]
    exit_ = decode(run)
    assert isinstance(exit_, exits.HypercallExit)
    assert (exit_.nr, exit_.args, exit_.flags) == (12, (1, 2, 3, 4, 5, 6), 1)


def test_memory_fault_carries_the_errno() -> None:
    run = run_of(ExitReason.KVM_EXIT_MEMORY_FAULT)
    run.memory_fault.flags, run.memory_fault.gpa, run.memory_fault.size = 8, 0x5000, 0x1000
    exit_ = decode_memory_fault(run, 14)
    assert isinstance(exit_, exits.MemoryFaultExit)
    assert (exit_.flags, exit_.gpa, exit_.size, exit_.error) == (8, 0x5000, 0x1000, 14)


def classes() -> list[type[Exit]]:
    return [
        kind
        for kind in vars(exits).values()
        if isinstance(kind, type) and issubclass(kind, Exit) and "reason" in vars(kind)
    ]


@pytest.mark.parametrize("kind", classes(), ids=lambda kind: kind.__name__)
def test_every_class_is_what_its_reason_decodes_to(kind: type[Exit]) -> None:
    exit_ = decode(run_of(kind.reason))
    assert type(exit_) is kind
    assert dataclasses.is_dataclass(exit_)
    assert repr(exit_).startswith(f"{kind.__name__}(")


FOREIGN = {
    reason
    for reason in ExitReason
    if any(arch in reason.name for arch in ("S390", "ARM", "RISCV", "LOONGARCH", "PAPR"))
} | {ExitReason.KVM_EXIT_DCR, ExitReason.KVM_EXIT_OSI, ExitReason.KVM_EXIT_EPR}  # powerpc


def test_every_reason_of_x86_has_its_class() -> None:
    assert set(ExitReason) - FOREIGN == {kind.reason for kind in classes()}


def test_unknown_reason_decodes_to_its_number() -> None:
    run = run_of(4242)
    run.hw.hardware_exit_reason = 7
    assert decode(run) == exits.UnknownExit(4242, 7)


def test_repr_speaks_hex_and_names() -> None:
    shown = "IoExit(direction=KVM_EXIT_IO_IN, size=0x2, port=0x3f8, count=0x2, data=b'')"
    assert repr(decode(forged_io(IN))) == shown
