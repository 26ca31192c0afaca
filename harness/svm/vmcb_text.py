"""A VMCB in words: every field by name, its bits and intercepts by theirs."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

from harness.svm.bits import Bits
from harness.svm.exit_codes import describe
from harness.svm.intercepts import Intercept
from harness.svm.msrs import Cr0, Cr4, Efer
from harness.svm.vmcb import (
    Clean,
    EventInj,
    IntCtl,
    IntState,
    NestedCtl,
    SegAttrib,
    VirtExt,
    vmcb,
    vmcb_seg,
)

FIELD_BITS: Final[Mapping[str, type[Bits]]] = {
    "int_ctl": IntCtl,
    "int_state": IntState,
    "nested_ctl": NestedCtl,
    "virt_ext": VirtExt,
    "event_inj": EventInj,
    "exit_int_info": EventInj,
    "clean": Clean,
    "efer": Efer,
    "cr0": Cr0,
    "cr4": Cr4,
    "attrib": SegAttrib,
}
"""Fields whose bits have names, `int_ctl.V_IRQ`, `save.efer.SVME`, `cs.attrib.DPL`."""

EXCEPTIONS: Final = 32
"""Vectors that can be intercepted."""


class Row(NamedTuple):
    """One field as text."""

    name: str
    text: str
    zero: bool
    """There is nothing in it, not worth a line mostly."""


def bits_text(value: Bits) -> str:
    """Return the fields that are not zero: `PG WP V_TPR=0x5`, and `rest=` for undeclared bits."""
    shown, declared = [], 0
    for name, field in value.fields().items():
        declared |= field.mask
        if found := field.extract(value):
            shown.append(name if field.limit == 1 else f"{name}={found:#x}")
    if rest := value & ~declared:
        shown.append(f"rest={rest:#x}")
    return " ".join(shown)


def intercept_names(block: vmcb) -> list[str]:
    """Return the intercepts that are set, as `vmcb={"intercept.NAME": 1}` takes them."""
    names = {int(bit): bit.name.removeprefix("INTERCEPT_").lower() for bit in Intercept}
    found = []
    for word, value in enumerate(block.control.intercepts):
        for bit in range(32):
            number = 32 * word + bit
            if value >> bit & 1:
                found.append(_exception(number) or names.get(number, f"bit {number}"))
    return found


def _exception(number: int) -> str | None:
    vector = number - Intercept.INTERCEPT_EXCEPTION_OFFSET
    return f"excp.{vector}" if 0 <= vector < EXCEPTIONS else None


def vmcb_rows(block: vmcb) -> dict[str, list[Row]]:
    """Return all fields of a VMCB, by area."""
    return {
        "control": list(_control_rows(block)),
        "save": [_save_row(block.save, name) for name in _fields(block.save)],
    }


def _control_rows(block: vmcb) -> Iterator[Row]:
    names = intercept_names(block)
    yield Row("intercepts", " ".join(names), not names)
    for name in _fields(block.control):
        if name == "intercepts":
            continue
        value = getattr(block.control, name)
        if name == "exit_code":
            yield Row(name, f"{value:#x}  {describe(value)}", not value)
        else:
            yield field_row(name, value)


def _save_row(save: Any, name: str) -> Row:
    value = getattr(save, name)
    if not isinstance(value, vmcb_seg):
        return field_row(name, value)
    return segment_row(name, value.selector, value.base, value.limit, value.attrib)


def segment_row(name: str, selector: int, base: int, limit: int, attrib: int) -> Row:
    """Return a segment register in words; `attrib` as the VMCB packs it."""
    text = f"{selector:#06x} base={base:#x} limit={limit:#x}"
    if attrib:
        text += f" attrib={attrib:#05x} ({bits_text(SegAttrib(attrib))})"
    return Row(name, text, not (selector or base or limit or attrib))


def field_row(name: str, value: Any) -> Row:
    """Return a register or an array of bytes in words; bits by name if `FIELD_BITS` has them."""
    register = FIELD_BITS.get(name)
    if isinstance(value, ctypes.Array):
        data = bytes(value)
        return Row(name, data.rstrip(b"\0").hex(" ") or "0", not any(data))
    decoded = bits_text(register(value)) if register and value else ""
    return Row(name, f"{value:#x}  {decoded}".rstrip(), not value)


def _fields(area: Any) -> Iterator[str]:
    for field in area._fields_:
        yield field[0]
