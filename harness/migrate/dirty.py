"""Which pages of a running machine were written: by its guest, by KVM, and by userspace."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from enum import Enum
from typing import Final

from harness.machine.errors import MachineError
from harness.machine.machine import Machine
from harness.machine.memory import PAGE_SIZE, Slot, SlotPage
from harness.migrate.shape import backings_of
from kvm_ioctl.capabilities import Cap
from kvm_ioctl.linux_kvm import DirtyLogProtect, MemFlags

DirtyPages = dict[int, set[int]]
"""Page numbers by the number of their mapping (`Shape.backings`)."""

_PIECE_BYTES: Final = 512
_NOTHING: Final = bytes(_PIECE_BYTES)
"""A piece of a bitmap without a bit; most are, and comparing is the fastest way to find out."""
_NOT_ZERO: Final = re.compile(rb"[^\0]+")
"""Finds the few bytes of a piece that say anything."""
_BITS: Final = tuple(tuple(n for n in range(8) if byte >> n & 1) for byte in range(256))
"""The numbers of the bits that are set, by byte."""

SlotPages = tuple[int, int, Iterable[int]]
"""The address space, the number of a slot, and pages in it."""


class Tracking(Enum):
    """How KVM says which pages were written."""

    LOG = "log"
    """A bitmap per slot: KVM_GET_DIRTY_LOG, and KVM_CLEAR_DIRTY_LOG where it is offered."""
    RING = "ring"
    """A ring per vCPU, which the machine must have been made with (`dirty_ring_bytes`)."""


class DirtyTracker(ABC):
    """Tracks the writes to a machine's memory for the time of a `with`.

    Slots that show the same mapping are one memory: what is written through either of them, as in
    the address space of SMM, is found under their mapping.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._flags: dict[tuple[int, int], int] = {}
        self._backings: dict[tuple[int, int], int] = {}

    def __enter__(self) -> DirtyTracker:
        """Begin.

        Raises GuestMemoryError: the machine is being tracked already.
        Raises KvmError: KVM refused to log.
        """
        self.machine.memory.track_writes()
        try:
            self._switch(True)
            self._flag_slots()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End, with slots and VM as they were."""
        try:
            for slot in self._tracked():
                self.machine.memory.set_flags(slot, self._flags.pop((slot.as_id, slot.number)))
            self._switch(False)
        finally:
            self.machine.memory.forget_writes()

    def collect(self) -> DirtyPages:
        """Return the pages written since the last call, or since the beginning.

        What is read of them after this is what they held now or later; a later write is found by
        the next call.

        Raises MachineError: one is in a slot that was not there when this began.
        """
        pages: DirtyPages = {}
        self._add(pages, self._take())
        self._add(pages, _by_one(self.machine.memory.take_written()))
        return pages

    def _flag_slots(self) -> None:
        numbers = {id(backing): n for n, backing in enumerate(backings_of(self.machine))}
        for slot in self.machine.memory.all_slots():
            key = slot.as_id, slot.number
            self._backings[key] = numbers[id(slot.backing)]
            self._flags[key] = slot.flags
            self.machine.memory.set_flags(slot, slot.flags | MemFlags.KVM_MEM_LOG_DIRTY_PAGES)

    def _tracked(self) -> list[Slot]:
        slots = self.machine.memory.all_slots()
        return [slot for slot in slots if (slot.as_id, slot.number) in self._flags]

    def _add(self, pages: DirtyPages, written: Iterable[SlotPages]) -> None:
        for as_id, number, some in written:
            backing = self._backings.get((as_id, number))
            if backing is None:
                raise MachineError(f"slot {number} (as_id {as_id}) came while pages were tracked")
            pages.setdefault(backing, set()).update(some)

    @abstractmethod
    def _switch(self, on: bool) -> None:
        """Tell the VM what is coming, or take that back."""

    @abstractmethod
    def _take(self) -> Iterable[SlotPages]:
        """Return what KVM found, and have it begin anew."""


class DirtyLog(DirtyTracker):
    """Asks for bitmaps.

    With KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 reading them changes nothing, and only what was read is
    write-protected again; without it, KVM does both at once for the whole slot.
    """

    def __init__(self, machine: Machine, *, manual: bool | None = None) -> None:
        """Choose how.

        Args:
            machine: whose memory.
            manual: use KVM_CLEAR_DIRTY_LOG; by default, where it is offered.

        Raises MachineError: the machine has dirty rings, or `manual` cannot be had.

        """
        super().__init__(machine)
        if machine.dirty_rings is not None:
            raise MachineError("a machine with dirty rings has no dirty log")
        offered = machine.vm.check_extension(Cap.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2)
        can = bool(offered & DirtyLogProtect.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE)
        if manual and not can:
            raise MachineError("this kernel has no KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2")
        self.manual = can if manual is None else manual

    def _switch(self, on: bool) -> None:
        if self.manual:
            how = DirtyLogProtect.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE if on else 0
            self.machine.vm.enable_cap(Cap.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, args=(how,))

    def _take(self) -> Iterator[SlotPages]:
        vm = self.machine.vm
        for slot in self._tracked():
            count = slot.size_bytes // PAGE_SIZE
            bitmap = vm.get_dirty_log(slot.number, count, slot.as_id)
            if bitmap.count(0) == len(bitmap):
                continue
            if self.manual:
                vm.clear_dirty_log(slot.number, bitmap, count, as_id=slot.as_id)
            yield slot.as_id, slot.number, set_bits(bitmap)


class DirtyRing(DirtyTracker):
    """Empties the machine's dirty rings."""

    def __init__(self, machine: Machine) -> None:
        """Take the machine's rings.

        Raises MachineError: it has none.
        """
        super().__init__(machine)
        if machine.dirty_rings is None:
            raise MachineError("the machine has no dirty rings: make it with dirty_ring_bytes=...")
        self._rings = machine.dirty_rings

    def _switch(self, on: bool) -> None:
        # What is still queued is of the time before, or for nobody.
        self._rings.take()

    def _take(self) -> Iterable[SlotPages]:
        return _by_one(self._rings.take())


def tracker_of(machine: Machine, tracking: Tracking | None = None) -> DirtyTracker:
    """Return a tracker of a kind; by default of the one that the machine was made for.

    Raises MachineError: the machine was made for the other one.
    """
    if tracking is None:
        tracking = Tracking.LOG if machine.dirty_rings is None else Tracking.RING
    return DirtyLog(machine) if tracking is Tracking.LOG else DirtyRing(machine)


def _by_one(pages: Iterable[SlotPage]) -> Iterator[SlotPages]:
    for as_id, number, page in pages:
        yield as_id, number, (page,)


def set_bits(bitmap: bytes | bytearray) -> Iterator[int]:
    """Yield the numbers of the bits that are set, in ascending order; bit 0 of byte 0 is 0."""
    for at in range(0, len(bitmap), _PIECE_BYTES):
        piece = bitmap[at : at + _PIECE_BYTES]
        if piece == _NOTHING[: len(piece)]:
            continue
        for found in _NOT_ZERO.finditer(piece):
            first = 8 * (at + found.start())
            some = enumerate(found[0])
            yield from [first + 8 * n + bit for n, byte in some for bit in _BITS[byte]]


def count(pages: DirtyPages) -> int:
    """Return how many pages there are."""
    return sum(map(len, pages.values()))


def join(pages: DirtyPages, more: DirtyPages) -> None:
    """Add pages to others."""
    for number, found in more.items():
        pages.setdefault(number, set()).update(found)
