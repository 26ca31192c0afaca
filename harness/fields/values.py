"""Which values of which fields are tried: single bits, boundaries, and what only goes together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from harness.fields.template import LIMIT, NO_MEMORY, RESERVED, place
from harness.machine.guest_abi import PAGE_SIZE
from harness.model.areas import VMCB
from harness.svm.intercepts import Intercept
from harness.svm.msrs import Cr0, Cr4, Efer
from harness.svm.vmcb import IOPM_SIZE, MSRPM_SIZE, EventInj, IntCtl, NestedCtl, SegAttrib

Fields = Mapping[str, int]


@dataclass(frozen=True)
class Cell:
    """One vmcb12: the template with a few fields changed."""

    field: str
    value: str
    """Which value of the field, in words."""
    changes: Fields


ADDRESSES: Final[Mapping[str, int]] = {
    "control.iopm_base_pa": IOPM_SIZE,
    "control.msrpm_base_pa": MSRPM_SIZE,
    "control.nested_cr3": PAGE_SIZE,
    "control.avic_vapic_bar": PAGE_SIZE,
    "control.ghcb_gpa": PAGE_SIZE,
    "control.avic_backing_page": PAGE_SIZE,
    "control.avic_logical_id": PAGE_SIZE,
    "control.avic_physical_id": PAGE_SIZE,
    "control.vmsa_pa": PAGE_SIZE,
    "save.cr3": PAGE_SIZE,
}
"""Fields that are physical addresses, and how many bytes from there on the CPU uses."""

_SHORT_RESERVED = 64
"""Of longer reserved space only every eighth byte is tried."""

ALL_FIELDS: Final = (*VMCB, *RESERVED)
"""Every field of both areas."""


def cells_of(field: str, template: Fields) -> list[Cell]:
    """Return the cells of a field, without those that equal the template."""
    found: dict[tuple[tuple[str, int], ...], Cell] = {}
    for value, changes in _tried(field, template):
        different = {name: new for name, new in changes.items() if template.get(name, 0) != new}
        if different:
            found.setdefault(tuple(sorted(different.items())), Cell(field, value, different))
    return list(found.values())


def _tried(field: str, template: Fields) -> Iterator[tuple[str, Fields]]:
    if field in RESERVED:
        size = RESERVED[field][1]
        for byte in range(0, size, 1 if size <= _SHORT_RESERVED else 8):
            yield f"byte {byte}", {f"{field}.{byte}": 0xFF}
        return
    bits = 8 * place(field)[1]
    old = template.get(field, 0)
    yield "0", {field: 0}
    yield "all ones", {field: (1 << bits) - 1}
    for bit in range(bits):
        yield f"bit {bit}", {field: old ^ 1 << bit}
    if field in ADDRESSES:
        yield from _addresses(field, old)
    for value, make in COMBINED.get(field, {}).items():
        yield value, make(template)


def _addresses(field: str, old: int) -> Iterator[tuple[str, Fields]]:
    size = ADDRESSES[field]
    yield "unaligned", {field: old | 0xFFF}
    yield "highest legal", {field: LIMIT - size}
    if size > PAGE_SIZE:
        yield "one page higher", {field: LIMIT - size + PAGE_SIZE}
    yield "lowest illegal", {field: LIMIT}
    yield "no memory", {field: NO_MEMORY}


# What only says something together with other fields

_Make = Callable[[Fields], Fields]

_MSR_PROT_WORD = f"control.intercepts.{int(Intercept.INTERCEPT_MSR_PROT.word)}"
_SHADOW: Final[Fields] = {"control.nested_ctl": 0}


def _efer(**bits: int) -> _Make:
    return lambda t: {"save.efer": int(Efer(t["save.efer"]).replace(**bits))}


def _cr0(**bits: int) -> _Make:
    return lambda t: {"save.cr0": int(Cr0(t["save.cr0"]).replace(**bits))}


def _cr4(**bits: int) -> _Make:
    return lambda t: {"save.cr4": int(Cr4(t["save.cr4"]).replace(**bits))}


def _cs(**bits: int) -> _Make:
    return lambda t: {"save.cs.attrib": int(SegAttrib(t["save.cs.attrib"]).replace(**bits))}


def _set(field: str, value: int) -> _Make:
    return lambda t: {field: value}


def _all(*parts: _Make) -> _Make:
    return lambda t: {name: value for part in parts for name, value in part(t).items()}


def _shadow(*parts: _Make) -> _Make:
    return _all(*parts, lambda t: _SHADOW)


_LEGACY = _all(_efer(LME=0, LMA=0), _cs(L=0, DB=1))
_LEGACY_32 = _all(_LEGACY, _cr4(PAE=0))
_NO_PAGING = _all(_LEGACY, _cr0(PG=0))


def _event(type_: int, vector: int, *, error: int = 0) -> _Make:
    return _set("control.event_inj", int(EventInj.of(VALID=1, TYPE=type_, VEC=vector) | error))


_TYPES = {0: "INTR", 1: "1", 2: "NMI", 3: "EXEPT", 4: "SOFT", 5: "5", 6: "6", 7: "7"}
_EXEPT = 3
_ERROR = EventInj.VALID_ERR.mask


def _events() -> Iterator[tuple[str, _Make]]:
    for type_, name in _TYPES.items():
        vectors = (*range(34), 0x40, 0xFF) if type_ == _EXEPT else (0, 2, 3, 31, 0x40, 0xFF)
        for vector in vectors:
            yield f"{name} {vector}", _event(type_, vector)
    for vector in (8, 10, 11, 12, 13, 14, 17):
        yield f"EXEPT {vector}, error code", _event(_EXEPT, vector, error=_ERROR)
    for bit in range(12, 31):
        yield f"INTR 64, bit {bit}", _event(0, 0x40, error=1 << bit)


def _without_nmi_intercept(t: Fields) -> Fields:
    name = f"control.intercepts.{int(Intercept.INTERCEPT_NMI.word)}"
    return {name: t[name] & ~Intercept.INTERCEPT_NMI.mask}


def _int_ctl(**bits: int) -> _Make:
    return _set("control.int_ctl", int(IntCtl.of(**bits)))


COMBINED: Final[Mapping[str, Mapping[str, _Make]]] = {
    "control.event_inj": dict(_events()),
    "control.int_ctl": {
        "V_NMI_ENABLE, NMI not intercepted": _all(_int_ctl(V_NMI_ENABLE=1), _without_nmi_intercept),
        "V_NMI, NMI not intercepted": _all(_int_ctl(V_NMI=1), _without_nmi_intercept),
        "V_IRQ, V_INTR_PRIO=15": _int_ctl(V_IRQ=1, V_INTR_PRIO=15),
        "V_GIF_ENABLE, V_GIF": _int_ctl(V_GIF_ENABLE=1, V_GIF=1),
    },
    "control.nested_ctl": {
        "NP_ENABLE, nCR3 beyond": lambda t: {
            "control.nested_ctl": int(NestedCtl.of(NP_ENABLE=1)),
            "control.nested_cr3": LIMIT,
        },
    },
    "control.nested_cr3": {
        "lowest illegal, NP_ENABLE=0": _shadow(_set("control.nested_cr3", LIMIT)),
        "all ones, NP_ENABLE=0": _shadow(_set("control.nested_cr3", (1 << 64) - 1)),
    },
    "control.msrpm_base_pa": {
        "no memory, MSR_PROT=0": lambda t: {
            "control.msrpm_base_pa": NO_MEMORY,
            _MSR_PROT_WORD: t[_MSR_PROT_WORD] & ~Intercept.INTERCEPT_MSR_PROT.mask,
        },
    },
    "save.efer": {
        "LME=0, LMA=0": _LEGACY,
        "LME=0, LMA=0, PG=0": _NO_PAGING,
        "LME=0, LMA=0, PAE=0": _LEGACY_32,
        "LMA=0, NP_ENABLE=0": _shadow(_efer(LMA=0)),
        "LME=0, NP_ENABLE=0": _shadow(_efer(LME=0)),
        "LME=0, LMA=0, NP_ENABLE=0": _shadow(_LEGACY),
    },
    "save.cr0": {
        "CD=1, NW=1": _cr0(CD=1, NW=1),
        "PG=0, NW=1": _all(_NO_PAGING, _cr0(NW=1)),
        "PG=0, PE=0, LME=0": _all(_NO_PAGING, _cr0(PE=0)),
        "PE=0, LME=0": _all(_LEGACY, _cr0(PE=0)),
        "PG=0, NP_ENABLE=0": _shadow(_NO_PAGING),
        "PG=0, LME=1, NP_ENABLE=0": _shadow(_cr0(PG=0)),
    },
    "save.cr4": {
        "PAE=0, LME=0": _LEGACY_32,
        "PAE=0, PG=0": _all(_NO_PAGING, _cr4(PAE=0)),
        "PAE=0, LME=0, NP_ENABLE=0": _shadow(_LEGACY_32),
        "bit 63, PG=0": _all(_NO_PAGING, lambda t: {"save.cr4": t["save.cr4"] | 1 << 63}),
    },
    "save.cr3": {
        "lowest illegal, LME=0": _all(_LEGACY, _set("save.cr3", LIMIT)),
        "bit 63, LME=0": _all(_LEGACY, _set("save.cr3", 1 << 63)),
        "lowest illegal, PG=0": _all(_NO_PAGING, _set("save.cr3", LIMIT)),
        "lowest illegal, PG=0, LME=1": _all(_cr0(PG=0), _set("save.cr3", LIMIT)),
        "lowest illegal, NP_ENABLE=0": _shadow(_set("save.cr3", LIMIT)),
        "no memory, NP_ENABLE=0": _shadow(_set("save.cr3", NO_MEMORY)),
        "empty PDPTEs, LME=0, NP_ENABLE=0": _shadow(_LEGACY, _set("save.cr3", 0)),
        "no memory, LME=0, NP_ENABLE=0": _shadow(_LEGACY, _set("save.cr3", NO_MEMORY)),
        "no memory, LME=0": _all(_LEGACY, _set("save.cr3", NO_MEMORY)),
    },
    "save.cs.attrib": {
        "L=1, DB=1, PG=0": _all(_NO_PAGING, _cs(L=1, DB=1)),
        "L=1, DB=1, LME=0": _all(_LEGACY, _cs(L=1, DB=1)),
        "L=0, DB=1": _cs(L=0, DB=1),
        "L=0, DB=0": _cs(L=0, DB=0),
    },
    "save.rflags": {
        "VM, LME=0": _all(_LEGACY, _set("save.rflags", 1 << 17 | 2)),
        "IF and V_IRQ": _all(_set("save.rflags", 1 << 9 | 2), _int_ctl(V_IRQ=1, V_INTR_PRIO=15)),
    },
}
"""Values that need other fields too: by field, by what they are."""
