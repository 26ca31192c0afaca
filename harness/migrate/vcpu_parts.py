"""What the state of a vCPU is made of: one entry per part, with how it is read and written.

In guest mode these ioctls speak of L2, and only the nested state has what L1 goes back to
(KVM_GET_NESTED_STATE, svm_get_nested_state). Every part travels as the bytes of its struct.
"""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final, TypeVar

from harness.migrate.bound import Reading, Source, Target, Writing, buffered, getting, setting
from harness.migrate.errors import Refused
from harness.migrate.msrs_part import MOST_MSRS, msrs_flaw, msrs_reading, msrs_writing
from harness.migrate.notes import Loss, Note
from harness.migrate.parts import Data, Need, Part, Size
from kvm_ioctl.asm_kvm import (
    KVM_STATE_NESTED_SVM_VMCB_SIZE,
    KVM_STATE_NESTED_VMX_VMCS_SIZE,
    NestedStateFlags,
    Sregs2Flags,
    VcpuEventFlags,
    kvm_cpuid_entry2,
    kvm_lapic_state,
    kvm_msr_entry,
    kvm_nested_state,
    kvm_sregs,
    kvm_sregs2,
    kvm_vcpu_events,
    kvm_xcrs,
    kvm_xsave,
)
from kvm_ioctl.batch import Call
from kvm_ioctl.capabilities import Cap
from kvm_ioctl.cstruct import CStruct
from kvm_ioctl.handles import Vcpu
from kvm_ioctl.linux_kvm import kvm_mp_state
from kvm_ioctl.lists import CpuidBuffer, cpuid_from_bytes, read_cpuid_bytes
from kvm_ioctl.request import Ioctl, KvmError, VcpuFd

_SREGS_COMMON: Final = (
    *("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt", "gdt", "idt"),
    *("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base"),
)
S = TypeVar("S", bound=CStruct)


@dataclass(frozen=True)
class VcpuPart(Part):
    """One part of a vCPU's state."""

    reading: Callable[[Source], Reading]
    """Returns how it is read there; the vCPU is not running."""
    writing: Callable[[Target], Writing]
    """Returns how it is written there."""


_NOTHING: Final = Reading()
"""Of a part that this kernel does not give."""


# CPUID, TSC frequency


def _cpuid_reading(source: Source) -> Reading:
    vcpu, buffer = source.vcpu, CpuidBuffer()

    def data(results: list[int]) -> bytes:
        # More leaves than usual: E2BIG, and they are read in a buffer of their own.
        return read_cpuid_bytes(vcpu, vcpu.KVM_GET_CPUID2) if results[0] else buffer.leaves()

    call = Call(vcpu, vcpu.KVM_GET_CPUID2, buffer.payload, least=-errno.E2BIG)
    return Reading((call,), data=data, before=buffer.clear)


def _cpuid_writing(target: Target) -> Writing:
    def write(data: Data) -> None:
        target.vcpu.call(target.vcpu.KVM_SET_CPUID2, cpuid_from_bytes(bytes(data)))

    return Writing(write)


def _tsc_khz_reading(source: Source) -> Reading:
    call = Call(source.vcpu, source.vcpu.KVM_GET_TSC_KHZ, None, least=None)

    def data(results: list[int]) -> bytes | None:
        if results[0] >= 0:
            return results[0].to_bytes(4, "little")
        error = KvmError(-results[0], call.request.name, call.fd.kind)
        source.notes.append(Note(Loss.NOT_GIVEN, "tsc_khz", str(error)))
        return None

    return Reading((call,), data=data)


def _tsc_khz_writing(target: Target) -> Writing:
    def write(data: Data) -> None:
        khz = int.from_bytes(data, "little")
        try:
            if khz != target.vcpu.get_tsc_khz():
                target.vcpu.call(target.vcpu.KVM_SET_TSC_KHZ, khz)
        except KvmError as e:
            target.notes.append(Note(Loss.NOT_TAKEN, "tsc_khz", f"{khz} kHz: {e}"))

    return Writing(write)


# Registers


def _sregs_reading(source: Source) -> Reading:
    """Prefer SREGS2: only they carry PDPTRs, which KVM otherwise reads from memory again."""
    vcpu = source.vcpu
    if source.offers.has(Cap.KVM_CAP_SREGS2):
        return getting(vcpu, vcpu.KVM_GET_SREGS2)
    return getting(vcpu, vcpu.KVM_GET_SREGS)


def _sregs_writing(target: Target) -> Writing:
    vcpu = target.vcpu
    sregs = setting(vcpu, vcpu.KVM_SET_SREGS)
    has_sregs2 = target.offers.has(Cap.KVM_CAP_SREGS2)
    best = setting(vcpu, vcpu.KVM_SET_SREGS2) if has_sregs2 else sregs

    def write(data: Data) -> None:
        if len(data) == ctypes.sizeof(kvm_sregs):
            sregs.write(data)
        elif has_sregs2:
            best.write(data)
        else:
            sregs.write(_without_pdptrs(target, data))

    return replace(best, write=write)


def _without_pdptrs(target: Target, data: Data) -> bytes:
    """Return SREGS of SREGS2, for a kernel that has no others."""
    sregs2 = kvm_sregs2.from_bytes(data)
    sregs = kvm_sregs()
    for name in _SREGS_COMMON:
        setattr(sregs, name, getattr(sregs2, name))
    if sregs2.flags & Sregs2Flags.KVM_SREGS2_FLAGS_PDPTRS_VALID:
        target.notes.append(
            Note(Loss.NOT_TAKEN, "sregs.pdptrs", "no KVM_CAP_SREGS2; read from memory again")
        )
    return sregs.as_bytes()


def _xsave_reading(source: Source) -> Reading:
    vcpu = source.vcpu
    xsave, view = buffered(kvm_xsave, vcpu.xsave_buffer_bytes)
    request = vcpu.KVM_GET_XSAVE2 if source.offers.has(Cap.KVM_CAP_XSAVE2) else vcpu.KVM_GET_XSAVE
    return Reading((Call(vcpu, request, xsave),), view)


def _xsave_writing(target: Target) -> Writing:
    vcpu = target.vcpu
    xsave, view = buffered(kvm_xsave, vcpu.xsave_buffer_bytes)
    issue = vcpu.bind(vcpu.KVM_SET_XSAVE, xsave)
    size = max(target.offers.capabilities[Cap.KVM_CAP_XSAVE2], ctypes.sizeof(kvm_xsave))

    def load(data: Data) -> bool:
        if len(data) != len(view):
            return False
        view[:] = data
        return True

    def write(data: Data) -> None:
        if len(data) > size and any(data[size:]):
            raise Refused(f"xsave: {len(data)} bytes of state, this kernel takes {size}")
        load(bytes(data[: len(view)]).ljust(len(view), b"\0"))
        issue()

    return Writing(write, Call(vcpu, vcpu.KVM_SET_XSAVE, xsave), load)


def _xcrs_reading(source: Source) -> Reading:
    if not source.offers.has(Cap.KVM_CAP_XCRS):
        source.notes.append(Note(Loss.NOT_GIVEN, "xcrs", "no KVM_CAP_XCRS"))
        return _NOTHING
    return getting(source.vcpu, source.vcpu.KVM_GET_XCRS)


def _xcrs_writing(target: Target) -> Writing:
    has_xcrs = target.offers.has(Cap.KVM_CAP_XCRS)

    def are_some(data: Data) -> bool:
        return has_xcrs and kvm_xcrs.from_buffer_copy(data).nr_xcrs > 0

    put = setting(target.vcpu, target.vcpu.KVM_SET_XCRS, alone=are_some)

    def write(data: Data) -> None:
        if not has_xcrs:
            target.notes.append(Note(Loss.NOT_TAKEN, "xcrs", "no KVM_CAP_XCRS"))
        elif are_some(data):
            put.write(data)

    return replace(put, write=write, call=put.call if has_xcrs else None)


# Events, interrupts


def _events_reading(source: Source) -> Reading:
    for cap in (Cap.KVM_CAP_EXCEPTION_PAYLOAD, Cap.KVM_CAP_X86_TRIPLE_FAULT_EVENT):
        if not source.offers.has(cap):
            source.notes.append(Note(Loss.NOT_GIVEN, "events", f"no {cap.name}"))
    return getting(source.vcpu, source.vcpu.KVM_GET_VCPU_EVENTS)


def _events_writing(target: Target) -> Writing:
    flags = {
        VcpuEventFlags.KVM_VCPUEVENT_VALID_PAYLOAD: Cap.KVM_CAP_EXCEPTION_PAYLOAD,
        VcpuEventFlags.KVM_VCPUEVENT_VALID_TRIPLE_FAULT: Cap.KVM_CAP_X86_TRIPLE_FAULT_EVENT,
    }
    unknown = {flag: cap for flag, cap in flags.items() if not target.offers.has(cap)}
    put = setting(target.vcpu, target.vcpu.KVM_SET_VCPU_EVENTS, alone=lambda data: not unknown)

    def write(data: Data) -> None:
        put.write(_without_flags(target, data, unknown) if unknown else data)

    return replace(put, write=write)


def _without_flags(target: Target, data: Data, unknown: Mapping[VcpuEventFlags, Cap]) -> bytes:
    """Return events without what this kernel refuses to hear of."""
    events = kvm_vcpu_events.from_bytes(data)
    for flag, cap in unknown.items():
        if events.flags & flag:
            events.flags &= ~flag
            lost = flag != VcpuEventFlags.KVM_VCPUEVENT_VALID_TRIPLE_FAULT or (
                events.triple_fault.pending
            )
            if lost:
                target.notes.append(Note(Loss.NOT_TAKEN, "events", f"no {cap.name}"))
    return events.as_bytes()


def _mp_state_writing(target: Target) -> Writing:
    put = setting(target.vcpu, target.vcpu.KVM_SET_MP_STATE, alone=lambda data: target.irqchip)

    def write(data: Data) -> None:
        # Without an APIC in the kernel only RUNNABLE is taken, and is what there is.
        if target.irqchip or data != target.vcpu.get_mp_state().as_bytes():
            put.write(data)

    return replace(put, write=write)


def _lapic_reading(source: Source) -> Reading:
    return getting(source.vcpu, source.vcpu.KVM_GET_LAPIC) if source.irqchip else _NOTHING


# Nested state


def _nested_reading(source: Source) -> Reading:
    if not source.offers.has(Cap.KVM_CAP_NESTED_STATE):
        source.notes.append(Note(Loss.NOT_GIVEN, "nested", "no KVM_CAP_NESTED_STATE"))
        return _NOTHING
    vcpu = source.vcpu
    state, view = buffered(kvm_nested_state, vcpu.nested_state_bytes)

    def before() -> None:
        state.size = len(view)

    def data(results: list[int]) -> Data:
        return view[: state.size]

    call = Call(vcpu, vcpu.KVM_GET_NESTED_STATE, state)
    return Reading((call,), data=data, before=before)


def _nested_writing(target: Target) -> Writing:
    vcpu, offered = target.vcpu, target.offers.has(Cap.KVM_CAP_NESTED_STATE)
    state, view = buffered(kvm_nested_state, _NESTED_SIZE.most)
    issue = vcpu.bind(vcpu.KVM_SET_NESTED_STATE, state)
    head_bytes = ctypes.sizeof(kvm_nested_state)

    def load(data: Data) -> bool:
        if not offered or not head_bytes <= len(data) <= len(view):
            return False
        view[: len(data)] = data
        return True

    def write(data: Data) -> None:
        if load(data):
            issue()
            return
        flags = kvm_nested_state.from_bytes(data).flags
        if offered:
            raise ValueError(f"kvm_nested_state has {_NESTED_SIZE} bytes, got {len(data)}")
        if flags & NestedStateFlags.KVM_STATE_NESTED_GUEST_MODE:
            raise Refused("nested: the vCPU runs L2, and this kernel has no KVM_CAP_NESTED_STATE")
        target.notes.append(Note(Loss.NOT_TAKEN, "nested", "no KVM_CAP_NESTED_STATE"))

    call = Call(vcpu, vcpu.KVM_SET_NESTED_STATE, state)
    return Writing(write, call if offered else None, load)


def _nested_flaw(data: Data) -> str | None:
    says = kvm_nested_state.from_buffer_copy(data).size
    return None if says == len(data) else f"says that it has {says} bytes, and has {len(data)}"


def _struct_part(name: str, get: Ioctl[VcpuFd, S], put: Ioctl[VcpuFd, S]) -> VcpuPart:
    return VcpuPart(
        name,
        get.payload,
        Size.of(get.payload),
        lambda source: getting(source.vcpu, get),
        lambda target: setting(target.vcpu, put),
    )


_MOST_CPUID: Final = 256
"""KVM_MAX_CPUID_ENTRIES."""

_MOST_XSAVE: Final = 1 << 16

_CPUID_SIZE: Final = Size.array(kvm_cpuid_entry2, _MOST_CPUID)
_SREGS_SIZE: Final = Size.of(kvm_sregs, ctypes.sizeof(kvm_sregs2) - ctypes.sizeof(kvm_sregs))
_XSAVE_SIZE: Final = Size(ctypes.sizeof(kvm_xsave), _MOST_XSAVE, 4)
_MSRS_SIZE: Final = Size.array(kvm_msr_entry, MOST_MSRS)
_NESTED_SIZE: Final = Size(
    ctypes.sizeof(kvm_nested_state),
    ctypes.sizeof(kvm_nested_state) + 2 * KVM_STATE_NESTED_VMX_VMCS_SIZE,
    KVM_STATE_NESTED_SVM_VMCB_SIZE,
)

VCPU_PARTS: Final = {
    part.name: part
    for part in (
        VcpuPart("cpuid", kvm_cpuid_entry2, _CPUID_SIZE, _cpuid_reading, _cpuid_writing),
        VcpuPart(
            "tsc_khz", CStruct, Size(4, 4), _tsc_khz_reading, _tsc_khz_writing, need=Need.IF_GIVEN
        ),
        _struct_part("regs", Vcpu.KVM_GET_REGS, Vcpu.KVM_SET_REGS),
        VcpuPart("sregs", kvm_sregs2, _SREGS_SIZE, _sregs_reading, _sregs_writing),
        VcpuPart("xsave", kvm_xsave, _XSAVE_SIZE, _xsave_reading, _xsave_writing),
        VcpuPart(
            "xcrs", kvm_xcrs, Size.of(kvm_xcrs), _xcrs_reading, _xcrs_writing, need=Need.IF_GIVEN
        ),
        _struct_part("debugregs", Vcpu.KVM_GET_DEBUGREGS, Vcpu.KVM_SET_DEBUGREGS),
        VcpuPart("msrs", kvm_msr_entry, _MSRS_SIZE, msrs_reading, msrs_writing, flaw=msrs_flaw),
        VcpuPart(
            "lapic",
            kvm_lapic_state,
            Size.of(kvm_lapic_state),
            _lapic_reading,
            lambda target: setting(target.vcpu, target.vcpu.KVM_SET_LAPIC),
            need=Need.IRQCHIP,
        ),
        VcpuPart(
            "events", kvm_vcpu_events, Size.of(kvm_vcpu_events), _events_reading, _events_writing
        ),
        VcpuPart(
            "mp_state",
            kvm_mp_state,
            Size.of(kvm_mp_state),
            lambda source: getting(source.vcpu, source.vcpu.KVM_GET_MP_STATE),
            _mp_state_writing,
        ),
        VcpuPart(
            "nested",
            kvm_nested_state,
            _NESTED_SIZE,
            _nested_reading,
            _nested_writing,
            need=Need.IF_GIVEN,
            flaw=_nested_flaw,
        ),
    )
}
"""All parts by name; CPUID first, which decides what MSRs there are."""


def entries_of(kind: type[S], data: bytes) -> list[S]:
    """Return the structs that lie one after the other in some bytes."""
    size = ctypes.sizeof(kind)
    return [kind.from_bytes(data[at : at + size]) for at in range(0, len(data), size)]
