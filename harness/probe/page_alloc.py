"""Probe: the page allocator's own events, with the call sites.

Events `kmem:mm_page_alloc` and `kmem:mm_page_free` with kernel stacks, kept as a ledger by page
frame number. Counted is what this process allocated below an ioctl on a KVM file descriptor, slab
pages excepted: those are shared caches, and grow when they please. Frees count whoever does them:
KVM leaves some to RCU and to workers.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from harness.errors import HarnessError
from harness.machine.guest_abi import PAGE_SIZE
from harness.probe.interruption import Borrowed
from harness.probe.tracefs import TraceEvent, TraceInstance, own_threads

#: Where userspace enters KVM; the same names from 5.10 to 7.3.
_ENTRIES = {"kvm_vcpu_ioctl", "kvm_vm_ioctl", "kvm_dev_ioctl"}
#: Entries for exceptions and interrupts (asm_exc_page_fault, asm_sysvec_apic_timer_interrupt, ...).
_INTERRUPTED = "asm_"
_SLAB = re.compile(r"^(allocate_slab|new_slab|___slab_alloc)$")
#: Who allocates nested state; either may be missing from a stack that has the other.
_NESTED = {"svm_set_efer", "svm_allocate_nested"}
#: Frames of the tracer and of the allocator itself, passed over to find who asked for memory.
_ALLOCATOR = re.compile(
    r"^(trace_event_raw_event_|__?alloc_|alloc_pages|__?get_free_pages|get_zeroed_page|__?folio_alloc|"
    r"__?kmalloc|___kmalloc|kmem_cache_|__?vmalloc|vzalloc|__kvmalloc|kvmalloc|___?alloc|post_alloc)"
)


@dataclass(frozen=True)
class CallSite:
    """Who asked for a block: the function, the block's order, and the callers up to the ioctl."""

    function: str
    order: int
    via: tuple[str, ...]

    @property
    def size_bytes(self) -> int:
        """Size of one block."""
        return PAGE_SIZE << self.order

    @property
    def is_nested(self) -> bool:
        """Asked for below EFER's setter, or below what allocates nested state: nothing else is.

        RSM back into L2 calls `svm_allocate_nested` without the setter.
        """
        return not _NESTED.isdisjoint((self.function, *self.via))


def call_site(event: TraceEvent) -> CallSite | None:
    """Return the KVM call site of an allocation; None if it is not KVM's, or only for slab.

    It is not KVM's if what asked had interrupted KVM's ioctl: an interrupt, or a fault on this
    process's own memory while KVM copied from or to it.
    """
    entry = next((n for n, frame in enumerate(event.stack) if frame in _ENTRIES), None)
    if entry is None or any(_SLAB.match(frame) for frame in event.stack):
        return None
    if any(frame.startswith(_INTERRUPTED) for frame in event.stack[:entry]):
        return None
    inner = [frame for frame in event.stack[: entry + 1] if not _ALLOCATOR.match(frame)]
    return CallSite(inner[0], int(event.fields["order"]), tuple(inner[1:]))


class PageAllocProbe(Borrowed):
    """Counts pages one by one; exact, as long as no event is lost."""

    name = "page_alloc"

    def __init__(self) -> None:
        self._trace = TraceInstance("pages", stacks=True, all_tasks=True)
        self._threads = own_threads()
        self._held: dict[int, CallSite] = {}
        #: Every allocation seen since arming, freed or not.
        self.sites: Counter[CallSite] = Counter()
        #: Allocations that the kernel refused.
        self.refused: Counter[CallSite] = Counter()

    def _borrow(self) -> None:
        self._trace.__enter__()
        for event in ("kmem/mm_page_alloc", "kmem/mm_page_free"):
            self._trace.enable(event)

    def _give_back(self) -> None:
        self._trace.__exit__(None, None, None)

    def _update(self) -> None:
        self._threads |= own_threads()
        for event in self._trace.take():
            if event.name == "mm_page_alloc":
                if event.tid not in self._threads:
                    continue
                if not event.stack:
                    raise HarnessError("an allocation event came without its stack")
                if not (site := call_site(event)):
                    continue
                # A failed allocation is an event too, of page frame 0, which is never given out.
                if not int(event.fields["pfn"], 0):
                    self.refused[site] += 1
                    continue
                self._held[int(event.fields["pfn"], 0)] = site
                self.sites[site] += 1
            elif event.name == "mm_page_free":
                self._held.pop(int(event.fields["pfn"], 0), None)

    def read_bytes(self) -> int:
        """Return the bytes of all blocks that were allocated since arming and not freed."""
        self._update()
        return sum(site.size_bytes for site in self._held.values())

    def held_sites(self) -> Counter[CallSite]:
        """Return who holds how many blocks at this moment."""
        self._update()
        return Counter(self._held.values())

    def resolution_bytes(self) -> int:
        """Return 0: every block is seen."""
        return 0
