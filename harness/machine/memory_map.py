"""What lies where below and above 4 GiB in a PC, as firmware would report it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from harness.machine.addresses import Gpa
from harness.machine.errors import MachineError


class E820Type(IntEnum):
    """Kinds of memory (ACPI Specification, 15.1; the kernel's asm/e820/types.h)."""

    RAM = 1
    RESERVED = 2


@dataclass(frozen=True)
class MemoryRange:
    """One line of a memory map."""

    gpa: Gpa
    size_bytes: int
    kind: E820Type = E820Type.RAM

    @property
    def end(self) -> int:
        """The first address past the range."""
        return self.gpa + self.size_bytes

    def __str__(self) -> str:
        return f"{self.gpa:#x}-{self.end - 1:#x}"


EBDA_GPA: Final = Gpa(0x9_FC00)
"""Extended BIOS data area; where conventional memory ends."""

CONVENTIONAL_END: Final = 0xA_0000
_SHADOW_GPA: Final = Gpa(0xC_0000)
_BIOS_GPA: Final = Gpa(0xF_0000)
HIGH_START: Final = 0x10_0000
"""1 MiB: where extended memory starts."""

LOW_LIMIT: Final = 0xC000_0000
"""RAM that does not fit below goes above `FOUR_GIB`; APICs and the rest lie between."""

FOUR_GIB: Final = 1 << 32

MIN_PC_BYTES: Final = 2 << 20


def ram_ranges(size_bytes: int) -> list[MemoryRange]:
    """Return where a PC of this size has memory; at 0xa0000, where VGA would be, it has none.

    Raises MachineError: less than `MIN_PC_BYTES`, or no whole pages.
    """
    if size_bytes < MIN_PC_BYTES or size_bytes % 4096:
        raise MachineError(f"a PC needs whole pages, {MIN_PC_BYTES >> 20} MiB or more")
    low_end = min(size_bytes, LOW_LIMIT)
    found = [MemoryRange(Gpa(0), CONVENTIONAL_END), _span(_SHADOW_GPA, low_end)]
    if size_bytes > low_end:
        found.append(MemoryRange(Gpa(FOUR_GIB), size_bytes - low_end))
    return found


def e820_map(size_bytes: int) -> list[MemoryRange]:
    """Return the map that firmware would hand over.

    Raises MachineError: less than `MIN_PC_BYTES`, or no whole pages.
    """
    _, low, *high = ram_ranges(size_bytes)
    return [
        _span(Gpa(0), EBDA_GPA),
        _span(EBDA_GPA, CONVENTIONAL_END, E820Type.RESERVED),
        _span(_BIOS_GPA, HIGH_START, E820Type.RESERVED),
        _span(Gpa(HIGH_START), low.end),
        *high,
    ]


def lower_kib(ranges: Iterable[MemoryRange]) -> int:
    """Return the KiB of RAM from address 0 up, 640 at most (multiboot's mem_lower)."""
    return min(_ram_end_from(ranges, 0), CONVENTIONAL_END) // 1024


def upper_kib(ranges: Iterable[MemoryRange]) -> int:
    """Return the KiB of RAM from 1 MiB up to the first hole (multiboot's mem_upper)."""
    return max(_ram_end_from(ranges, HIGH_START) - HIGH_START, 0) // 1024


def _ram_end_from(ranges: Iterable[MemoryRange], gpa: int) -> int:
    ram = (r for r in ranges if r.kind is E820Type.RAM)
    return next((r.end for r in ram if r.gpa <= gpa < r.end), 0)


def _span(gpa: Gpa, end: int, kind: E820Type = E820Type.RAM) -> MemoryRange:
    return MemoryRange(gpa, end - gpa, kind)
