"""A machine's state in words: registers by name, their bits, events, nested state."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import IntFlag
from typing import Any, Final

from harness.migrate.difference import is_l1_state
from harness.migrate.fields import part_fields
from harness.migrate.state import Parts
from harness.migrate.vcpu_parts import entries_of
from harness.svm.cpuid import ExtendedFeaturesEcx, Leaf
from harness.svm.msrs import Msr
from harness.svm.vmcb import VMCB_SIZE, SegAttrib, vmcb
from harness.svm.vmcb_text import Row, field_row, segment_row, vmcb_rows
from kvm_ioctl.asm_kvm import (
    NestedFormat,
    NestedStateFlags,
    VcpuEventFlags,
    kvm_cpuid_entry2,
    kvm_msr_entry,
    kvm_nested_state,
    kvm_regs,
    kvm_segment,
    kvm_sregs,
    kvm_sregs2,
    kvm_vcpu_events,
)
from kvm_ioctl.linux_kvm import MpState, kvm_mp_state


@dataclass(frozen=True)
class Block:
    """Values that belong together."""

    title: str
    rows: tuple[Row, ...]


def vcpu_blocks(number: int, parts: Parts) -> list[Block]:
    """Return all that a vCPU's state says; parts that are missing have no block.

    Args:
        number: the vCPU.
        parts: of the right sizes, as a stream that was accepted has them.

    """
    # In guest mode KVM's register ioctls speak of L2.
    level = " in L2" if runs_l2(parts) else ""
    blocks = []
    for name, (title, rows) in _BLOCKS.items():
        if name in parts:
            blocks.append(Block(f"vCPU {number}{level}: {title}", tuple(rows(parts[name]))))
    if (state := nested_state(parts)) is not None:
        blocks += _nested_blocks(f"vCPU {number}: ", state)
    return blocks


def nested_state(parts: Parts) -> kvm_nested_state | None:
    """Return the nested state of a vCPU, if its kernel gave one."""
    return kvm_nested_state.from_bytes(parts["nested"]) if "nested" in parts else None


def runs_l2(parts: Parts) -> bool:
    """Tell whether the vCPU is in guest mode, so that its registers are L2's."""
    state = nested_state(parts)
    return state is not None and bool(state.flags & NestedStateFlags.KVM_STATE_NESTED_GUEST_MODE)


def flag_names(kind: type[IntFlag], value: int, prefix: str) -> str:
    """Return the flags that are set, without what all their names begin with."""
    names = [flag.name.removeprefix(prefix) for flag in kind if flag & value and flag.name]
    rest = value & ~sum(kind)
    return " ".join([*names, *([f"rest={rest:#x}"] if rest else [])])


def _regs(data: bytes) -> Iterator[Row]:
    regs = kvm_regs.from_bytes(data)
    return (field_row(name, value) for name, value in regs.fields_dict().items())


def _sregs(data: bytes) -> Iterator[Row]:
    kind = kvm_sregs if len(data) == ctypes.sizeof(kvm_sregs) else kvm_sregs2
    sregs = kind.from_bytes(data)
    for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt"):
        yield _segment(name, getattr(sregs, name))
    for name in ("gdt", "idt"):
        table = getattr(sregs, name)
        text = f"base={table.base:#x} limit={table.limit:#x}"
        yield Row(name, text, not (table.base or table.limit))
    for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base"):
        yield field_row(name, getattr(sregs, name))
    if isinstance(sregs, kvm_sregs2):
        for number, value in enumerate(sregs.pdptrs):
            yield field_row(f"pdptrs[{number}]", value)


def _segment(name: str, found: kvm_segment) -> Row:
    # SegAttrib's fields hold one or four bits; KVM has a byte for each.
    fields = {"TYPE": found.type, "S": found.s, "DPL": found.dpl, "P": found.present}
    fields |= {"AVL": found.avl, "L": found.l, "DB": found.db, "G": found.g}
    limits = SegAttrib.fields()
    attrib = SegAttrib.of(**{bit: value & limits[bit].limit for bit, value in fields.items()})
    row = segment_row(name, found.selector, found.base, found.limit, attrib)
    return row._replace(text=f"{row.text} unusable") if found.unusable else row


def _events(data: bytes) -> Iterator[Row]:
    events = kvm_vcpu_events.from_bytes(data)
    yield Row("in SMM", "yes" if events.smi.smm else "no", False)
    payload = f" payload={events.exception_payload:#x}" if events.exception_has_payload else ""
    yield _event("exception", events.exception, payload)
    for name in ("interrupt", "nmi", "smi", "triple_fault"):
        yield _event(name, getattr(events, name))
    yield field_row("sipi_vector", events.sipi_vector)
    valid = flag_names(VcpuEventFlags, events.flags, "KVM_VCPUEVENT_")
    yield Row("flags", f"{events.flags:#x}  {valid}".rstrip(), not events.flags)


def _event(name: str, fields: Any, more: str = "") -> Row:
    values = fields.fields_dict()
    shown = [f"{field}={value:#x}" for field, value in values.items() if value]
    return Row(name, " ".join(shown) + more if shown else "none", not shown)


def _mp_state(data: bytes) -> Iterator[Row]:
    value = kvm_mp_state.from_bytes(data).mp_state
    known = value in MpState._value2member_map_
    yield Row("mp_state", MpState(value).name if known else f"{value:#x}", False)


def _msrs(data: bytes) -> Iterator[Row]:
    names = {int(msr): msr.name for msr in Msr}
    for entry in entries_of(kvm_msr_entry, data):
        name = names.get(entry.index, "")
        decoded = field_row("efer" if entry.index == Msr.MSR_EFER else name, entry.data)
        yield Row(f"{entry.index:#x} {name}".rstrip(), decoded.text, decoded.zero)


def _cpuid(data: bytes) -> Iterator[Row]:
    entries = entries_of(kvm_cpuid_entry2, data)
    yield Row("entries", str(len(entries)), False)
    ecx = next((e.ecx for e in entries if e.function == Leaf.EXTENDED_FEATURES), 0)
    yield Row("SVM", "yes" if ExtendedFeaturesEcx(ecx).SVM else "no", False)


def _tsc_khz(data: bytes) -> Iterator[Row]:
    yield Row("tsc_khz", f"{int.from_bytes(data, 'little')}", False)


def _flat(name: str) -> Callable[[bytes], Iterator[Row]]:
    """Return what shows a part as its fields are, in hex."""

    def rows(data: bytes) -> Iterator[Row]:
        for field, value in part_fields(name, data).items():
            text = f"{value:#x}" if isinstance(value, int) else value
            yield Row(field, text, not value if isinstance(value, int) else not value.strip("0"))

    return rows


_BLOCKS: Final[Mapping[str, tuple[str, Callable[[bytes], Iterable[Row]]]]] = {
    "regs": ("registers", _regs),
    "sregs": ("system registers", _sregs),
    "events": ("events", _events),
    "mp_state": ("MP state", _mp_state),
    "debugregs": ("debug registers", _flat("debugregs")),
    "xcrs": ("XCRs", _flat("xcrs")),
    "msrs": ("MSRs", _msrs),
    "lapic": ("local APIC, by offset", _flat("lapic")),
    "tsc_khz": ("TSC", _tsc_khz),
    "cpuid": ("CPUID", _cpuid),
}
"""The parts in the order in which they explain most. XSAVE has no words."""


def _nested_blocks(prefix: str, state: kvm_nested_state) -> Iterator[Block]:
    yield Block(f"{prefix}nested state", tuple(_nested_rows(state)))
    if state.format == NestedFormat.KVM_STATE_NESTED_FORMAT_SVM and len(state.data) >= VMCB_SIZE:
        areas = vmcb_rows(vmcb.from_bytes(bytes(state.data[:VMCB_SIZE])))
        yield Block(f"{prefix}control area of vmcb12, as cached", tuple(areas["control"]))
        # The rest is whatever was there; see difference.NO_STATE.
        l1 = (row._replace(zero=row.zero or not is_l1_state(row.name)) for row in areas["save"])
        yield Block(f"{prefix}L1's state, that #VMEXIT goes back to", tuple(l1))


def _nested_rows(state: kvm_nested_state) -> Iterator[Row]:
    flags = state.flags
    known = state.format in NestedFormat._value2member_map_
    yield Row("format", NestedFormat(state.format).name if known else f"{state.format}", False)
    names = flag_names(NestedStateFlags, flags, "KVM_STATE_NESTED_")
    yield Row("flags", f"{flags:#x}  {names}".rstrip(), False)
    guest_mode = flags & NestedStateFlags.KVM_STATE_NESTED_GUEST_MODE
    yield Row("guest mode", "yes: L2 runs" if guest_mode else "no: L1 runs", False)
    pending = flags & NestedStateFlags.KVM_STATE_NESTED_RUN_PENDING
    yield Row("run pending", "yes" if pending else "no", False)
    gif = flags & NestedStateFlags.KVM_STATE_NESTED_GIF_SET
    yield Row("GIF", "1" if gif else "0", False)
    if state.format == NestedFormat.KVM_STATE_NESTED_FORMAT_SVM:
        yield Row("vmcb12 at l1_gpa", f"{state.hdr.svm.vmcb_pa:#x}", not guest_mode)
        yield field_row("gpat", state.hdr.svm.gpat)
