"""The rings that KVM fills in memory shared with userspace: dirty pages, coalesced writes."""

from __future__ import annotations

import ctypes
import mmap
from dataclasses import dataclass
from typing import Any

from kvm_ioctl.asm_kvm import KVM_DIRTY_LOG_PAGE_OFFSET
from kvm_ioctl.linux_kvm import (
    DirtyGfnFlags,
    kvm_coalesced_mmio,
    kvm_coalesced_mmio_ring,
    kvm_dirty_gfn,
)


def unmap(mapping: mmap.mmap) -> None:
    """Unmap; where someone still holds a view of it, leave that to the view's end."""
    try:
        mapping.close()
    except BufferError:
        # Unmapping under a live ctypes view would turn its next use into a SIGSEGV.
        return


@dataclass(frozen=True, slots=True)
class DirtyPage:
    """A page that the guest wrote: the slot (without address space) and the page within it."""

    as_id: int
    slot: int
    page: int


class DirtyRing:
    """The dirty ring of one vCPU.

    KVM marks entries dirty in order; ``harvest()`` takes them and marks them for
    KVM_RESET_DIRTY_RINGS, which write-protects their pages again.
    """

    def __init__(self, vcpu_fd: int, size_bytes: int) -> None:
        offset = KVM_DIRTY_LOG_PAGE_OFFSET * mmap.PAGESIZE
        self._mapping = mmap.mmap(vcpu_fd, size_bytes, offset=offset)
        self.capacity = size_bytes // ctypes.sizeof(kvm_dirty_gfn)
        self._entries: Any = (kvm_dirty_gfn * self.capacity).from_buffer(self._mapping)
        self._next = 0

    def harvest(self) -> list[DirtyPage]:
        """Take all entries that are dirty now."""
        pages = []
        dirty, reset = DirtyGfnFlags.KVM_DIRTY_GFN_F_DIRTY, DirtyGfnFlags.KVM_DIRTY_GFN_F_RESET
        for _ in range(self.capacity):
            entry = self._entries[self._next % self.capacity]
            if entry.flags & (dirty | reset) != dirty:
                break
            pages.append(DirtyPage(entry.slot >> 16, entry.slot & 0xFFFF, entry.offset))
            entry.flags = int(reset)
            self._next += 1
        return pages

    def close(self) -> None:
        """Unmap the ring; a second call does nothing."""
        self._entries = ()
        self.capacity = 0
        unmap(self._mapping)


@dataclass(frozen=True, slots=True)
class CoalescedWrite:
    """A guest write that KVM collected: to a port if ``pio``, else to memory."""

    address: int
    data: bytes
    pio: bool


class CoalescedRing:
    """The coalesced ring of a VM; every vCPU maps the same page."""

    def __init__(self, mapping: mmap.mmap, page_offset: int) -> None:
        offset = page_offset * mmap.PAGESIZE
        room = mmap.PAGESIZE - ctypes.sizeof(kvm_coalesced_mmio_ring)
        self.capacity = room // ctypes.sizeof(kvm_coalesced_mmio)
        self._ring: Any = kvm_coalesced_mmio_ring.from_buffer(mapping, offset)
        self._entries: Any = (kvm_coalesced_mmio * self.capacity).from_buffer(
            mapping, offset + ctypes.sizeof(kvm_coalesced_mmio_ring)
        )

    def drain(self) -> list[CoalescedWrite]:
        """Take all writes collected so far, oldest first."""
        first, last = self._ring.first, self._ring.last
        writes = []
        while first != last:
            entry = self._entries[first]
            data = bytes(entry.data)[: entry.len]
            writes.append(CoalescedWrite(entry.phys_addr, data, bool(entry.pio)))
            first = (first + 1) % self.capacity
        self._ring.first = first
        return writes
