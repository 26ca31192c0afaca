"""What KVM_RUN came back for, as typed values: ``decode(run)`` turns the shared page into one.

Each class names its KVM_EXIT_* as ``reason``. Fields carry the kernel's names where they are the
kernel's fields. A reason that has no class here decodes to ``UnknownExit``, never to an error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from enum import Enum
from typing import ClassVar

from kvm_ioctl.exit_codes import (
    EmulationFailureFlags,
    ExitReason,
    HypercallFlags,
    InternalError,
    IoDirection,
    MemoryFaultFlags,
    MsrExitReason,
    NotifyFlags,
    SystemEvent,
)
from kvm_ioctl.kvm_run import kvm_hyperv_exit, kvm_run, kvm_xen_exit
from kvm_ioctl.records import record

__all__ = ["ExitReason", "IoDirection", "MsrExitReason", "decode"]


# Looked up once: this is the path of every port access.
_DIRECTIONS = {int(direction): direction for direction in IoDirection}
_OUT = IoDirection.KVM_EXIT_IO_OUT
_IO = int(ExitReason.KVM_EXIT_IO)


@record
class Exit:
    """Why KVM_RUN returned."""

    reason: ClassVar[ExitReason]

    def __repr__(self) -> str:
        shown = (f"{f.name}={_shown(getattr(self, f.name))}" for f in fields(self))
        return f"{type(self).__name__}({', '.join(shown)})"


def _shown(value: object) -> str:
    if isinstance(value, Enum):
        return value.name or hex(value.value)
    return hex(value) if type(value) is int else str(value)


@record
class UnknownExit(Exit):
    """KVM_EXIT_UNKNOWN, or a reason that this library has no class for."""

    reason = ExitReason.KVM_EXIT_UNKNOWN
    exit_reason: int
    hardware_exit_reason: int


@record
class ExceptionExit(Exit):
    """KVM_EXIT_EXCEPTION."""

    reason = ExitReason.KVM_EXIT_EXCEPTION
    exception: int
    error_code: int


@record
class IoExit(Exit):
    """KVM_EXIT_IO: ``count`` accesses of ``size`` bytes; ``data`` is what an OUT wrote."""

    reason = ExitReason.KVM_EXIT_IO
    direction: IoDirection
    size: int
    port: int
    count: int
    data: bytes

    @property
    def is_out(self) -> bool:
        """Whether the guest wrote."""
        return self.direction is _OUT

    @property
    def value(self) -> int:
        """The written bytes as one little-endian number."""
        return int.from_bytes(self.data, "little")


@record
class HypercallExit(Exit):
    """KVM_EXIT_HYPERCALL; the answer goes to ``run.hypercall.ret``."""

    reason = ExitReason.KVM_EXIT_HYPERCALL
    nr: int
    args: tuple[int, ...]
    flags: HypercallFlags


@record
class DebugExit(Exit):
    """KVM_EXIT_DEBUG."""

    reason = ExitReason.KVM_EXIT_DEBUG
    exception: int
    pc: int
    dr6: int
    dr7: int


@record
class HltExit(Exit):
    """KVM_EXIT_HLT: HLT in a VM without in-kernel irqchip."""

    reason = ExitReason.KVM_EXIT_HLT


@record
class MmioExit(Exit):
    """KVM_EXIT_MMIO: an access of ``len`` bytes; ``data`` is what a write wrote."""

    reason = ExitReason.KVM_EXIT_MMIO
    phys_addr: int
    data: bytes
    len: int
    is_write: bool

    @property
    def value(self) -> int:
        """The written bytes as one little-endian number."""
        return int.from_bytes(self.data, "little")


@record
class IrqWindowOpenExit(Exit):
    """KVM_EXIT_IRQ_WINDOW_OPEN, as asked for by ``run.request_interrupt_window``."""

    reason = ExitReason.KVM_EXIT_IRQ_WINDOW_OPEN


@record
class ShutdownExit(Exit):
    """KVM_EXIT_SHUTDOWN: triple fault."""

    reason = ExitReason.KVM_EXIT_SHUTDOWN


@record
class FailEntryExit(Exit):
    """KVM_EXIT_FAIL_ENTRY: the CPU refused the guest state."""

    reason = ExitReason.KVM_EXIT_FAIL_ENTRY
    hardware_entry_failure_reason: int
    cpu: int


@record
class Interrupted(Exit):
    """KVM_RUN ended with EINTR (a signal, or ``run.immediate_exit``), or with KVM_EXIT_INTR."""

    reason = ExitReason.KVM_EXIT_INTR


@record
class SetTprExit(Exit):
    """KVM_EXIT_SET_TPR: the guest lowered CR8, which is in ``run.cr8``."""

    reason = ExitReason.KVM_EXIT_SET_TPR


@record
class TprAccessExit(Exit):
    """KVM_EXIT_TPR_ACCESS, as asked for by KVM_TPR_ACCESS_REPORTING."""

    reason = ExitReason.KVM_EXIT_TPR_ACCESS
    rip: int
    is_write: bool


@record
class NmiExit(Exit):
    """KVM_EXIT_NMI."""

    reason = ExitReason.KVM_EXIT_NMI


@record
class InternalErrorExit(Exit):
    """KVM_EXIT_INTERNAL_ERROR; ``insn_bytes`` if KVM says what it could not emulate."""

    reason = ExitReason.KVM_EXIT_INTERNAL_ERROR
    suberror: InternalError | int
    data: tuple[int, ...]
    insn_bytes: bytes


@record
class WatchdogExit(Exit):
    """KVM_EXIT_WATCHDOG."""

    reason = ExitReason.KVM_EXIT_WATCHDOG


@record
class SystemEventExit(Exit):
    """KVM_EXIT_SYSTEM_EVENT."""

    reason = ExitReason.KVM_EXIT_SYSTEM_EVENT
    type: SystemEvent | int
    data: tuple[int, ...]


@record
class IoapicEoiExit(Exit):
    """KVM_EXIT_IOAPIC_EOI, with a split irqchip."""

    reason = ExitReason.KVM_EXIT_IOAPIC_EOI
    vector: int


@record
class HypervExit(Exit):
    """KVM_EXIT_HYPERV."""

    reason = ExitReason.KVM_EXIT_HYPERV
    hyperv: kvm_hyperv_exit


@record
class MsrExit(Exit):
    """An MSR access left to userspace by KVM_CAP_X86_USER_SPACE_MSR, and ``why`` it was."""

    index: int
    data: int
    why: MsrExitReason


@record
class RdmsrExit(MsrExit):
    """KVM_EXIT_X86_RDMSR; the answer goes to ``run.msr.data`` or ``run.msr.error``."""

    reason = ExitReason.KVM_EXIT_X86_RDMSR


@record
class WrmsrExit(MsrExit):
    """KVM_EXIT_X86_WRMSR; a nonzero ``run.msr.error`` makes it #GP."""

    reason = ExitReason.KVM_EXIT_X86_WRMSR


@record
class DirtyRingFullExit(Exit):
    """KVM_EXIT_DIRTY_RING_FULL: harvest and reset before going on."""

    reason = ExitReason.KVM_EXIT_DIRTY_RING_FULL


@record
class ApResetHoldExit(Exit):
    """KVM_EXIT_AP_RESET_HOLD."""

    reason = ExitReason.KVM_EXIT_AP_RESET_HOLD


@record
class BusLockExit(Exit):
    """KVM_EXIT_X86_BUS_LOCK."""

    reason = ExitReason.KVM_EXIT_X86_BUS_LOCK


@record
class XenExit(Exit):
    """KVM_EXIT_XEN."""

    reason = ExitReason.KVM_EXIT_XEN
    xen: kvm_xen_exit


@record
class NotifyExit(Exit):
    """KVM_EXIT_NOTIFY: the guest blocked events for longer than the notify window."""

    reason = ExitReason.KVM_EXIT_NOTIFY
    flags: NotifyFlags


@record
class MemoryFaultExit(Exit):
    """KVM_EXIT_MEMORY_FAULT; ``error`` is the errno that KVM_RUN returned with it."""

    reason = ExitReason.KVM_EXIT_MEMORY_FAULT
    flags: MemoryFaultFlags
    gpa: int
    size: int
    error: int


@record
class TdxExit(Exit):
    """KVM_EXIT_TDX; the call's own data is in ``run.tdx``."""

    reason = ExitReason.KVM_EXIT_TDX
    flags: int
    nr: int


@record
class SnpReqCertsExit(Exit):
    """KVM_EXIT_SNP_REQ_CERTS; the answer goes to ``run.snp_req_certs.ret``."""

    reason = ExitReason.KVM_EXIT_SNP_REQ_CERTS
    gpa: int
    npages: int


def _mmio(run: kvm_run) -> Exit:
    mmio = run.mmio
    length, is_write = mmio.len, bool(mmio.is_write)
    return MmioExit(
        mmio.phys_addr, bytes(mmio.data)[:length] if is_write else b"", length, is_write
    )


def _hypercall(run: kvm_run) -> Exit:
    call = run.hypercall
    return HypercallExit(call.nr, tuple(call.args), HypercallFlags(call.flags))


def _debug(run: kvm_run) -> Exit:
    arch = run.debug.arch
    return DebugExit(arch.exception, arch.pc, arch.dr6, arch.dr7)


def _internal_error(run: kvm_run) -> Exit:
    internal, failure = run.internal, run.emulation_failure
    data = tuple(internal.data)[: internal.ndata]
    emulation = internal.suberror == InternalError.KVM_INTERNAL_ERROR_EMULATION
    # ndata == 0: a kernel that gives no data at all, so that what looks like flags is left over.
    flags = EmulationFailureFlags(failure.flags if emulation and data else 0)
    insn_bytes = b""
    if EmulationFailureFlags.KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES in flags:
        insn_bytes = bytes(failure.insn_bytes)[: failure.insn_size]
    return InternalErrorExit(_internal_code(internal.suberror), data, insn_bytes)


def _internal_code(suberror: int) -> InternalError | int:
    try:
        return InternalError(suberror)
    except ValueError:
        return suberror


def _system_event(run: kvm_run) -> Exit:
    event = run.system_event
    kind: SystemEvent | int = event.type
    if event.type in SystemEvent._value2member_map_:
        kind = SystemEvent(event.type)
    return SystemEventExit(kind, tuple(event.data)[: event.ndata])


def _memory_fault(run: kvm_run, error: int = 0) -> Exit:
    fault = run.memory_fault
    return MemoryFaultExit(MemoryFaultFlags(fault.flags), fault.gpa, fault.size, error)


def _unknown(run: kvm_run) -> Exit:
    return UnknownExit(run.exit_reason, run.hw.hardware_exit_reason)


_DECODERS: dict[int, Callable[[kvm_run], Exit]] = {
    ExitReason.KVM_EXIT_UNKNOWN: _unknown,
    ExitReason.KVM_EXIT_EXCEPTION: lambda run: ExceptionExit(run.ex.exception, run.ex.error_code),
    ExitReason.KVM_EXIT_HYPERCALL: _hypercall,
    ExitReason.KVM_EXIT_DEBUG: _debug,
    ExitReason.KVM_EXIT_HLT: lambda run: HltExit(),
    ExitReason.KVM_EXIT_MMIO: _mmio,
    ExitReason.KVM_EXIT_IRQ_WINDOW_OPEN: lambda run: IrqWindowOpenExit(),
    ExitReason.KVM_EXIT_SHUTDOWN: lambda run: ShutdownExit(),
    ExitReason.KVM_EXIT_FAIL_ENTRY: lambda run: FailEntryExit(
        run.fail_entry.hardware_entry_failure_reason, run.fail_entry.cpu
    ),
    ExitReason.KVM_EXIT_INTR: lambda run: Interrupted(),
    ExitReason.KVM_EXIT_SET_TPR: lambda run: SetTprExit(),
    ExitReason.KVM_EXIT_TPR_ACCESS: lambda run: TprAccessExit(
        run.tpr_access.rip, bool(run.tpr_access.is_write)
    ),
    ExitReason.KVM_EXIT_NMI: lambda run: NmiExit(),
    ExitReason.KVM_EXIT_INTERNAL_ERROR: _internal_error,
    ExitReason.KVM_EXIT_WATCHDOG: lambda run: WatchdogExit(),
    ExitReason.KVM_EXIT_SYSTEM_EVENT: _system_event,
    ExitReason.KVM_EXIT_IOAPIC_EOI: lambda run: IoapicEoiExit(run.eoi.vector),
    ExitReason.KVM_EXIT_HYPERV: lambda run: HypervExit(run.hyperv.copy()),
    ExitReason.KVM_EXIT_X86_RDMSR: lambda run: RdmsrExit(
        run.msr.index, run.msr.data, MsrExitReason(run.msr.reason)
    ),
    ExitReason.KVM_EXIT_X86_WRMSR: lambda run: WrmsrExit(
        run.msr.index, run.msr.data, MsrExitReason(run.msr.reason)
    ),
    ExitReason.KVM_EXIT_DIRTY_RING_FULL: lambda run: DirtyRingFullExit(),
    ExitReason.KVM_EXIT_AP_RESET_HOLD: lambda run: ApResetHoldExit(),
    ExitReason.KVM_EXIT_X86_BUS_LOCK: lambda run: BusLockExit(),
    ExitReason.KVM_EXIT_XEN: lambda run: XenExit(run.xen.copy()),
    ExitReason.KVM_EXIT_NOTIFY: lambda run: NotifyExit(NotifyFlags(run.notify.flags)),
    ExitReason.KVM_EXIT_MEMORY_FAULT: _memory_fault,
    ExitReason.KVM_EXIT_TDX: lambda run: TdxExit(run.tdx.flags, run.tdx.nr),
    ExitReason.KVM_EXIT_SNP_REQ_CERTS: lambda run: SnpReqCertsExit(
        run.snp_req_certs.gpa, run.snp_req_certs.npages
    ),
}


def decode(run: kvm_run) -> Exit:
    """Turn what KVM left in ``kvm_run`` into a value that outlives the next KVM_RUN."""
    reason, number, size, port, count, data_offset = run.reason_and_io()
    if reason != _IO:
        return _DECODERS.get(reason, _unknown)(run)
    # Nearly every exit is this one, so it has the shortest way.
    direction = _DIRECTIONS[number]
    data = run.shared_bytes(data_offset, size * count) if direction is _OUT else b""
    return IoExit(direction, size, port, count, data)


def decode_memory_fault(run: kvm_run, error: int) -> Exit:
    """Decode a KVM_EXIT_MEMORY_FAULT, which comes with an errno (EFAULT or EHWPOISON)."""
    return _memory_fault(run, error)
