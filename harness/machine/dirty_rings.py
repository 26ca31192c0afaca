"""The dirty rings of a VM: which pages its vCPUs wrote, as KVM queues them per vCPU."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from harness.machine.errors import MachineError
from harness.machine.memory import SlotPage
from kvm_ioctl.capabilities import Cap
from kvm_ioctl.handles import Vcpu, Vm


def enable_dirty_rings(vm: Vm, size_bytes: int) -> None:
    """Have dirty pages of a VM without vCPUs queued in rings instead of the dirty log.

    From then on KVM_GET_DIRTY_LOG is refused (ENXIO), and a page that KVM writes for no vCPU is
    queued nowhere (mark_page_dirty_in_slot warns of it). Saving and restoring nested state writes
    no guest memory, and everything else that does is a vCPU's work. Linux 5.10 has no rings.

    Raises MachineError: this kernel has no rings, or none so long.
    """
    most = vm.check_extension(Cap.KVM_CAP_DIRTY_LOG_RING_ACQ_REL) or vm.check_extension(
        Cap.KVM_CAP_DIRTY_LOG_RING
    )
    if not most:
        raise MachineError("this kernel has no dirty rings (KVM_CAP_DIRTY_LOG_RING)")
    if size_bytes > most:
        raise MachineError(f"a dirty ring of {size_bytes} bytes; this kernel has {most} at most")
    vm.enable_dirty_ring(size_bytes)


class DirtyRings:
    """The rings of all vCPUs, emptied by any thread, also when KVM says that one is full."""

    def __init__(self, vm: Vm, vcpus: Sequence[Vcpu], size_bytes: int) -> None:
        self.size_bytes = size_bytes
        """Of each vCPU's ring."""
        self.times_full = 0
        """How often KVM_EXIT_DIRTY_RING_FULL was answered."""
        self._vm = vm
        self._rings = [vcpu.map_dirty_ring(size_bytes) for vcpu in vcpus]
        self._lock = threading.Lock()
        self._pages: set[SlotPage] = set()

    def answer_full(self) -> None:
        """Make room, as KVM_EXIT_DIRTY_RING_FULL asks for."""
        with self._lock:
            self.times_full += 1
            self._harvest()

    def take(self) -> set[SlotPage]:
        """Return the pages written since the last call.

        They are write-protected again when this returns: what is read of them from then on is what
        they held, or is queued once more.
        """
        with self._lock:
            self._harvest()
            pages, self._pages = self._pages, set()
            return pages

    def _harvest(self) -> None:
        found = [page for ring in self._rings for page in ring.harvest()]
        self._pages.update((page.as_id, page.slot, page.page) for page in found)
        if found:
            self._vm.reset_dirty_rings()
