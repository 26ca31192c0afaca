"""Long-mode page tables in guest memory: of a level's own, and nested ones (NPT).

Both have the same format (APM vol. 2, 5.3 Long-Mode Page Translation, 15.25 Nested Paging).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntFlag
from typing import Final

from harness.machine.addresses import Gpa
from harness.machine.errors import MachineError
from harness.machine.memory import GuestMemory

PAGE: Final = 0x1000
LARGE_PAGE: Final = 0x20_0000
_ENTRIES: Final = 512
_ADDRESS: Final = 0x000F_FFFF_FFFF_F000
_LEVELS: Final = (39, 30, 21, 12)


class Pte(IntFlag):
    """Bits of a page-table entry."""

    P = 1 << 0
    W = 1 << 1
    U = 1 << 2
    PWT = 1 << 3
    PCD = 1 << 4
    A = 1 << 5
    D = 1 << 6
    PS = 1 << 7
    G = 1 << 8
    NX = 1 << 63


ALL: Final = Pte.P | Pte.W | Pte.U | Pte.A | Pte.D
"""Everything allowed, and nothing left for the CPU to write."""
_TABLE: Final = Pte.P | Pte.W | Pte.U | Pte.A


class PageAllocator:
    """Hands out guest memory, upwards; nothing comes back."""

    def __init__(self, start: Gpa, end: Gpa) -> None:
        self._next = int(start)
        self._end = int(end)

    def take(self, size_bytes: int = PAGE, align: int = PAGE) -> Gpa:
        """Return the address of unused zeroed memory, in whole pages.

        Raises MachineError: the machine has no more.
        """
        at = -(-self._next // align) * align
        size_bytes = -(-size_bytes // PAGE) * PAGE
        if at + size_bytes > self._end:
            raise MachineError(f"out of guest memory: {size_bytes:#x} bytes at {at:#x}")
        self._next = at + size_bytes
        return Gpa(at)


@dataclass(frozen=True)
class Walk:
    """Where a walk ended."""

    entry_gpa: Gpa
    """The last entry that was read."""
    value: int
    shift: int
    """log2 of what that entry maps: 12, 21, 30; 39 of a level-4 entry."""

    @property
    def present(self) -> bool:
        """Whether that entry is a mapping."""
        return bool(self.value & Pte.P)


class PageTables:
    """Four levels of tables; addresses are those that the tables' owner uses."""

    def __init__(
        self, memory: GuestMemory, pages: PageAllocator, on_change: Callable[[], None] | None = None
    ) -> None:
        """Make tables that map nothing.

        Args:
            memory: of the machine.
            pages: where the tables come from.
            on_change: called when an entry that was present changes: KVM may have built shadow
                tables from it, and does not see what is written from outside the guest.

        """
        self.memory = memory
        self._pages = pages
        self._on_change = on_change
        self.root = pages.take()
        """What goes into CR3 or nested_cr3."""

    def identity(self, start: int, end: int, flags: int = ALL) -> None:
        """Map a range to itself, with 2 MiB pages."""
        first = start // LARGE_PAGE * LARGE_PAGE
        while first < end:
            table = self._table_for(first, 21)
            stop = min(end, (first // (LARGE_PAGE * _ENTRIES) + 1) * LARGE_PAGE * _ENTRIES)
            values = [at | flags | Pte.PS for at in range(first, stop, LARGE_PAGE)]
            at = table + 8 * (first >> 21 & _ENTRIES - 1)
            self.memory.write(Gpa(at), struct.pack(f"<{len(values)}Q", *values))
            first = stop

    def map(self, address: int, target: int, flags: int = ALL, size: int = PAGE) -> None:
        """Map one page of 4 KiB or 2 MiB, splitting a larger one that is there."""
        shift = {PAGE: 12, LARGE_PAGE: 21}[size]
        table = self._table_for(address, shift)
        large = Pte.PS if shift == 21 else 0
        self._write(table + 8 * (address >> shift & _ENTRIES - 1), target | flags | large)

    def unmap(self, address: int) -> None:
        """Take one 4 KiB page away."""
        self.set_entry(address, 0)

    def protect(self, address: int, *, clear: int = 0, set_: int = 0) -> None:
        """Change flags of one 4 KiB page."""
        value = self.entry(address)
        self.set_entry(address, value & ~int(clear) | int(set_))

    def entry(self, address: int) -> int:
        """Return the 4 KiB entry of an address, splitting a larger page."""
        return self.memory.read_int(self._entry_gpa(address), 8)

    def set_entry(self, address: int, value: int) -> None:
        """Write the 4 KiB entry of an address, any bits."""
        self._write(self._entry_gpa(address), value)

    def walk(self, address: int) -> Walk:
        """Return where a walk of the tables ends, as they are in memory now."""
        return walk(self.memory, self.root, address)

    def _entry_gpa(self, address: int) -> Gpa:
        return Gpa(self._table_for(address, 12) + 8 * (address >> 12 & _ENTRIES - 1))

    def _table_for(self, address: int, shift: int) -> int:
        """Return the table whose entries map 1 << shift bytes, made if need be."""
        table = int(self.root)
        for upper in _LEVELS[: _LEVELS.index(shift)]:
            at = table + 8 * (address >> upper & _ENTRIES - 1)
            value = self.memory.read_int(Gpa(at), 8)
            if not value & Pte.P:
                value = self._pages.take() | _TABLE
                self._write(at, value)
            elif upper == 21 and value & Pte.PS:
                value = self._split(value) | _TABLE
                self._write(at, value)
            table = value & _ADDRESS
        return table

    def _split(self, large: int) -> int:
        table = self._pages.take()
        flags = large & ~_ADDRESS & ~int(Pte.PS)
        start = large & _ADDRESS & ~(LARGE_PAGE - 1)
        values = [start + i * PAGE | flags for i in range(_ENTRIES)]
        self.memory.write(table, struct.pack(f"<{_ENTRIES}Q", *values))
        return table

    def _write(self, gpa: int, value: int) -> None:
        if self._on_change is not None:
            old = self.memory.read_int(Gpa(gpa), 8)
            if old & Pte.P and old != value:
                self._on_change()
        self.memory.write_int(Gpa(gpa), 8, value)


def walk(memory: GuestMemory, root: int, address: int) -> Walk:
    """Walk four levels of tables in guest memory.

    Raises GuestMemoryError: a table lies outside memory.
    """
    table = root & _ADDRESS
    for shift in _LEVELS:
        at = Gpa(table + 8 * (address >> shift & _ENTRIES - 1))
        value = memory.read_int(at, 8)
        if not value & Pte.P or shift == 12 or value & Pte.PS:
            break
        table = value & _ADDRESS
    return Walk(at, value, shift)


def translate(memory: GuestMemory, root: int, address: int) -> tuple[int, int] | None:
    """Return where an address leads and the flags that all levels allow; None if nowhere."""
    table, allowed, no_execute = root & _ADDRESS, int(Pte.P | Pte.W | Pte.U), 0
    for shift in _LEVELS:
        value = memory.read_int(Gpa(table + 8 * (address >> shift & _ENTRIES - 1)), 8)
        if not value & Pte.P:
            return None
        allowed &= value
        no_execute |= value & Pte.NX
        if shift == 12 or value & Pte.PS:
            offset = (1 << shift) - 1
            return value & _ADDRESS & ~offset | address & offset, allowed | no_execute
        table = value & _ADDRESS
    return None
