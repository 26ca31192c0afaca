"""Probe: the memory controller's kernel counters, in a cgroup of this process's own.

Kernel memory is charged to the thread that asks for it, so the whole process moves into a cgroup of
its own for as long as the probe is armed, and back again afterwards.

Which counter depends on the kernel and on the hierarchy that is mounted:

- cgroup v2, `memory.stat: kernel` (6.1 has it, 5.10 has not). Read after enough of this cgroup's
  statistics have changed to force a flush: from 6.12 on a plain reader otherwise sees figures up to
  two seconds old (`mem_cgroup_flush_stats`, threshold `MEMCG_CHARGE_BATCH` per CPU).
- cgroup v2 without that line: `memory.current` less this process's own pages, which are counted in
  its page tables (the line `anon` lags by up to 32 pages per CPU). It is charged in batches per
  CPU, so the batches are drained first, which a lowered `memory.high` does on the way.
- cgroup v1: `memory.kmem.usage_in_bytes`, charged page by page.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import re
import time
from pathlib import Path

from harness.errors import HostError
from harness.machine.guest_abi import PAGE_SIZE
from harness.probe.interruption import Borrowed
from harness.probe.tracefs import write

_MCL_CURRENT = 1  # asm-generic/mman.h
_libc = ctypes.CDLL(None, use_errno=True)

#: More pages than any flush threshold seen: 64 per CPU.
_CHURN_PAGES_PER_CPU = 128
_EMPTY_DEADLINE_S = 5.0
_PREFIX = "nsvm-"


def mount_point() -> tuple[Path, int]:
    """Return the memory controller's hierarchy and its version, 1 or 2.

    Raises:
        HostError: the controller is not mounted.
    """
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, options, *_ = line.split()
        if kind == "cgroup" and "memory" in options.split(","):
            return Path(where), 1
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, *_ = line.split()
        if kind == "cgroup2":
            controllers = Path(where, "cgroup.controllers").read_text().split()
            if "memory" in controllers:
                return Path(where), 2
    raise HostError("no cgroup memory controller is mounted (neither v1 nor v2)")


def _own_cgroup(version: int) -> str:
    """Return this process's cgroup path in the memory controller's hierarchy."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if (version == 2 and not controllers) or "memory" in controllers.split(","):
            return path
    raise HostError("/proc/self/cgroup does not name a memory cgroup")


class Cgroup(Borrowed):
    """A memory cgroup for this process; a context manager that moves it there and back."""

    def __init__(self, label: str = "mem") -> None:
        self._root, self.version = mount_point()
        self._home = self._root / _own_cgroup(self.version).lstrip("/")
        self.path = self._root / f"{_PREFIX}{label}-{os.getpid()}"
        self._made = False

    def _borrow(self) -> None:
        remove_leftovers(self._root)
        try:
            self.path.mkdir()
        except OSError as e:
            raise HostError(f"cgroup {self.path}: {e.strerror} (root needed)") from e
        self._made = True
        if self.version == 2 and not (self.path / "memory.current").exists():
            raise HostError(
                f"{self._root}/cgroup.subtree_control does not enable the memory controller"
            )
        write(self.path / "cgroup.procs", str(os.getpid()))

    def _give_back(self) -> None:
        if not self._made:
            return
        self._made = False
        self.step_out()
        self._remove()

    def _remove(self) -> None:
        deadline = time.monotonic() + _EMPTY_DEADLINE_S
        while True:
            try:
                self.path.rmdir()
                return
            except OSError as e:
                if time.monotonic() > deadline:
                    raise HostError(f"cgroup {self.path} cannot be removed: {e.strerror}") from e
                time.sleep(0.01)

    def step_out(self) -> None:
        """Move the calling process, a child of the one inside, back to where that came from."""
        write(self._home / "cgroup.procs", str(os.getpid()))

    def stat(self) -> dict[str, int]:
        """Return ``memory.stat``, in bytes (v1: in the kernel's own mixture)."""
        lines = (self.path / "memory.stat").read_text().splitlines()
        return {key: int(value) for key, value in (line.split() for line in lines)}

    def value(self, name: str) -> int:
        """Return a one-number control file."""
        return int((self.path / name).read_text())


def remove_leftovers(root: Path) -> None:
    """Remove the cgroups of processes of ours that no longer exist."""
    for path in root.glob(f"{_PREFIX}*-*"):
        if path.is_dir() and not Path("/proc", path.name.rpartition("-")[2]).exists():
            with contextlib.suppress(OSError):
                path.rmdir()


def own_all_pages() -> None:
    """Make every writable page of this process its own, and lock it.

    Pages are shared with the process that this one was forked from; the copy that a later write
    makes would be charged in the middle of a measurement, or, under memory pressure, not be had at
    all.

    Raises:
        HostError: the kernel refuses (RLIMIT_MEMLOCK, when not root).
    """
    if _libc.mlockall(_MCL_CURRENT):
        raise HostError(f"mlockall: {os.strerror(ctypes.get_errno())}")


def disown_pages() -> None:
    """Unlock what `own_all_pages` locked."""
    _libc.munlockall()


class MemcgProbe(Borrowed):
    """Counts kernel memory by the memory controller's books."""

    name = "memcg"

    def __init__(self) -> None:
        self.cgroup = Cgroup()
        self._source = ""

    def _borrow(self) -> None:
        self.cgroup.__enter__()
        if self.cgroup.version == 1:
            self._source = "memory.kmem.usage_in_bytes"
        elif "kernel" in self.cgroup.stat():
            self._source = "memory.stat"
        else:
            self._source = "memory.current"
            own_all_pages()

    def _give_back(self) -> None:
        if self._source == "memory.current":
            disown_pages()
        self.cgroup.__exit__(None, None, None)

    @property
    def source(self) -> str:
        """Which counter is read."""
        return self._source

    def read_bytes(self) -> int:
        """Return the kernel memory charged to this process's cgroup."""
        if self._source == "memory.kmem.usage_in_bytes":
            return self.cgroup.value(self._source)
        if self._source == "memory.stat":
            self._churn()
            return self.cgroup.stat()["kernel"]
        self._churn()
        self._drain()
        return self.cgroup.value("memory.current") - _user_bytes()

    def resolution_bytes(self) -> int:
        """Return the error of one reading.

        Page-exact counters still see slab pages come and go under the caches that all share, and
        `memory.current` the user pages between two of its lines.
        """
        return 4 * PAGE_SIZE if self._source == "memory.current" else 2 * PAGE_SIZE

    def _churn(self) -> None:
        """Change this cgroup's statistics enough that the kernel flushes them for a reader."""
        size = _CHURN_PAGES_PER_CPU * PAGE_SIZE * (os.cpu_count() or 1)
        with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as pages:
            for offset in range(0, size, PAGE_SIZE):
                pages[offset] = 1

    def _drain(self) -> None:
        current = self.cgroup.value("memory.current")
        write(self.cgroup.path / "memory.high", str(max(0, current - PAGE_SIZE)))
        write(self.cgroup.path / "memory.high", "max")


def _user_bytes() -> int:
    """Return the size of this process's anonymous memory, page by page as it is mapped."""
    rollup = Path("/proc/self/smaps_rollup").read_text()
    kib = re.search(r"^Anonymous:\s+(\d+) kB", rollup, re.M)
    if kib is None:
        raise HostError("/proc/self/smaps_rollup has no line Anonymous")
    return int(kib[1]) << 10
