"""Guest memory: anonymous mappings, one per slot, read and written by guest-physical address."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol, Self, TypeVar

from harness.machine.addresses import Gpa, Hva
from harness.machine.errors import GuestMemoryError
from harness.machine.memory_lock import MemoryLock
from kvm_ioctl.cstruct import CStruct

PAGE_SIZE = mmap.PAGESIZE
HUGE_PAGE_SIZE = 2 << 20
_ZERO_PAGE = bytes(PAGE_SIZE)
_HUGE_TRIES = 64

SMRAM_AS_ID = 1
"""The address space that a vCPU in SMM sees (KVM_CAP_MULTI_ADDRESS_SPACE)."""

T = TypeVar("T", bound=CStruct)


class SlotHost(Protocol):
    """The part of a VM that memory slots need."""

    def set_user_memory_region(
        self, slot: int, gpa: int, hva: int, size: int, flags: int = 0, as_id: int = 0
    ) -> None:
        """KVM_SET_USER_MEMORY_REGION."""

    def delete_memory_region(self, slot: int, as_id: int = 0) -> None:
        """The same with size 0."""


@dataclass(frozen=True)
class Slot:
    """One memory slot: where the guest sees which part of this process."""

    number: int
    gpa: Gpa
    size_bytes: int
    as_id: int
    backing: mmap.mmap
    flags: int = 0
    """KVM_MEM_*."""

    @property
    def end(self) -> Gpa:
        """The first address past the slot."""
        return Gpa(self.gpa + self.size_bytes)

    @property
    def hva(self) -> Hva:
        """Where the slot starts in this process."""
        return Hva(_address(self.backing))

    def __str__(self) -> str:
        return f"slot {self.number} (as_id {self.as_id}, {self.gpa:#x}-{self.end - 1:#x})"


SlotPage = tuple[int, int, int]
"""A page as KVM counts them: address space, slot number, page in the slot."""


class GuestMemory:
    """All memory slots of one VM; owns their mappings."""

    def __init__(self, vm: SlotHost) -> None:
        self._vm = vm
        self._slots: dict[tuple[int, int], Slot] = {}
        self.lock = MemoryLock()
        """Held for the time of an access; `lock.freeze` keeps others from changing anything."""
        self._written: set[SlotPage] | None = None

    def add(
        self,
        gpa: Gpa,
        size_bytes: int,
        *,
        as_id: int = 0,
        flags: int = 0,
        advice: Iterable[int] = (),
        huge: bool = False,
    ) -> Slot:
        """Give the guest fresh zeroed memory.

        Args:
            gpa: where the guest sees it, a multiple of the page size.
            size_bytes: a multiple of the page size.
            as_id: address space; 1 is what a vCPU in SMM sees.
            flags: KVM_MEM_*.
            advice: `mmap.MADV_*` values for the whole mapping.
            huge: make it of huge pages, if this machine has them.

        Raises GuestMemoryError: misaligned, empty, or in the way of another slot.
        Raises KvmError: KVM refused the slot.

        """
        with self.lock:
            self._check_place(gpa, size_bytes, as_id)
            backing = huge_mapping(gpa, size_bytes) if huge else _anonymous(size_bytes)
            try:
                for option in advice:
                    backing.madvise(option)
                return self._insert(gpa, as_id, flags, backing)
            except BaseException:
                backing.close()
                raise

    def alias(self, slot: Slot, *, as_id: int, gpa: Gpa | None = None, flags: int = 0) -> Slot:
        """Show a slot's memory a second time, as in the address space of SMM.

        Raises GuestMemoryError: something else is in the way.
        Raises KvmError: KVM refused the slot.
        """
        place = slot.gpa if gpa is None else gpa
        with self.lock:
            self._check_place(place, slot.size_bytes, as_id)
            return self._insert(place, as_id, flags, slot.backing)

    def remove(self, slot: Slot) -> None:
        """Take a slot away from the guest; its memory goes with its last slot."""
        with self.lock:
            self._vm.delete_memory_region(slot.number, as_id=slot.as_id)
            del self._slots[slot.as_id, slot.number]
            if all(other.backing is not slot.backing for other in self._slots.values()):
                slot.backing.close()

    def blink(self, gpa: Gpa, size_bytes: int) -> None:
        """Add a slot and remove it at once; nobody who asks for the slots sees it."""
        with self.lock:
            self.remove(self.add(gpa, size_bytes))

    def set_flags(self, slot: Slot, flags: int) -> Slot:
        """Change a slot's KVM_MEM_* flags while the guest uses it; return the slot as it is then.

        Raises KvmError: KVM refused them.
        """
        with self.lock.quick:
            changed = replace(slot, flags=flags)
            self._vm.set_user_memory_region(
                slot.number, slot.gpa, slot.hva, slot.size_bytes, flags=flags, as_id=slot.as_id
            )
            self._slots[slot.as_id, slot.number] = changed
        return changed

    def slots(self, as_id: int = 0) -> list[Slot]:
        """Return the slots of one address space, by address."""
        with self.lock.quick:
            found = [slot for slot in self._slots.values() if slot.as_id == as_id]
        return sorted(found, key=lambda slot: slot.gpa)

    def read(self, gpa: Gpa, size_bytes: int, as_id: int = 0) -> bytes:
        """Return bytes from guest memory; may cross slots that touch.

        Raises GuestMemoryError: some of it is in no slot.
        """
        with self.lock.quick:
            parts = [
                slot.backing[start : start + count]
                for slot, start, count in self._pieces(gpa, size_bytes, as_id, "read")
            ]
        return b"".join(parts)

    def write(self, gpa: Gpa, data: bytes | bytearray | memoryview, as_id: int = 0) -> None:
        """Write bytes to guest memory; nothing is written unless all of it fits.

        Waits while another thread has the memory frozen.

        Raises GuestMemoryError: some of it is in no slot.
        """
        done = 0
        with self.lock:
            for slot, start, count in list(self._pieces(gpa, len(data), as_id, "write")):
                slot.backing[start : start + count] = bytes(data[done : done + count])
                self._note_written(slot, start, count)
                done += count

    def zero(self, gpa: Gpa, size_bytes: int, as_id: int = 0) -> None:
        """Zero guest memory; pages that are zero stay untouched, and so unpopulated.

        Raises GuestMemoryError: some of it is in no slot.
        """
        with self.lock:
            for slot, start, count in list(self._pieces(gpa, size_bytes, as_id, "zero")):
                for at, size in _by_page(start, count):
                    if slot.backing[at : at + size] != _ZERO_PAGE[:size]:
                        slot.backing[at : at + size] = _ZERO_PAGE[:size]
                        self._note_written(slot, at, size)

    def read_int(self, gpa: Gpa, size_bytes: int, as_id: int = 0) -> int:
        """Return a little-endian integer from guest memory."""
        return int.from_bytes(self.read(gpa, size_bytes, as_id), "little")

    def write_int(self, gpa: Gpa, size_bytes: int, value: int, as_id: int = 0) -> None:
        """Write a little-endian integer to guest memory."""
        self.write(gpa, value.to_bytes(size_bytes, "little"), as_id)

    def read_struct(self, kind: type[T], gpa: Gpa, as_id: int = 0) -> T:
        """Return a copy of a struct in guest memory."""
        return kind.from_bytes(self.read(gpa, ctypes.sizeof(kind), as_id))

    def write_struct(self, gpa: Gpa, struct: CStruct, as_id: int = 0) -> None:
        """Write a struct to guest memory."""
        self.write(gpa, struct.as_bytes(), as_id)

    def add_slot(self, number: int, gpa: Gpa, as_id: int, flags: int, backing: mmap.mmap) -> Slot:
        """Show a mapping under a slot number of one's own choice; this memory owns it from now on.

        Raises GuestMemoryError: the place or the number is taken.
        Raises KvmError: KVM refused the slot.
        """
        with self.lock:
            self._check_place(gpa, len(backing), as_id)
            if (as_id, number) in self._slots:
                raise GuestMemoryError(f"slot {number} (as_id {as_id}) is taken")
            return self._insert(gpa, as_id, flags, backing, number)

    def all_slots(self) -> list[Slot]:
        """Return the slots of all address spaces, by space and number."""
        with self.lock.quick:
            return [self._slots[key] for key in sorted(self._slots)]

    def exchange(self, other: GuestMemory) -> None:
        """Swap slots, mappings and VM with another one; addresses mean the other's memory then."""
        with self.lock.quick, other.lock.quick:
            self._vm, other._vm = other._vm, self._vm
            self._slots, other._slots = other._slots, self._slots

    # What goes on while a machine is copied

    def track_writes(self) -> None:
        """Remember from now on which pages are written through this object.

        KVM does not: its dirty log has what the guest and KVM itself write.

        Raises GuestMemoryError: they are tracked already.
        """
        with self.lock.quick:
            if self._written is not None:
                raise GuestMemoryError("writes to this memory are being tracked already")
            self._written = set()

    def take_written(self) -> set[SlotPage]:
        """Return the pages written since the last call; empty if they are not tracked."""
        with self.lock.quick:
            written = self._written
            if not written:
                return set()
            self._written = set()
            return written

    def forget_writes(self) -> None:
        """End `track_writes`; nothing, if they are not tracked."""
        with self.lock.quick:
            self._written = None

    def _note_written(self, slot: Slot, start: int, size_bytes: int) -> None:
        if self._written is not None and size_bytes:
            pages = range(start // PAGE_SIZE, (start + size_bytes - 1) // PAGE_SIZE + 1)
            self._written.update((slot.as_id, slot.number, page) for page in pages)

    def close(self) -> None:
        """Unmap everything. The VM must be gone first, or it would use freed addresses."""
        backings = {id(slot.backing): slot.backing for slot in self._slots.values()}
        self._slots.clear()
        for backing in backings.values():
            backing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _insert(
        self, gpa: Gpa, as_id: int, flags: int, backing: mmap.mmap, number: int | None = None
    ) -> Slot:
        if number is None:
            used = {number for space, number in self._slots if space == as_id}
            number = next(n for n in range(len(used) + 1) if n not in used)
        slot = Slot(number, gpa, len(backing), as_id, backing, flags)
        self._vm.set_user_memory_region(
            number, slot.gpa, slot.hva, slot.size_bytes, flags=flags, as_id=as_id
        )
        self._slots[as_id, number] = slot
        return slot

    def _check_place(self, gpa: Gpa, size_bytes: int, as_id: int) -> None:
        what = f"slot at gpa {gpa:#x} of {size_bytes:#x} bytes (as_id {as_id})"
        if gpa < 0 or gpa % PAGE_SIZE or size_bytes % PAGE_SIZE or size_bytes <= 0:
            raise GuestMemoryError(f"{what}: address and size must be whole pages")
        for other in self.slots(as_id):
            if gpa < other.end and other.gpa < gpa + size_bytes:
                raise GuestMemoryError(f"{what} overlaps {other}")

    def _pieces(
        self, gpa: Gpa, size_bytes: int, as_id: int, verb: str
    ) -> Iterator[tuple[Slot, int, int]]:
        """Yield (slot, offset in it, bytes) over a range of guest memory."""
        at, end = int(gpa), gpa + size_bytes
        if size_bytes < 0:
            raise GuestMemoryError(f"{verb} of {size_bytes} bytes at gpa {gpa:#x}")
        while at < end:
            slot = next((s for s in self.slots(as_id) if s.gpa <= at < s.end), None)
            if slot is None:
                raise GuestMemoryError(
                    f"{verb} of {size_bytes:#x} bytes at gpa {gpa:#x} (as_id {as_id}): "
                    f"no slot at {at:#x}{self._nearest(at, as_id)}"
                )
            count = min(end, slot.end) - at
            yield slot, at - slot.gpa, count
            at += count

    def _nearest(self, gpa: int, as_id: int) -> str:
        slots = self.slots(as_id)
        if not slots:
            return ", there are no slots"
        nearest = min(slots, key=lambda s: min(abs(s.gpa - gpa), abs(s.end - 1 - gpa)))
        return f", nearest is {nearest}"


def _anonymous(size_bytes: int) -> mmap.mmap:
    return mmap.mmap(-1, size_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def huge_mapping(gpa: int, size_bytes: int) -> mmap.mmap:
    """Return memory that KVM can map by huge pages: as far from such a boundary as `gpa` is.

    (kvm_alloc_memslot_metadata: others count as disallow_lpage.) There is no way to ask for an
    address, but mappings lie one below the other: one that fills the gap moves the next one down.
    Where holes are left between older mappings it takes some more; without luck it is only slower.
    """
    with contextlib.ExitStack() as fillers:
        for _ in range(_HUGE_TRIES):
            backing = _anonymous(size_bytes)
            start = _address(backing)
            if (start - gpa) % HUGE_PAGE_SIZE == 0:
                break
            # It fills its hole, and the gap is to the place below it where the next one would fit.
            fillers.enter_context(backing)
            if gap := (start - size_bytes - gpa) % HUGE_PAGE_SIZE:
                fillers.enter_context(_anonymous(gap))
        else:
            backing = _anonymous(size_bytes)
    with contextlib.suppress(OSError):  # a kernel without transparent huge pages
        backing.madvise(mmap.MADV_HUGEPAGE)
    return backing


def _address(backing: mmap.mmap) -> int:
    # The c_char is dropped at once: as long as it lives, the mapping cannot be closed.
    return ctypes.addressof(ctypes.c_char.from_buffer(backing))


def _by_page(start: int, size_bytes: int) -> Iterator[tuple[int, int]]:
    """Split a range at page boundaries into (start, bytes)."""
    end = start + size_bytes
    while start < end:
        count = min(PAGE_SIZE - start % PAGE_SIZE, end - start)
        yield start, count
        start += count
