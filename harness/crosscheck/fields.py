"""Reading all fields of an area of bytes at once, and writing some, by the model's names."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Final

from harness.model.areas import SMRAM_32, SMRAM_64, Area, field, fitted
from harness.model.areas import VMCB as VMCB_AREA

_CODES: Final = {1: "B", 2: "H", 4: "I", 8: "Q"}


class FieldMap:
    """The numbers in an area."""

    def __init__(self, area: Area) -> None:
        self._area = area
        places = sorted(area.items(), key=lambda item: item[1])
        self._names = tuple(name for name, _ in places)
        layout, end = ["<"], 0
        for _, (at, size) in places:
            layout.append(f"{at - end}x{_CODES[size]}")
            end = at + size
        # One call for all fields: it is made several times for every step.
        self._unpack = struct.Struct("".join(layout))

    def read(self, data: bytes, prefix: str = "") -> dict[str, int]:
        """Return every field by its name, with a prefix."""
        values = self._unpack.unpack_from(data)
        return {prefix + name: value for name, value in zip(self._names, values, strict=True)}

    def write(self, data: bytearray | memoryview, fields: Mapping[str, int]) -> None:
        """Write fields, cut to their sizes.

        Raises BadOperation: there is none of that name.
        """
        for name, value in fitted(self._area, fields).items():
            at, size = field(self._area, name)
            data[at : at + size] = value.to_bytes(size, "little")


VMCB: Final = FieldMap(VMCB_AREA)
SMRAM: Final = FieldMap(SMRAM_64)
SMRAM_LEGACY: Final = FieldMap(SMRAM_32)
