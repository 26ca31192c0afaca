"""Fields of the architecture's memory areas, by name: where each lies, and reading and writing it.

Names are those of the structs of `harness.svm`, with dots: `asid`, `intercepts.3`, `cs.selector`.
Arrays of bytes (reserved space, instruction bytes) are no fields here.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator, Mapping
from typing import Any, Final

from harness.model.errors import BadOperation
from harness.svm.smram import kvm_smram_state_32, kvm_smram_state_64
from harness.svm.vmcb import VMCB_SAVE_OFFSET, vmcb_control_area, vmcb_save_area

Area = Mapping[str, tuple[int, int]]
"""Offset and size in bytes of each field by name."""


def _fields_of(kind: Any, prefix: str = "", base: int = 0) -> Iterator[tuple[str, tuple[int, int]]]:
    for name, field_type in kind._fields_:
        at = base + getattr(kind, name).offset
        if issubclass(field_type, ctypes.Structure):
            yield from _fields_of(field_type, f"{prefix}{name}.", at)
        elif not issubclass(field_type, ctypes.Array):
            yield prefix + name, (at, ctypes.sizeof(field_type))
        elif field_type._type_ is not ctypes.c_uint8 and not name.startswith("reserved"):
            size = ctypes.sizeof(field_type._type_)
            yield from (
                (f"{prefix}{name}.{i}", (at + i * size, size)) for i in range(field_type._length_)
            )


def _prefixed(prefix: str, area: Area, base: int = 0) -> dict[str, tuple[int, int]]:
    return {f"{prefix}{name}": (base + at, size) for name, (at, size) in area.items()}


CONTROL: Final[Area] = dict(_fields_of(vmcb_control_area))
"""Within the control area."""

SAVE: Final[Area] = dict(_fields_of(vmcb_save_area))
"""Within the save area."""

VMCB: Final[Area] = _prefixed("control.", CONTROL) | _prefixed("save.", SAVE, VMCB_SAVE_OFFSET)
"""Within a VMCB; the host save page has the same layout."""

SMRAM_64: Final[Area] = dict(_fields_of(kvm_smram_state_64))
SMRAM_32: Final[Area] = dict(_fields_of(kvm_smram_state_32))

SEGMENTS: Final = ("es", "cs", "ss", "ds")
SEG_PARTS: Final = ("selector", "attrib", "limit", "base")
SEG: Final = (*(f"{name}.{part}" for name in SEGMENTS for part in SEG_PARTS), "cpl")
"""Fields of the clean bit SEG."""

DT: Final = ("gdtr.base", "gdtr.limit", "idtr.base", "idtr.limit")
"""Fields of the clean bit DT; the selectors and attributes of both mean nothing."""

DR: Final = ("dr6", "dr7")
CR: Final = ("efer", "cr0", "cr3", "cr4")
VMRUN_STATE: Final = (
    *(name for name in SEG if name != "cpl"),
    *DT,
    *CR,
    *("rflags", "rax", "rsp", "rip"),
)
"""What VMRUN saves of the host (APM vol. 2, 15.5.1; `svm_copy_vmrun_state()`)."""


class Reader:
    """Reads all fields of an area at once."""

    def __init__(self, area: Area, prefix: str) -> None:
        self._names, layout, end = [], ["<"], 0
        for name, (at, size) in sorted(area.items(), key=lambda item: item[1]):
            if name.startswith(prefix):
                self._names.append(name[len(prefix) :])
                layout.append(f"{at - end}x{_CODES[size]}")
                end = at + size
        self._unpack = struct.Struct("".join(layout)).unpack_from

    def read(self, data: bytearray, offset: int) -> dict[str, int]:
        """Return the fields by name; what the prefix was is no longer in it."""
        return dict(zip(self._names, self._unpack(data, offset), strict=True))


_CODES: Final = {1: "B", 2: "H", 4: "I", 8: "Q"}
_READERS: Final[dict[tuple[int, str], Reader]] = {}
_NAMES: Final[dict[int, dict[int, list[str]]]] = {}


def reader(area: Area, prefix: str) -> Reader:
    """Return what reads the fields whose names start with a prefix."""
    # Areas are constants of this module: they live as long as it does.
    key = id(area), prefix
    if key not in _READERS:
        _READERS[key] = Reader(area, prefix)
    return _READERS[key]


def names_at(area: Area, offset: int) -> list[str]:
    """Return the fields that start at an offset."""
    if id(area) not in _NAMES:
        found: dict[int, list[str]] = {}
        for name, (at, _) in area.items():
            found.setdefault(at, []).append(name)
        _NAMES[id(area)] = found
    return _NAMES[id(area)].get(offset, [])


def field(area: Area, name: str) -> tuple[int, int]:
    """Return offset and size of a field.

    Raises BadOperation: the area has no such field.
    """
    try:
        return area[name]
    except KeyError:
        raise BadOperation(f"no field {name!r}") from None


def fitted(area: Area, changes: Mapping[str, int]) -> dict[str, int]:
    """Return values cut to the size of their fields.

    Raises BadOperation: the area has no such field.
    """
    return {name: value & (1 << 8 * field(area, name)[1]) - 1 for name, value in changes.items()}
