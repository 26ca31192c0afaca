"""What the state of a vCPU is made of: one entry per part, with how it is read and written.

In guest mode these ioctls speak of L2, and only the nested state has what L1 goes back to
(KVM_GET_NESTED_STATE, svm_get_nested_state). Every part travels as the bytes of its struct.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

from harness.migrate.errors import Refused
from harness.migrate.notes import Loss, Note
from harness.svm.msrs import Msr
from kvm_ioctl.asm_kvm import (
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
from kvm_ioctl.cstruct import CStruct
from kvm_ioctl.handles import Vcpu
from kvm_ioctl.linux_kvm import kvm_mp_state
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
Notes = list[Note]
S = TypeVar("S", bound=CStruct)


@dataclass(frozen=True)
class Source:
    """Where parts are read from."""

    vcpu: Vcpu
    msr_indices: tuple[int, ...]
    irqchip: bool
    notes: Notes


@dataclass(frozen=True)
class Target:
    """Where parts are written to."""

    vcpu: Vcpu
    irqchip: bool
    notes: Notes


@dataclass(frozen=True)
class VcpuPart:
    """One part: how it is read (None: there is none here) and written."""

    name: str
    kind: type[CStruct]
    """What it is made of; `cpuid` and `msrs` have any number of these."""
    read: Callable[[Source], bytes | None]
    write: Callable[[Target, bytes], None]


# CPUID, TSC frequency


def _read_cpuid(source: Source) -> bytes:
    return b"".join(map(bytes, source.vcpu.get_cpuid2()))


def _write_cpuid(target: Target, data: bytes) -> None:
    target.vcpu.set_cpuid2(entries_of(kvm_cpuid_entry2, data))


def _read_tsc_khz(source: Source) -> bytes | None:
    try:
        return source.vcpu.get_tsc_khz().to_bytes(4, "little")
    except KvmError as e:
        source.notes.append(Note(Loss.NOT_GIVEN, "tsc_khz", str(e)))
        return None


def _write_tsc_khz(target: Target, data: bytes) -> None:
    khz = int.from_bytes(data, "little")
    if khz == target.vcpu.get_tsc_khz():
        return
    try:
        target.vcpu.call(target.vcpu.KVM_SET_TSC_KHZ, khz)
    except KvmError as e:
        target.notes.append(Note(Loss.NOT_TAKEN, "tsc_khz", f"{khz} kHz: {e}"))


# Registers


def _read_sregs(source: Source) -> bytes:
    """Prefer SREGS2: only they carry PDPTRs, which KVM otherwise reads from memory again."""
    vcpu = source.vcpu
    if vcpu.vm.check_extension(Cap.KVM_CAP_SREGS2):
        return vcpu.get_sregs2().as_bytes()
    return vcpu.get_sregs().as_bytes()


def _write_sregs(target: Target, data: bytes) -> None:
    vcpu = target.vcpu
    if len(data) == ctypes.sizeof(kvm_sregs):
        vcpu.set_sregs(kvm_sregs.from_bytes(data))
    elif vcpu.vm.check_extension(Cap.KVM_CAP_SREGS2):
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
    size = max(target.vcpu.vm.check_extension(Cap.KVM_CAP_XSAVE2), ctypes.sizeof(kvm_xsave))
    if len(data) > size and any(data[size:]):
        raise Refused(f"xsave: {len(data)} bytes of state, this kernel takes {size}")
    target.vcpu.set_xsave(kvm_xsave.from_bytes(data[:size]))


def _read_xcrs(source: Source) -> bytes | None:
    if not source.vcpu.vm.check_extension(Cap.KVM_CAP_XCRS):
        source.notes.append(Note(Loss.NOT_GIVEN, "xcrs", "no KVM_CAP_XCRS"))
        return None
    return source.vcpu.get_xcrs().as_bytes()


def _write_xcrs(target: Target, data: bytes) -> None:
    xcrs = kvm_xcrs.from_bytes(data)
    if not target.vcpu.vm.check_extension(Cap.KVM_CAP_XCRS):
        target.notes.append(Note(Loss.NOT_TAKEN, "xcrs", "no KVM_CAP_XCRS"))
        return
    if xcrs.nr_xcrs:
        target.vcpu.set_xcrs(xcrs)


# MSRs


def _read_msrs(source: Source) -> bytes:
    wanted = tuple(dict.fromkeys((*source.msr_indices, *UNLISTED_MSRS)))
    values = source.vcpu.get_msrs(wanted, skip_refused=True)
    for index in source.msr_indices:
        if index not in values:
            why = "in KVM_GET_MSR_INDEX_LIST, but KVM_GET_MSRS refuses it"
            source.notes.append(Note(Loss.NOT_GIVEN, f"msrs.{index:#x}", why))
    return b"".join(bytes(kvm_msr_entry(index=i, data=d)) for i, d in values.items())


def _write_msrs(target: Target, data: bytes) -> None:
    """Write all; a refused MSR does not keep those after it from being written."""
    values = [(entry.index, entry.data) for entry in entries_of(kvm_msr_entry, data)]
    while values:
        taken = target.vcpu.set_msrs(dict(values))
        if taken < len(values):
            _note_refused_msr(target, *values[taken])
        values = values[taken + 1 :]


def _note_refused_msr(target: Target, index: int, value: int) -> None:
    now = target.vcpu.get_msrs([index], skip_refused=True).get(index)
    if now == value:
        return
    why = f"KVM_SET_MSRS refuses {value:#x}, " + (
        "and KVM_GET_MSRS does not know it" if now is None else f"it stays {now:#x}"
    )
    target.notes.append(Note(Loss.NOT_TAKEN, f"msrs.{index:#x}", why))


# Events, interrupts


def _read_events(source: Source) -> bytes:
    vm = source.vcpu.vm
    for cap in (Cap.KVM_CAP_EXCEPTION_PAYLOAD, Cap.KVM_CAP_X86_TRIPLE_FAULT_EVENT):
        if not vm.check_extension(cap):
            source.notes.append(Note(Loss.NOT_GIVEN, "events", f"no {cap.name}"))
    return source.vcpu.get_vcpu_events().as_bytes()


def _write_events(target: Target, data: bytes) -> None:
    events = kvm_vcpu_events.from_bytes(data)
    for flag, cap in (
        (VcpuEventFlags.KVM_VCPUEVENT_VALID_PAYLOAD, Cap.KVM_CAP_EXCEPTION_PAYLOAD),
        (VcpuEventFlags.KVM_VCPUEVENT_VALID_TRIPLE_FAULT, Cap.KVM_CAP_X86_TRIPLE_FAULT_EVENT),
    ):
        if events.flags & flag and not target.vcpu.vm.check_extension(cap):
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
    if not source.vcpu.vm.check_extension(Cap.KVM_CAP_NESTED_STATE):
        source.notes.append(Note(Loss.NOT_GIVEN, "nested", "no KVM_CAP_NESTED_STATE"))
        return None
    return source.vcpu.get_nested_state().as_bytes()


def _write_nested(target: Target, data: bytes) -> None:
    state = kvm_nested_state.from_bytes(data)
    if not target.vcpu.vm.check_extension(Cap.KVM_CAP_NESTED_STATE):
        if state.flags & NestedStateFlags.KVM_STATE_NESTED_GUEST_MODE:
            raise Refused("nested: the vCPU runs L2, and this kernel has no KVM_CAP_NESTED_STATE")
        target.notes.append(Note(Loss.NOT_TAKEN, "nested", "no KVM_CAP_NESTED_STATE"))
        return
    target.vcpu.set_nested_state(state)


def _struct_part(name: str, kind: type[CStruct], getter: str, setter: str) -> VcpuPart:
    return VcpuPart(
        name,
        kind,
        lambda source: getattr(source.vcpu, getter)().as_bytes(),
        lambda target, data: getattr(target.vcpu, setter)(kind.from_bytes(data)),
    )


VCPU_PARTS: Final = {
    part.name: part
    for part in (
        VcpuPart("cpuid", kvm_cpuid_entry2, _read_cpuid, _write_cpuid),
        VcpuPart("tsc_khz", CStruct, _read_tsc_khz, _write_tsc_khz),
        _struct_part("regs", kvm_regs, "get_regs", "set_regs"),
        VcpuPart("sregs", kvm_sregs2, _read_sregs, _write_sregs),
        VcpuPart("xsave", kvm_xsave, _read_xsave, _write_xsave),
        VcpuPart("xcrs", kvm_xcrs, _read_xcrs, _write_xcrs),
        _struct_part("debugregs", kvm_debugregs, "get_debugregs", "set_debugregs"),
        VcpuPart("msrs", kvm_msr_entry, _read_msrs, _write_msrs),
        VcpuPart("lapic", kvm_lapic_state, _read_lapic, _write_lapic),
        VcpuPart("events", kvm_vcpu_events, _read_events, _write_events),
        VcpuPart("mp_state", kvm_mp_state, _read_mp_state, _write_mp_state),
        VcpuPart("nested", kvm_nested_state, _read_nested, _write_nested),
    )
}
"""All parts by name."""


def entries_of(kind: type[S], data: bytes) -> list[S]:
    """Return the structs that lie one after the other in some bytes; a rest is left out."""
    size = ctypes.sizeof(kind)
    return [kind.from_bytes(data[at : at + size]) for at in range(0, len(data) - size + 1, size)]
