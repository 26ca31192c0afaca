"""Makes kernel allocations fail on a stock kernel: a memory cgroup that may not grow.

Fault injection is off in distribution kernels; the memory controller is not. The process under test
sits in a cgroup whose `memory.max` a helper outside sets to what it holds at that moment.
Allocations that are charged to it (GFP_KERNEL_ACCOUNT) then fail with -ENOMEM as soon as the
charges cached per CPU are used up, and `oom_score_adj` keeps the OOM killer from ending the test
instead.
"""

from __future__ import annotations

import gc
import os
import select
import signal
from pathlib import Path
from typing import Self

from harness.errors import HostError
from harness.probe.memcg import Cgroup, disown_pages, own_all_pages
from harness.probe.tracefs import write

_OOM_SCORE_ADJ = Path("/proc/self/oom_score_adj")
_NEVER = "-1000"

#: The helper lifts the limit by itself after so long: this process may be waiting for a page of its
#: own.
LIFT_S = 15.0
_ANSWER_S = 10.0

#: What the kernel logs while allocations are refused; for scenarios that mean it.
BENIGN = (r"Memory cgroup out of memory", r"invoked oom-killer", r"Out of memory and no killable")


class MemoryPressure:
    """A context manager within an entered cgroup; `apply` and `lift` may be used repeatedly."""

    def __init__(self, cgroup: Cgroup) -> None:
        if cgroup.version != 2:
            raise HostError("memory pressure needs a cgroup v2 memory controller")
        self._cgroup = cgroup
        self._old_adjustment = ""
        self._helper = 0
        self._orders = self._answers = -1

    def __enter__(self) -> Self:
        self._old_adjustment = _OOM_SCORE_ADJ.read_text()
        write(_OOM_SCORE_ADJ, _NEVER)
        orders, self._orders = os.pipe()
        self._answers, answers = os.pipe()
        self._helper = os.fork()
        if self._helper == 0:
            os.close(self._orders)
            os.close(self._answers)
            _help(self._cgroup, orders, answers)
        os.close(orders)
        os.close(answers)
        return self

    def __exit__(self, *_: object) -> None:
        gc.enable()
        os.close(self._orders)
        os.close(self._answers)
        os.waitpid(self._helper, 0)
        write(_OOM_SCORE_ADJ, self._old_adjustment)

    def _order(self, what: bytes) -> None:
        os.write(self._orders, what)
        if not select.select([self._answers], [], [], _ANSWER_S)[0]:
            raise HostError(f"the helper did not set memory.max within {_ANSWER_S:.0f} s")
        if os.read(self._answers, 1) != b"y":
            raise HostError(f"memory.max of {self._cgroup.path} could not be set")

    def apply(self) -> None:
        """Allow not a page more from now on, for `LIFT_S` seconds at most.

        This process must touch no new memory of its own until `lift`: run the same code once
        before.
        """
        gc.collect()
        gc.disable()
        own_all_pages()
        self._order(b"a")

    def lift(self) -> None:
        """Allow anything again."""
        self._order(b"l")
        disown_pages()
        gc.enable()

    def oom_events(self) -> dict[str, int]:
        """Return ``memory.events``: `oom` counts refusals, `oom_kill` processes killed."""
        lines = (self._cgroup.path / "memory.events").read_text().splitlines()
        return {key: int(value) for key, value in (line.split() for line in lines)}


def _help(cgroup: Cgroup, orders: int, answers: int) -> None:
    """Serve orders from outside the cgroup until the pipe closes; never returns."""
    status = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        cgroup.step_out()
        limit = cgroup.path / "memory.max"
        applied = False
        while True:
            ready = select.select([orders], [], [], LIFT_S if applied else None)[0]
            order = os.read(orders, 1) if ready else b"l"
            write(limit, str(cgroup.value("memory.current")) if order == b"a" else "max")
            applied = order == b"a"
            if not order:
                break
            if ready:
                os.write(answers, b"y")
        status = 0
    finally:
        os._exit(status)
