"""What a tower costs the host, told whenever one of its levels comes to a new stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from harness.probe.memcg import Cgroup

COUNTED: Final = ("anon", "kernel", "sec_pagetables", "pagetables", "slab")
"""Lines of memory.stat (Documentation/admin-guide/cgroup-v2.rst), in bytes. `anon` is the guests'
memory, `sec_pagetables` (Linux 6.1) KVM's own page tables for it, which `kernel` (Linux 5.18)
includes. Older kernels leave some out."""


@contextmanager
def host_memory(emit: Callable[..., None]) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Have this process in a memory cgroup of its own; yield what takes the data of stages.

    Raises HostError: there is no memory controller, or it may not be used.
    """
    with Cgroup("nest") as cgroup:

        def tell(stage: dict[str, Any]) -> None:
            stat = cgroup.stat()
            sizes = {name: stat[name] for name in COUNTED if name in stat}
            emit("memory", level=stage["level"], what=stage["what"], **sizes)

        yield tell
