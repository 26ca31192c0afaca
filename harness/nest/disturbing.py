"""What is done to a guest while it works: migrations and SMIs, at random moments."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final, Self

from harness.errors import HarnessError
from harness.machine.smi_counter import Way
from harness.nest.guest import Guest
from harness.nest.plan import Plan
from harness.probe.smi_exits import SmiExits

_END_S: Final = 330.0
_LONGEST_PEACE_S: Final = {"moved": 1.0, "smi": 0.1}
_SMI_S: Final = 60.0

Emit = Callable[..., None]


class Disturbance:
    """Does something again and again, in a thread, for the time of a `with`."""

    def __init__(
        self, what: str, count: int, act: Callable[[], dict[str, Any]], emit: Emit, seed: int
    ) -> None:
        """Prepare `count` times; each is told as an event `what`. The first comes after `begin`."""
        self._what = what
        self._count = count
        self._act = act
        self._emit = emit
        self._random = random.Random(f"{seed} {what}")
        self._begun = threading.Event()
        self._over = threading.Event()
        self._error: BaseException | None = None
        self.on_done: Callable[[], None] = lambda: None
        """Called after the last time, or when it went wrong."""
        self._thread = threading.Thread(target=self._work, name=what, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._over.set()
        self._begun.set()
        self._thread.join(_END_S)
        if self._thread.is_alive():
            raise HarnessError(f"{self._what}: does not end within {_END_S:g} s")
        if self._error is not None and kind is None:
            raise self._error

    def begin(self) -> None:
        """Let it begin."""
        self._begun.set()

    def _work(self) -> None:
        self._begun.wait()
        try:
            for number in range(1, self._count + 1):
                if self._over.wait(self._random.uniform(0, _LONGEST_PEACE_S[self._what])):
                    return
                self._emit(self._what, number=number, of=self._count, **self._act())
        except BaseException as e:  # handed to whoever leaves the `with`
            self._error = e
        finally:
            if not self._over.is_set():
                self.on_done()


@contextmanager
def disturbing(
    emit: Emit, guest: Guest, plan: Plan, on_done: Callable[[], None]
) -> Iterator[Callable[[], None]]:
    """Do to a guest what the plan says, once what is yielded was called; call `on_done` after that.

    Raises ScenarioFailure: KVM did not do what it must.
    Raises HostError: a process died.
    """
    ways = random.Random(plan.seed)
    exits = SmiExits()

    def send_smi() -> dict[str, Any]:
        smi = guest.smi(ways.randrange(plan.vcpus), ways.choice(list(Way)), _SMI_S)
        # Where L1 is KVM itself, it is told of the SMI before it takes it: it left its guest.
        return {**smi, "left_guest": bool(exits.count())}

    wanted = (("moved", plan.moves, guest.move), ("smi", plan.smis, send_smi))
    found = [Disturbance(what, n, act, emit, plan.seed) for what, n, act in wanted if n]
    others = threading.Semaphore(max(len(found) - 1, 0))

    def count_down() -> None:
        if not others.acquire(blocking=False):
            on_done()

    def begin() -> None:
        for one in found:
            one.begin()

    with ExitStack() as stack:
        if plan.smis:
            stack.enter_context(exits)
        for one in found:
            one.on_done = count_down
            stack.enter_context(one)
        yield begin
