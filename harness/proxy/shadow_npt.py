"""Nested page tables for a guest's guest: two translations made into one, page by page.

A host whose guest uses nested paging for a guest of its own cannot load the guest's tables: their
addresses are the guest's. It fills tables of its own when they are found wanting.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Final

from harness.machine.addresses import Gpa
from harness.machine.errors import GuestMemoryError
from harness.machine.memory import GuestMemory
from harness.proxy.paging import LARGE_PAGE, PAGE, PageAllocator, PageTables, Pte
from harness.svm.exit_info import NpfInfo

_ADDRESS: Final = 0x000F_FFFF_FFFF_F000
_LEVELS: Final = (39, 30, 21, 12)

Translate = Callable[[int], int | None]
"""From the address of one level to that of the next one out; None: nowhere."""


class Outcome(Enum):
    """What came of a fault."""

    FILLED = "filled"
    """The guest's tables allow the access: run on."""
    GUEST = "guest"
    """The guest's own tables refuse it: the fault is the guest's to see."""
    HOST = "host"
    """The host's tables refuse it."""


class RecycledPages(PageAllocator):
    """Pages that are all given back at once."""

    def __init__(self, source: PageAllocator, memory: GuestMemory) -> None:
        self._source = source
        self._memory = memory
        self._owned: list[Gpa] = []
        self._used = 0

    def take(self, size_bytes: int = PAGE, align: int = PAGE) -> Gpa:
        """Return a zeroed page."""
        if self._used == len(self._owned):
            self._owned.append(self._source.take(size_bytes, align))
        else:
            self._memory.write(self._owned[self._used], bytes(PAGE))
        self._used += 1
        return self._owned[self._used - 1]

    @property
    def used(self) -> int:
        """How many are in use."""
        return self._used

    def release(self) -> None:
        """Take all pages back."""
        self._used = 0


@dataclass(frozen=True)
class _Found:
    """The end of a walk of the guest's tables."""

    address: int
    flags: int
    shift: int


class ShadowNpt:
    """What a host loads for its guest's guest."""

    def __init__(
        self, memory: GuestMemory, pages: PageAllocator, on_change: Callable[[], None]
    ) -> None:
        self._memory = memory
        self._pages = RecycledPages(pages, memory)
        self._on_change = on_change
        self._tables = PageTables(memory, self._pages, on_change)
        self._nested_cr3 = -1
        self._sources: dict[int, int] = {}
        """The guest's entries that were used, by machine address, with their values."""

    @property
    def root(self) -> int:
        """What goes into nested_cr3 of the merged VMCB."""
        return self._tables.root

    def refresh(self, nested_cr3: int) -> None:
        """Forget everything if the guest's tables are others now, or were changed."""
        stale = nested_cr3 != self._nested_cr3 or any(
            self._memory.read_int(Gpa(at), 8) != value for at, value in self._sources.items()
        )
        if stale:
            self.flush(nested_cr3)

    def flush(self, nested_cr3: int) -> None:
        """Forget everything."""
        self._nested_cr3 = nested_cr3
        self._sources.clear()
        if self._pages.used > 1:
            self._on_change()
            self._pages.release()
            self._tables = PageTables(self._memory, self._pages, self._on_change)

    def fault(
        self, address: int, info: int, machine: Translate, host: Translate
    ) -> tuple[Outcome, int]:
        """Answer a nested page fault; return what came of it, and exit_info_1 for the guest.

        Args:
            address: the physical address that the inner guest accessed.
            info: exit_info_1.
            machine: from the guest's physical addresses to memory.
            host: from the guest's physical addresses to what the host's VMCBs speak of.

        """
        found, present = self._walk(address, machine)
        if found is None or not _allows(found.flags, NpfInfo(info)):
            return Outcome.GUEST, NpfInfo(info).replace(P=int(present), RSV=0)
        target = host(found.address)
        if target is None:
            return Outcome.HOST, info
        self._fill(address, found, target, host)
        return Outcome.FILLED, info

    def _fill(self, address: int, found: _Found, target: int, host: Translate) -> None:
        flags = found.flags | Pte.A | Pte.D
        start = found.address & -LARGE_PAGE
        whole = found.shift >= 21 and all(
            host(at) == (target & -LARGE_PAGE) + at - start
            for at in (start, start + LARGE_PAGE - PAGE)
        )
        if whole:
            self._tables.map(address & -LARGE_PAGE, target & -LARGE_PAGE, flags, LARGE_PAGE)
        else:
            self._tables.map(address & -PAGE, target & -PAGE, flags)

    def _walk(self, address: int, machine: Translate) -> tuple[_Found | None, bool]:
        """Walk the guest's tables; also tell whether all entries were present."""
        table: int = self._nested_cr3 & _ADDRESS
        allowed, no_execute = int(Pte.P | Pte.W | Pte.U), 0
        for shift in _LEVELS:
            at = machine(table + 8 * (address >> shift & 511))
            if at is None:
                return None, False
            try:
                value = self._memory.read_int(Gpa(at), 8)
            except GuestMemoryError:
                return None, False
            self._sources[at] = value
            if not value & Pte.P:
                return None, False
            allowed &= value
            no_execute |= value & Pte.NX
            if shift == 12 or value & Pte.PS:
                offset = (1 << shift) - 1
                where = value & _ADDRESS & ~offset | address & offset
                return _Found(where, allowed | no_execute, shift), True
            table = value & _ADDRESS
        return None, False


def _allows(flags: int, info: NpfInfo) -> bool:
    """Tell whether the guest's entries allow an access; nested walks are user accesses."""
    if not flags & Pte.U:
        return False
    if info.RW and not flags & Pte.W:
        return False
    return not (info.ID and flags & Pte.NX)
