"""Which pages of a running machine were written: by its guest, by KVM, and by userspace."""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Final

from harness.machine.errors import MachineError
from harness.machine.machine import Machine
from harness.machine.memory import PAGE_SIZE, Slot, SlotPage
from harness.migrate.memory_image import (
    CHUNK_BYTES,
    PageBits,
    bits_of_pages,
    count_of_bits,
    join_bits,
)
from harness.migrate.shape import backings_of
from kvm_ioctl.capabilities import Cap
from kvm_ioctl.handles import Vm
from kvm_ioctl.linux_kvm import DirtyLogProtect, MemFlags, kvm_clear_dirty_log, kvm_dirty_log
from kvm_ioctl.vm import dirty_bitmap_bytes, slot_id

DirtyPages = dict[int, PageBits]
"""By the number of their mapping (`Shape.backings`)."""

_MUCH_BYTES: Final = 8 * CHUNK_BYTES
_NOTHING: Final = bytes(_MUCH_BYTES)
"""A piece of a bitmap without a bit; most are, and comparing is the fastest way to find out."""

SlotPages = tuple[int, int, PageBits]
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

    def collect(self, *, last: bool = False) -> DirtyPages:
        """Return the pages written since the last call, or since the beginning.

        What is read of them after this is what they held now or later; a later write is found by
        the next call.

        Args:
            last: there is no next call, which saves time.

        Raises MachineError: one is in a slot that was not there when this began.

        """
        pages: DirtyPages = {}
        self._add(pages, self._take(last))
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
            join_bits(pages.setdefault(backing, {}), some)

    @abstractmethod
    def _switch(self, on: bool) -> None:
        """Tell the VM what is coming, or take that back."""

    @abstractmethod
    def _take(self, last: bool) -> Iterable[SlotPages]:
        """Return what KVM found, and have it begin anew unless this is the last time."""


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

    def _flag_slots(self) -> None:
        super()._flag_slots()
        self._logs = [_Log.of(self.machine.vm, slot) for slot in self._tracked()]

    def _take(self, last: bool) -> Iterator[SlotPages]:
        there = {(slot.as_id, slot.number) for slot in self._tracked()}
        for log in self._logs:
            if log.key not in there:
                continue
            if found := log.read():
                if self.manual and not last:
                    log.clear()
                yield *log.key, found


@dataclass(frozen=True)
class _Log:
    """The dirty log of one slot, ready to be read again and again."""

    key: tuple[int, int]
    """The address space and the number of the slot."""
    bitmap: bytearray
    get: Callable[[], int]
    clear: Callable[[], int]
    """Has what was read write-protected again."""

    @classmethod
    def of(cls, vm: Vm, slot: Slot) -> _Log:
        """Return that of a slot; KVM is asked nothing yet."""
        pages = slot.size_bytes // PAGE_SIZE
        bitmap = bytearray(dirty_bitmap_bytes(pages))
        at = ctypes.addressof(ctypes.c_char.from_buffer(bitmap))
        number = slot_id(slot.number, slot.as_id)
        get = kvm_dirty_log(slot=number, dirty_bitmap=at)
        clear = kvm_clear_dirty_log(slot=number, num_pages=pages, dirty_bitmap=at)
        return cls(
            (slot.as_id, slot.number),
            bitmap,
            vm.bind(vm.KVM_GET_DIRTY_LOG, get),
            vm.bind(vm.KVM_CLEAR_DIRTY_LOG, clear),
        )

    def read(self) -> PageBits:
        """Return the pages that were written."""
        self.get()
        return bits_of(self.bitmap)


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

    def _take(self, last: bool) -> Iterable[SlotPages]:
        return _by_one(self._rings.take())


def tracker_of(machine: Machine, tracking: Tracking | None = None) -> DirtyTracker:
    """Return a tracker of a kind; by default of the one that the machine was made for.

    Raises MachineError: the machine was made for the other one.
    """
    if tracking is None:
        tracking = Tracking.LOG if machine.dirty_rings is None else Tracking.RING
    return DirtyLog(machine) if tracking is Tracking.LOG else DirtyRing(machine)


def _by_one(pages: Iterable[SlotPage]) -> Iterator[SlotPages]:
    """Put the pages of each slot together."""
    by_slot: dict[tuple[int, int], list[int]] = {}
    for as_id, number, page in pages:
        by_slot.setdefault((as_id, number), []).append(page)
    for key, some in by_slot.items():
        yield *key, bits_of_pages(some)


def bits_of(bitmap: bytes | bytearray) -> PageBits:
    """Return the pages of a bitmap; page 0 is bit 0 of byte 0."""
    found: PageBits = {}
    for much in range(0, len(bitmap), _MUCH_BYTES):
        piece = bitmap[much : much + _MUCH_BYTES]
        if piece == _NOTHING[: len(piece)]:
            continue
        for at in range(0, len(piece), CHUNK_BYTES):
            if bits := int.from_bytes(piece[at : at + CHUNK_BYTES], "little"):
                found[(much + at) // CHUNK_BYTES] = bits
    return found


def count(pages: DirtyPages) -> int:
    """Return how many pages there are."""
    return sum(map(count_of_bits, pages.values()))


def join(pages: DirtyPages, more: DirtyPages) -> None:
    """Add pages to others."""
    for number, found in more.items():
        join_bits(pages.setdefault(number, {}), found)
