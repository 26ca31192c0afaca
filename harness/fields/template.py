"""The legal vmcb12 that every cell starts from, and the memory that it lives in.

All that can be intercepted is, so that an L2 in whatever state comes back at once: its code page is
a VMMCALL and HLTs, its page tables map this page only, and its nested ones map the same page and
its tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from harness.model.areas import VMCB
from harness.model.layout import PAT_RESET
from harness.svm.intercepts import InterceptWord
from harness.svm.msrs import Cr0, Cr4, Efer
from harness.svm.vmcb import (
    VMCB_SAVE_OFFSET,
    NestedCtl,
    SegAttrib,
    vmcb_control_area,
    vmcb_save_area,
)

ADDRESS_BITS: Final = 36
"""MAXPHYADDR of L1; smaller than any host's, so that the check is KVM's."""
LIMIT: Final = 1 << ADDRESS_BITS

MEMORY_MIB: Final = 4
NO_MEMORY: Final = 0x8000_0000
"""A legal address of a page without memory."""

ASID: Final = 6
"""Two bits, so that no flipped bit makes it 0."""

_CODE = SegAttrib.of(P=1, S=1, G=1, L=1, TYPE=0xB)
_DATA = SegAttrib.of(P=1, S=1, G=1, DB=1, TYPE=0x3)
_TSS = SegAttrib.of(P=1, TYPE=0xB)

_ALL_32 = (1 << 32) - 1
#: Not the traps after writes of EFER and CRs, for guests of SEV-ES only.
_WORD4_TRAPS = 0xFFFF_8000


@dataclass(frozen=True)
class Layout:
    """Addresses of what the template points to."""

    code: int
    page_tables: int
    """L2's, four levels."""
    nested_tables: int
    msrpm: int
    iopm: int


def template(layout: Layout) -> dict[str, int]:
    """Return the fields of a legal vmcb12 by name; those that are missing are 0."""
    fields = {f"control.intercepts.{int(word)}": _ALL_32 for word in InterceptWord}
    fields[f"control.intercepts.{int(InterceptWord.INTERCEPT_WORD4)}"] &= ~_WORD4_TRAPS
    fields[f"control.intercepts.{int(InterceptWord.INTERCEPT_WORD5)}"] = 0
    fields |= {
        "control.iopm_base_pa": layout.iopm,
        "control.msrpm_base_pa": layout.msrpm,
        "control.asid": ASID,
        "control.nested_ctl": int(NestedCtl.of(NP_ENABLE=1)),
        "control.nested_cr3": layout.nested_tables,
        "save.efer": int(Efer.of(SVME=1, LME=1, LMA=1)),
        "save.cr0": int(Cr0.of(PG=1, NE=1, ET=1, PE=1)),
        "save.cr3": layout.page_tables,
        "save.cr4": int(Cr4.of(PAE=1)),
        "save.rflags": 2,
        "save.rip": layout.code,
        "save.rsp": layout.code,
        "save.g_pat": PAT_RESET,
        "save.tr.attrib": int(_TSS),
        "save.tr.limit": 0x67,
    }
    for name in ("es", "cs", "ss", "ds", "fs", "gs"):
        fields[f"save.{name}.selector"] = 8 if name == "cs" else 16
        fields[f"save.{name}.attrib"] = int(_CODE if name == "cs" else _DATA)
        fields[f"save.{name}.limit"] = _ALL_32
    return fields


def place(name: str) -> tuple[int, int]:
    """Return offset and size of a field, or of a byte of an array: `control.reserved_0x018.3`.

    Raises KeyError: the VMCB has no such field.
    """
    if name in VMCB:
        return VMCB[name]
    array, _, index = name.rpartition(".")
    return RESERVED[array][0] + int(index), 1


def _reserved() -> dict[str, tuple[int, int]]:
    found = {}
    areas: tuple[tuple[str, Any, int], ...] = (
        ("control", vmcb_control_area, 0),
        ("save", vmcb_save_area, VMCB_SAVE_OFFSET),
    )
    for prefix, kind, base in areas:
        for name, *_ in kind._fields_:
            member = getattr(kind, name)
            if f"{prefix}.{name}" not in VMCB and not _has_parts(f"{prefix}.{name}"):
                found[f"{prefix}.{name}"] = (base + member.offset, member.size)
    return found


def _has_parts(name: str) -> bool:
    return any(other.startswith(f"{name}.") for other in VMCB)


RESERVED: Final[Mapping[str, tuple[int, int]]] = _reserved()
"""Offset and size of the arrays of bytes: reserved space, and the bytes of the instruction."""


def image(fields: Mapping[str, int]) -> bytearray:
    """Return the page of a VMCB with these fields, by name; all others are 0."""
    page = bytearray(4096)
    for name, value in fields.items():
        at, size = place(name)
        page[at : at + size] = value.to_bytes(size, "little")
    return page


def area(fields: Mapping[str, int], name: str) -> dict[str, int]:
    """Return the fields of `control` or of `save` without this prefix, as the checks want them."""
    prefix = f"{name}."
    return {key.removeprefix(prefix): v for key, v in fields.items() if key.startswith(prefix)}
