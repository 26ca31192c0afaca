"""The guest's memory as far as the model holds it: the slots of the layout, byte for byte."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from harness.model import layout
from harness.model.areas import VMCB, Area, field, fitted, names_at, reader
from harness.model.errors import BadOperation, CannotKnow

UNKNOWN: Final = -1
"""The value of a field that the model cannot know; written to memory it stays that."""

_PAGE = 4096
_HELD: Final = {**layout.SLOTS, "page 0": layout.Slot(0, _PAGE)}
"""Page 0 is where a VM_HSAVE_PA of 0 leads, where that is taken."""


class Memory:
    """Slots that are there or not, with their content; `smram` is that of address space 1."""

    def __init__(self) -> None:
        self._bytes = {name: bytearray(slot.size_bytes) for name, slot in _HELD.items()}
        self._absent: set[str] = set()
        self._unknown: set[tuple[str, int]] = set()
        self._shown: dict[tuple[str, int], Mapping[str, int]] = {}
        for name in ("vmcb_a", "vmcb_b"):
            self.write_fields(layout.SLOTS[name].gpa, VMCB, layout.template_vmcb12())

    def copy(self) -> Memory:
        """Return an independent memory with the same content."""
        other = Memory.__new__(Memory)
        other._bytes = {name: bytearray(data) for name, data in self._bytes.items()}
        other._absent = set(self._absent)
        other._unknown = set(self._unknown)
        other._shown = dict(self._shown)
        return other

    def set_present(self, what: str, present: bool) -> None:
        """Put a slot back, or take it away; its content is kept.

        Raises BadOperation: there is no such slot.
        """
        if what not in layout.SLOTS:
            raise BadOperation(f"no slot {what!r}: there are {', '.join(layout.SLOTS)}")
        (self._absent.discard if present else self._absent.add)(what)

    def is_present(self, what: str) -> bool:
        """Tell whether a slot is there."""
        return what not in self._absent

    def is_mapped(self, gpa: int, size_bytes: int = 1) -> bool:
        """Tell whether KVM finds memory behind all of a range of address space 0."""
        pages = range(gpa // _PAGE * _PAGE, gpa + size_bytes, _PAGE)
        return all(self._is_page_mapped(page) for page in pages)

    def _is_page_mapped(self, gpa: int) -> bool:
        if gpa < layout.BASE.size_bytes or self._is_low_smram(gpa):
            return True
        found = _slot_at(gpa)
        return found is not None and self.is_present(found)

    @staticmethod
    def _is_low_smram(gpa: int) -> bool:
        # Address space 0 has memory there too, which is never taken away.
        return _slot_at(gpa) == "smram"

    def read(self, gpa: int, size_bytes: int) -> bytes:
        """Return bytes of address space 0.

        Raises CannotKnow: the model does not hold what is there.
        """
        name = _slot_at(gpa)
        if name is None or name == "smram":
            raise CannotKnow(f"the model does not hold memory at {gpa:#x}")
        at = gpa - _HELD[name].gpa
        if at + size_bytes > len(self._bytes[name]):
            raise CannotKnow(f"the model does not hold all of {size_bytes} bytes at {gpa:#x}")
        return bytes(self._bytes[name][at : at + size_bytes])

    def read_fields(self, gpa: int, area: Area, prefix: str = "") -> dict[str, int]:
        """Return the fields of an area whose names start with `prefix`, without it.

        Raises CannotKnow: the model does not hold what is there.
        """
        self.read(gpa, _PAGE)
        name = _holder(gpa)
        return self.slot_fields(name, area, prefix, gpa - _HELD[name].gpa)

    def write_fields(self, gpa: int, area: Area, changes: Mapping[str, int]) -> None:
        """Write fields of an area; other bytes stay.

        Raises BadOperation: the area has no such field.
        Raises CannotKnow: the model does not hold what is there.
        """
        self.read(gpa, _PAGE)
        name = _holder(gpa)
        self.write_slot_fields(name, area, changes, gpa - _HELD[name].gpa)

    def shown(self, what: str, area: Area, offset: int = 0) -> Mapping[str, int]:
        """Return the known fields of an area in a slot as `slot.field`; not to be changed."""
        key = what, offset
        if key not in self._shown:
            fields = self.slot_fields(what, area, offset=offset)
            self._shown[key] = {f"{what}.{n}": v for n, v in fields.items() if v != UNKNOWN}
        return self._shown[key]

    def slot_fields(
        self, what: str, area: Area, prefix: str = "", offset: int = 0
    ) -> dict[str, int]:
        """Return the fields of an area in a slot, whether that is there or not."""
        fields = reader(area, prefix).read(self._bytes[what], offset)
        for slot, at in self._unknown:
            if slot == what:
                self._mask(fields, area, prefix, at - offset)
        return fields

    @staticmethod
    def _mask(fields: dict[str, int], area: Area, prefix: str, offset: int) -> None:
        for name in names_at(area, offset):
            if name.startswith(prefix):
                fields[name[len(prefix) :]] = UNKNOWN

    def write_slot_fields(
        self, what: str, area: Area, changes: Mapping[str, int], offset: int = 0
    ) -> None:
        """Write fields of an area in a slot, whether that is there or not.

        Raises BadOperation: the area has no such field.
        """
        data = self._bytes[what]
        self._forget_shown(what)
        for name, value in fitted(area, changes).items():
            at, size = field(area, name)
            data[offset + at : offset + at + size] = value.to_bytes(size, "little")
            unknown = changes[name] == UNKNOWN
            (self._unknown.add if unknown else self._unknown.discard)((what, offset + at))

    def clear(self, what: str, offset: int, size_bytes: int) -> None:
        """Zero a part of a slot."""
        self._forget_shown(what)
        self._bytes[what][offset : offset + size_bytes] = bytes(size_bytes)
        inside = range(offset, offset + size_bytes)
        self._unknown = {(n, at) for n, at in self._unknown if n != what or at not in inside}

    def _forget_shown(self, what: str) -> None:
        for key in [key for key in self._shown if key[0] == what]:
            del self._shown[key]

    def forget(self, what: str, area: Area, names: Iterable[str], offset: int = 0) -> None:
        """Take fields for unknown from now on."""
        self.write_slot_fields(what, area, dict.fromkeys(names, UNKNOWN), offset)


def _slot_at(gpa: int) -> str | None:
    for name, slot in _HELD.items():
        if slot.gpa <= gpa < slot.gpa + slot.size_bytes:
            return name
    return None


def _holder(gpa: int) -> str:
    name = _slot_at(gpa)
    if name is None:
        raise CannotKnow(f"the model does not hold memory at {gpa:#x}")
    return name
