"""What the state of a vCPU is made of: one entry per part, with how it is read and written.

In guest mode these ioctls speak of L2, and only the nested state has what L1 goes back to
(KVM_GET_NESTED_STATE, svm_get_nested_state). Every part travels as the bytes of its struct.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, TypeVar

from harness.migrate.errors import Refused
from harness.migrate.notes import Loss, Note
from harness.migrate.offers import Offers
from harness.migrate.parts import Need, Part, Size
from harness.svm.msrs import Msr
from kvm_ioctl.asm_kvm import (
    KVM_STATE_NESTED_SVM_VMCB_SIZE,
    KVM_STATE_NESTED_VMX_VMCS_SIZE,
    NestedStateFlags,
    Sregs2Flags,
    VcpuEventFlags,
    kvm_cpuid_entry2,
    kvm_debugregs,
    kvm_lapic_state,
    kvm_msr_entry,
    kvm_nested_state,
    kvm_regs,
    kvm_sregs,
    kvm_sregs2,
    kvm_vcpu_events,
    kvm_xcrs,
    kvm_xsave,
)
from kvm_ioctl.capabilities import Cap
from kvm_ioctl.cstruct import CStruct, packed_format
from kvm_ioctl.handles import Vcpu
from kvm_ioctl.linux_kvm import kvm_mp_state
from kvm_ioctl.lists import cpuid_from_bytes, read_cpuid_bytes
from kvm_ioctl.request import KvmError

MTRR_MSRS: Final = (
    *range(0x200, 0x210), 0x250, 0x258, 0x259, *range(0x268, 0x270), 0x2FF,
)  # fmt: skip
"""MTRRphysBase/Mask 0 to 7, the fixed ones, MTRRdefType (APM vol. 2, appendix A.7)."""

UNLISTED_MSRS: Final = (Msr.MSR_VM_CR, *MTRR_MSRS)
"""MSRs with state that KVM_GET_MSR_INDEX_LIST of some kernels leaves out."""

_SREGS_COMMON: Final = (
    *("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt", "gdt", "idt"),
    *("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base"),
)
_MSR: Final = packed_format(kvm_msr_entry)
Notes = list[Note]
S = TypeVar("S", bound=CStruct)


@dataclass(frozen=True)
class Source:
    """Where parts are read from."""

    vcpu: Vcpu
    offers: Offers
    irqchip: bool
    notes: Notes


@dataclass(frozen=True)
class Target:
    """Where parts are written to."""

    vcpu: Vcpu
    offers: Offers
    irqchip: bool
    notes: Notes


@dataclass(frozen=True)
class VcpuPart(Part):
    """One part of a vCPU's state: how it is read (None: there is none here) and written."""

    read: Callable[[Source], bytes | None]
    write: Callable[[Target, bytes], None]


# CPUID, TSC frequency


def _read_cpuid(source: Source) -> bytes:
    return read_cpuid_bytes(source.vcpu, source.vcpu.KVM_GET_CPUID2)


def _write_cpuid(target: Target, data: bytes) -> None:
    target.vcpu.call(target.vcpu.KVM_SET_CPUID2, cpuid_from_bytes(data))


def _read_tsc_khz(source: Source) -> bytes | None:
    try:
        return source.vcpu.get_tsc_khz().to_bytes(4, "little")
    except KvmError as e:
        source.notes.append(Note(Loss.NOT_GIVEN, "tsc_khz", str(e)))
        return None


def _write_tsc_khz(target: Target, data: bytes) -> None:
    khz = int.from_bytes(data, "little")
    try:
        if khz != target.vcpu.get_tsc_khz():
            target.vcpu.call(target.vcpu.KVM_SET_TSC_KHZ, khz)
    except KvmError as e:
        target.notes.append(Note(Loss.NOT_TAKEN, "tsc_khz", f"{khz} kHz: {e}"))


# Registers


def _read_sregs(source: Source) -> bytes:
    """Prefer SREGS2: only they carry PDPTRs, which KVM otherwise reads from memory again."""
    vcpu = source.vcpu
    if source.offers.has(Cap.KVM_CAP_SREGS2):
        return vcpu.get_sregs2().as_bytes()
    return vcpu.get_sregs().as_bytes()


def _write_sregs(target: Target, data: bytes) -> None:
    vcpu = target.vcpu
    if len(data) == ctypes.sizeof(kvm_sregs):
        vcpu.set_sregs(kvm_sregs.from_bytes(data))
    elif target.offers.has(Cap.KVM_CAP_SREGS2):
        vcpu.set_sregs2(kvm_sregs2.from_bytes(data))
    else:
        sregs2 = kvm_sregs2.from_bytes(data)
        sregs = kvm_sregs()
        for name in _SREGS_COMMON:
            setattr(sregs, name, getattr(sregs2, name))
        if sregs2.flags & Sregs2Flags.KVM_SREGS2_FLAGS_PDPTRS_VALID:
            target.notes.append(
                Note(Loss.NOT_TAKEN, "sregs.pdptrs", "no KVM_CAP_SREGS2; read from memory again")
            )
        vcpu.set_sregs(sregs)


def _read_xsave(source: Source) -> bytes:
    xsave = source.vcpu.get_xsave()
    return ctypes.string_at(ctypes.addressof(xsave), xsave.allocated_bytes)


def _write_xsave(target: Target, data: bytes) -> None:
    size = max(target.offers.capabilities[Cap.KVM_CAP_XSAVE2], ctypes.sizeof(kvm_xsave))
    if len(data) > size and any(data[size:]):
        raise Refused(f"xsave: {len(data)} bytes of state, this kernel takes {size}")
    target.vcpu.set_xsave(kvm_xsave.from_bytes(data[:size]))


def _read_xcrs(source: Source) -> bytes | None:
    if not source.offers.has(Cap.KVM_CAP_XCRS):
        source.notes.append(Note(Loss.NOT_GIVEN, "xcrs", "no KVM_CAP_XCRS"))
        return None
    return source.vcpu.get_xcrs().as_bytes()


def _write_xcrs(target: Target, data: bytes) -> None:
    xcrs = kvm_xcrs.from_bytes(data)
    if not target.offers.has(Cap.KVM_CAP_XCRS):
        target.notes.append(Note(Loss.NOT_TAKEN, "xcrs", "no KVM_CAP_XCRS"))
        return
    if xcrs.nr_xcrs:
        target.vcpu.set_xcrs(xcrs)


# MSRs


def _read_msrs(source: Source) -> bytes:
    wanted = tuple(dict.fromkeys((*source.offers.msr_indices, *UNLISTED_MSRS)))
    values = source.vcpu.get_msrs(wanted, skip_refused=True)
    for index in source.offers.msr_indices:
        if index not in values:
            why = "in KVM_GET_MSR_INDEX_LIST, but KVM_GET_MSRS refuses it"
            source.notes.append(Note(Loss.NOT_GIVEN, f"msrs.{index:#x}", why))
    return b"".join(_MSR.pack(index, 0, value) for index, value in values.items())


def _write_msrs(target: Target, data: bytes) -> None:
    """Write all; a refused MSR does not keep those after it from being written."""
    values = [(index, value) for index, _, value in _MSR.iter_unpack(data)]
    while values:
        taken = target.vcpu.set_msrs(dict(values))
        if taken < len(values):
            _note_refused_msr(target, *values[taken])
        values = values[taken + 1 :]


AFTER_RESET: Final[Mapping[int, int]] = {Msr.MSR_AMD64_TSC_RATIO: 1 << 32}
"""MSRs that are not 0 after reset, where only some kernels know them: a ratio of 1.0."""


def _note_refused_msr(target: Target, index: int, value: int) -> None:
    now = target.vcpu.get_msrs([index], skip_refused=True).get(index)
    # One that this kernel does not know holds what it has after reset.
    if value == (AFTER_RESET.get(index, 0) if now is None else now):
        return
    why = f"KVM_SET_MSRS refuses {value:#x}, " + (
        "and KVM_GET_MSRS does not know it" if now is None else f"it stays {now:#x}"
    )
    target.notes.append(Note(Loss.NOT_TAKEN, f"msrs.{index:#x}", why))


# Events, interrupts


def _read_events(source: Source) -> bytes:
    for cap in (Cap.KVM_CAP_EXCEPTION_PAYLOAD, Cap.KVM_CAP_X86_TRIPLE_FAULT_EVENT):
        if not source.offers.has(cap):
            source.notes.append(Note(Loss.NOT_GIVEN, "events", f"no {cap.name}"))
    return source.vcpu.get_vcpu_events().as_bytes()


def _write_events(target: Target, data: bytes) -> None:
    events = kvm_vcpu_events.from_bytes(data)
    for flag, cap in (
        (VcpuEventFlags.KVM_VCPUEVENT_VALID_PAYLOAD, Cap.KVM_CAP_EXCEPTION_PAYLOAD),
        (VcpuEventFlags.KVM_VCPUEVENT_VALID_TRIPLE_FAULT, Cap.KVM_CAP_X86_TRIPLE_FAULT_EVENT),
    ):
        if events.flags & flag and not target.offers.has(cap):
            events.flags &= ~flag
            lost = flag != VcpuEventFlags.KVM_VCPUEVENT_VALID_TRIPLE_FAULT or (
                events.triple_fault.pending
            )
            if lost:
                target.notes.append(Note(Loss.NOT_TAKEN, "events", f"no {cap.name}"))
    target.vcpu.set_vcpu_events(events)


def _read_mp_state(source: Source) -> bytes:
    return source.vcpu.get_mp_state().as_bytes()


def _write_mp_state(target: Target, data: bytes) -> None:
    state = kvm_mp_state.from_bytes(data)
    # Without an APIC in the kernel only RUNNABLE is taken, and is what there is.
    if target.irqchip or state.mp_state != target.vcpu.get_mp_state().mp_state:
        target.vcpu.set_mp_state(state)


def _read_lapic(source: Source) -> bytes | None:
    return source.vcpu.get_lapic().as_bytes() if source.irqchip else None


def _write_lapic(target: Target, data: bytes) -> None:
    target.vcpu.set_lapic(kvm_lapic_state.from_bytes(data))


# Nested state


def _read_nested(source: Source) -> bytes | None:
    if not source.offers.has(Cap.KVM_CAP_NESTED_STATE):
        source.notes.append(Note(Loss.NOT_GIVEN, "nested", "no KVM_CAP_NESTED_STATE"))
        return None
    return source.vcpu.get_nested_state().as_bytes()


def _write_nested(target: Target, data: bytes) -> None:
    state = kvm_nested_state.from_bytes(data)
    if not target.offers.has(Cap.KVM_CAP_NESTED_STATE):
        if state.flags & NestedStateFlags.KVM_STATE_NESTED_GUEST_MODE:
            raise Refused("nested: the vCPU runs L2, and this kernel has no KVM_CAP_NESTED_STATE")
        target.notes.append(Note(Loss.NOT_TAKEN, "nested", "no KVM_CAP_NESTED_STATE"))
        return
    target.vcpu.set_nested_state(state)


def _nested_flaw(data: bytes) -> str | None:
    says = kvm_nested_state.from_bytes(data).size
    return None if says == len(data) else f"says that it has {says} bytes, and has {len(data)}"


def _msrs_flaw(data: bytes) -> str | None:
    indices = [index for index, _, _ in _MSR.iter_unpack(data)]
    return None if len(set(indices)) == len(indices) else "one MSR is there twice"


def _struct_part(name: str, kind: type[CStruct], getter: str, setter: str) -> VcpuPart:
    return VcpuPart(
        name,
        kind,
        Size.of(kind),
        lambda source: getattr(source.vcpu, getter)().as_bytes(),
        lambda target, data: getattr(target.vcpu, setter)(kind.from_bytes(data)),
    )


_MOST_CPUID: Final = 256
"""KVM_MAX_CPUID_ENTRIES."""

_MOST_MSRS: Final = 1024
_MOST_XSAVE: Final = 1 << 16

_CPUID_SIZE: Final = Size.array(kvm_cpuid_entry2, _MOST_CPUID)
_SREGS_SIZE: Final = Size.of(kvm_sregs, ctypes.sizeof(kvm_sregs2) - ctypes.sizeof(kvm_sregs))
_XSAVE_SIZE: Final = Size(ctypes.sizeof(kvm_xsave), _MOST_XSAVE, 4)
_MSRS_SIZE: Final = Size.array(kvm_msr_entry, _MOST_MSRS)
_NESTED_SIZE: Final = Size(
    ctypes.sizeof(kvm_nested_state),
    ctypes.sizeof(kvm_nested_state) + 2 * KVM_STATE_NESTED_VMX_VMCS_SIZE,
    KVM_STATE_NESTED_SVM_VMCB_SIZE,
)

VCPU_PARTS: Final = {
    part.name: part
    for part in (
        VcpuPart("cpuid", kvm_cpuid_entry2, _CPUID_SIZE, _read_cpuid, _write_cpuid),
        VcpuPart("tsc_khz", CStruct, Size(4, 4), _read_tsc_khz, _write_tsc_khz, need=Need.IF_GIVEN),
        _struct_part("regs", kvm_regs, "get_regs", "set_regs"),
        VcpuPart("sregs", kvm_sregs2, _SREGS_SIZE, _read_sregs, _write_sregs),
        VcpuPart("xsave", kvm_xsave, _XSAVE_SIZE, _read_xsave, _write_xsave),
        VcpuPart("xcrs", kvm_xcrs, Size.of(kvm_xcrs), _read_xcrs, _write_xcrs, need=Need.IF_GIVEN),
        _struct_part("debugregs", kvm_debugregs, "get_debugregs", "set_debugregs"),
        VcpuPart("msrs", kvm_msr_entry, _MSRS_SIZE, _read_msrs, _write_msrs, flaw=_msrs_flaw),
        VcpuPart(
            "lapic",
            kvm_lapic_state,
            Size.of(kvm_lapic_state),
            _read_lapic,
            _write_lapic,
            need=Need.IRQCHIP,
        ),
        VcpuPart("events", kvm_vcpu_events, Size.of(kvm_vcpu_events), _read_events, _write_events),
        VcpuPart("mp_state", kvm_mp_state, Size.of(kvm_mp_state), _read_mp_state, _write_mp_state),
        VcpuPart(
            "nested",
            kvm_nested_state,
            _NESTED_SIZE,
            _read_nested,
            _write_nested,
            need=Need.IF_GIVEN,
            flaw=_nested_flaw,
        ),
    )
}
"""All parts by name."""


def entries_of(kind: type[S], data: bytes) -> list[S]:
    """Return the structs that lie one after the other in some bytes."""
    size = ctypes.sizeof(kind)
    return [kind.from_bytes(data[at : at + size]) for at in range(0, len(data), size)]
