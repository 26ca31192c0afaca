"""The modes that a guest can be in: state for each, and code that tells them apart.

APM vol. 2, 1.3 Operating Modes, 5 Page Translation and Protection.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from harness.machine.addresses import Gpa
from harness.proxy.guest_level import CODE64_ATTRIB, DATA_ATTRIB
from harness.proxy.level import Level
from harness.proxy.paging import LARGE_PAGE, PAGE, Pte
from harness.svm.msrs import Cr0, Cr4, Efer
from harness.svm.vmcb import SegAttrib

ALIAS: Final = 0x4000_0000
"""With paging, memory from 0 up is seen here once more, above all of it."""
STORED: Final = 0x1234
"""What `Mode.store` writes."""

_CODE16 = SegAttrib.of(P=1, S=1, TYPE=0xB)
_DATA16 = SegAttrib.of(P=1, S=1, TYPE=0x3)
_CODE32 = _CODE16.replace(G=1, DB=1)
_DATA_SEGMENTS = ("ds", "es", "ss")
_FLAT = 0xFFFF_FFFF

_REAL_CR0 = Cr0.of(ET=1)
_PROTECTED_CR0 = Cr0.of(ET=1, PE=1)
_PAGING_CR0 = Cr0.of(ET=1, PE=1, PG=1)
_LEGACY_EFER = Efer.of(SVME=1)
_LONG_EFER = Efer.of(SVME=1, LME=1, LMA=1)

_LARGE = int(Pte.P | Pte.W | Pte.U | Pte.A | Pte.D | Pte.PS)


def _store16(address: int) -> bytes:
    return b"\xc7\x06" + struct.pack("<HH", address, STORED)


def _store32(address: int) -> bytes:
    return b"\xc7\x05" + struct.pack("<II", address, STORED)


def _store64(address: int) -> bytes:
    return b"\xc7\x04\x25" + struct.pack("<II", address, STORED)


@dataclass(frozen=True)
class Mode:
    """A mode: state for it, its store instruction, and what the code of unclear mode leaves."""

    state: Callable[[Level], Mapping[str, int]]
    store: Callable[[int], bytes]
    rax: int
    paging: bool = True
    real: bool = False


def _registers(cr0: int, cr4: int, efer: int, cr3: int = 0) -> dict[str, int]:
    return {"cr0": cr0, "cr4": cr4, "efer": efer, "cr3": cr3}


def _segments(code: int, data: int, *, base: int = 0, limit: int = _FLAT) -> dict[str, int]:
    fields = {"cs.attrib": code, "cs.limit": limit}
    for name in _DATA_SEGMENTS:
        fields |= {f"{name}.attrib": data, f"{name}.limit": limit, f"{name}.base": base}
    return fields


def _real(level: Level) -> Mapping[str, int]:
    fields = _segments(_CODE16, _DATA16, base=level.scratch, limit=0xFFFF)
    return fields | _registers(_REAL_CR0, 0, _LEGACY_EFER)


def _protected(level: Level) -> Mapping[str, int]:
    return _segments(_CODE32, DATA_ATTRIB) | _registers(_PROTECTED_CR0, 0, _LEGACY_EFER)


def _legacy_paging(level: Level) -> Mapping[str, int]:
    """Two levels, 4 MiB pages."""
    cr3 = table(level, "I", {n: n << 22 | _LARGE for n in range(16)} | {ALIAS >> 22: _LARGE})
    cr4 = Cr4.of(PSE=1)
    return _segments(_CODE32, DATA_ATTRIB) | _registers(_PAGING_CR0, cr4, _LEGACY_EFER, cr3)


def _pae_paging(level: Level) -> Mapping[str, int]:
    """Three levels, 2 MiB pages."""
    low = table(level, "Q", {n: n << 21 | _LARGE for n in range(32)})
    cr3 = table(level, "Q", {0: low | Pte.P, ALIAS >> 30: low | Pte.P})
    cr4 = Cr4.of(PAE=1)
    return _segments(_CODE32, DATA_ATTRIB) | _registers(_PAGING_CR0, cr4, _LEGACY_EFER, cr3)


def _compatibility(level: Level) -> Mapping[str, int]:
    return _segments(_CODE32, DATA_ATTRIB) | _long(level)


def _long_mode(level: Level) -> Mapping[str, int]:
    return _segments(CODE64_ATTRIB, DATA_ATTRIB) | _long(level)


def _long(level: Level) -> dict[str, int]:
    for at in range(0, 4 * LARGE_PAGE, LARGE_PAGE):
        level.tables.map(ALIAS + at, at, size=LARGE_PAGE)
    return _registers(_PAGING_CR0, Cr4.of(PAE=1), _LONG_EFER, level.tables.root)


def table(level: Level, entry: str, entries: Mapping[int, int]) -> int:
    """Return the address of a new page table; `entry` is the entries' format as in `struct`."""
    machine = level.cpu.machine
    at = machine.pages.take(PAGE)
    size = struct.calcsize(f"<{entry}")
    for index, value in entries.items():
        machine.memory.write(Gpa(at + index * size), struct.pack(f"<{entry}", int(value)))
    return int(at)


MODES: Final = {
    "real": Mode(_real, _store16, 0xFFFF, paging=False, real=True),
    "protected": Mode(_protected, _store32, 0xFFFF_FFFF, paging=False),
    "legacy_paging": Mode(_legacy_paging, _store32, 0xFFFF_FFFF),
    "pae_paging": Mode(_pae_paging, _store32, 0xFFFF_FFFF),
    "compatibility": Mode(_compatibility, _store32, 0xFFFF_FFFF),
    "long": Mode(_long_mode, _store64, 0),
}
"""Every mode by its name."""
