"""A machine's state as single values with names, to be compared and printed."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from harness.migrate.state import MachineState
from harness.migrate.vcpu_parts import VCPU_PARTS, entries_of
from harness.migrate.vm_parts import VM_PARTS
from harness.svm.vmcb import VMCB_SIZE, vmcb
from kvm_ioctl.asm_kvm import (
    NestedFormat,
    kvm_cpuid_entry2,
    kvm_msr_entry,
    kvm_nested_state,
    kvm_sregs,
)
from kvm_ioctl.cstruct import CStruct
from kvm_ioctl.linux_kvm import kvm_irqchip

Value = int | str
Fields = dict[str, Value]

_CHUNK = 16
"""Bytes of an opaque area that make one value."""

_LONGEST_LIST = 64


def state_fields(state: MachineState) -> Fields:
    """Return every value of a state by its name: `vcpu0.regs.rip`, `vcpu0.msrs.0xc0000080`."""
    fields: Fields = {}
    for name, data in state.vm.items():
        fields |= _prefixed(name, _vm_part(name, data))
    for number, parts in enumerate(state.vcpus):
        for name, data in parts.items():
            fields |= _prefixed(f"vcpu{number}.{name}", part_fields(name, data))
    return fields


def part_fields(name: str, data: bytes) -> Fields:
    """Return the values of one vCPU part."""
    if name in _SPECIAL:
        return _SPECIAL[name](data)
    return struct_fields(VCPU_PARTS[name].kind, data)


def struct_fields(kind: type[CStruct], data: bytes) -> Fields:
    """Return the values of a struct; long byte arrays in pieces of 16."""
    return dict(_flat("", kind.from_bytes(data).fields_dict()))


def _vm_part(name: str, data: bytes) -> Fields:
    kind = VM_PARTS[name].kind
    if kind is not kvm_irqchip:
        return struct_fields(kind, data)
    # A union: chip_id says of what, and the part's name says it too.
    chip = kvm_irqchip.from_bytes(data).chip
    return dict(_flat("", (chip.ioapic if name == "ioapic" else chip.pic).fields_dict()))


def _cpuid(data: bytes) -> Fields:
    fields: Fields = {}
    for entry in entries_of(kvm_cpuid_entry2, data):
        for register in ("eax", "ebx", "ecx", "edx"):
            name = f"{entry.function:08x}.{entry.index:x}.{register}"
            fields[name] = getattr(entry, register)
    return fields


def _msrs(data: bytes) -> Fields:
    return {f"{entry.index:#x}": entry.data for entry in entries_of(kvm_msr_entry, data)}


def _sregs(data: bytes) -> Fields:
    if len(data) == ctypes.sizeof(kvm_sregs):
        return struct_fields(kvm_sregs, data)
    return struct_fields(VCPU_PARTS["sregs"].kind, data)


def _xsave(data: bytes) -> Fields:
    return dict(_bytes("", canonical_xsave(data)))


_XSTATE_BV: Final = 512
_INITIAL: Final = (
    (0, 0, b"\x7f\x03" + bytes(22)),
    (0, 32, bytes(128)),
    (1, 160, bytes(256)),
    (2, 576, bytes(256)),
)
"""Bit of XSTATE_BV, offset, and bytes of x87 (control words, ST), XMM and YMM_Hi when initial."""


def canonical_xsave(data: bytes) -> bytes:
    """Return an XSAVE area without the bits of XSTATE_BV whose components are in initial state.

    Such a bit says that the registers were touched, not what they hold: of one vCPU that did
    nothing in between it reads 0 and 1 (APM vol. 2, 11.5.6 "XSAVE Area", XSTATE_BV).
    """
    used = {bit for bit, at, initial in _INITIAL if data[at : at + len(initial)] != initial}
    unused = sum(1 << bit for bit in {bit for bit, _, _ in _INITIAL} - used)
    held = int.from_bytes(data[_XSTATE_BV : _XSTATE_BV + 8], "little") & ~unused
    return data[:_XSTATE_BV] + held.to_bytes(8, "little") + data[_XSTATE_BV + 8 :]


def _lapic(data: bytes) -> Fields:
    """The registers lie every 16 bytes (APM vol. 2, 16.3.2 APIC Registers)."""
    words = struct.unpack(f"<{len(data) // 4}I", data)
    return {f"{4 * number:#05x}": word for number, word in enumerate(words) if number % 4 == 0}


def _nested(data: bytes) -> Fields:
    state = kvm_nested_state.from_bytes(data)
    fields: Fields = {
        "flags": state.flags,
        "format": state.format,
        "vmcb_pa": state.hdr.svm.vmcb_pa,
        "gpat": state.hdr.svm.gpat,
    }
    if state.format != NestedFormat.KVM_STATE_NESTED_FORMAT_SVM:
        fields |= dict(_bytes("data", bytes(state.data)))
    elif len(state.data) >= VMCB_SIZE:
        block = vmcb.from_bytes(bytes(state.data[:VMCB_SIZE]))
        fields |= _prefixed("vmcb12", struct_fields(vmcb, block.as_bytes()))
    return fields


_SPECIAL: Final[Mapping[str, Callable[[bytes], Fields]]] = {
    "cpuid": _cpuid,
    "msrs": _msrs,
    "sregs": _sregs,
    "xsave": _xsave,
    "lapic": _lapic,
    "nested": _nested,
    "tsc_khz": lambda data: {"": int.from_bytes(data, "little")},
}


def _prefixed(prefix: str, fields: Mapping[str, Value]) -> Fields:
    return {f"{prefix}.{name}" if name else prefix: value for name, value in fields.items()}


def _flat(path: str, value: Any) -> Iterator[tuple[str, Value]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _flat(f"{path}.{name}" if path else name, inner)
    elif isinstance(value, list) and len(value) <= _LONGEST_LIST:
        for number, inner in enumerate(value):
            yield from _flat(f"{path}[{number}]", inner)
    elif isinstance(value, bytes):
        yield from _bytes(path, value)
    elif isinstance(value, list):
        yield from _bytes(path, struct.pack(f"<{len(value)}Q", *value))
    else:
        yield path, value


def _bytes(path: str, data: bytes) -> Iterator[tuple[str, Value]]:
    if len(data) <= _CHUNK:
        yield path, data.hex()
        return
    for at in range(0, len(data), _CHUNK):
        yield f"{path}[{at:#x}]", data[at : at + _CHUNK].hex()
