"""What a guest costs the level that has it, told whenever it or a deeper one comes to a new stage.

Every level counts its own guest: the host L1, L1's kernel L2, and so on. So the table has each VM
once, in the books of the kernel that runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final

from harness.errors import HostError
from harness.probe.memcg import Cgroup
from harness.probe.nested_vcpus import BYTES_PER_VCPU, NestedVcpus

COUNTED: Final = ("anon", "kernel", "sec_pagetables", "pagetables", "slab")
"""Lines of memory.stat (Documentation/admin-guide/cgroup-v2.rst), in bytes. `anon` is the guests'
memory, `sec_pagetables` (Linux 6.1) KVM's own page tables for it, shadow pages for nested guests
among them, which `kernel` (Linux 5.18) includes. Older kernels leave some out."""

MAPPED: Final = ("pages_4k", "pages_2m", "mmu_cache_miss", "mmu_shadow_zapped", "mmu_pte_write")
"""Of KVM's statistics of a VM (struct kvm_vm_stat, Linux 5.14): pages that are mapped, shadow pages
made and thrown away, writes of the guest's to tables that are shadowed."""

Counts = Callable[[], dict[str, int]]
Tell = Callable[[dict[str, Any], Counts], None]


@contextmanager
def host_memory(emit: Callable[..., None], vm: int) -> Iterator[Tell]:
    """Count what this process's VM costs; to be entered before there is one.

    Args:
        emit: gets the `memory` events.
        vm: the level of the guest in it.

    Yields what takes the data of a stage, and what returns KVM's statistics then.

    Raises HostError: there is no memory controller, or it may not be used.

    """
    with ExitStack() as stack:
        # First, or its buffers would be counted.
        nested = _if_possible(stack, NestedVcpus())
        cgroup = stack.enter_context(Cgroup("nest"))

        def tell(stage: dict[str, Any], counts: Counts) -> None:
            stat, mapped = cgroup.stat(), counts()
            having = None if nested is None else nested.count()
            emit(
                "memory",
                vm=vm,
                level=stage["level"],
                what=stage["what"],
                **({} if having is None else {"nested_bytes": having * BYTES_PER_VCPU}),
                **{name: stat[name] for name in COUNTED if name in stat},
                **{name: mapped[name] for name in MAPPED if name in mapped},
            )

        yield tell


def _if_possible(stack: ExitStack, probe: NestedVcpus) -> NestedVcpus | None:
    """Return the probe, armed; None if this kernel has no function events."""
    try:
        return stack.enter_context(probe)
    except HostError:
        return None
