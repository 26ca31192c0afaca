"""Runs cases on several hosts at once: threads, each with a pool of hosts of its own.

pytest's loop stays as it is: it asks for one outcome after the other, in the order of collection,
while the workers are ahead of it. A thread lives as long as its hosts do, as it must: an emulated
machine ends with the thread that started it (PR_SET_PDEATHSIG, prctl(2)).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Hashable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from typing import Any, Self

from harness.errors import HarnessError, HostUnavailable
from harness.host.session import Cancelled
from harness.runner.hosts import HostPool
from harness.runner.lab import Lab, Ran
from harness.scenarios.case import Case

#: For hosts to be closed; a local one may first clean up what a call left.
_END_S = 120.0
_LOOK_S = 0.1

Params = Hashable


class CaseQueue:
    """Hands out cases in their order, but keeps those with the same module parameters together.

    A host for parameters of their own costs a start and memory: the worker that has one gets all of
    its cases, as long as there is something else for the others to do.
    """

    def __init__(self, cases: Sequence[Case]) -> None:
        self._left = dict(enumerate(cases))
        self._owners: dict[Params, object] = {}
        self._lock = threading.Lock()

    def take(self, worker: object) -> int | None:
        """Return the number of the worker's next case; None when there is none left."""
        with self._lock:
            for number, case in self._left.items():
                if self._owners.get(_key(case), worker) is worker:
                    return self._taken(number, case, worker)
            for number, case in self._left.items():
                return self._taken(number, case, worker)
        return None

    def _taken(self, number: int, case: Case, worker: object) -> int:
        del self._left[number]
        if case.scenario.host_params:
            self._owners.setdefault(_key(case), worker)
        return number


def _key(case: Case) -> Params:
    return tuple(sorted(case.scenario.host_params.items()))


class Workers:
    """One thread for each pool; a context manager that ends them and closes the pools."""

    def __init__(self, lab: Lab, pools: Sequence[HostPool], cases: Sequence[Case]) -> None:
        self._lab = lab
        self._cases = cases
        self._pools = pools
        self._queue = CaseQueue(cases)
        self._futures: list[Future[Ran]] = [Future() for _ in cases]
        #: What went wrong beside the cases: a host could not be ended, for one.
        self.errors: list[BaseException] = []
        #: Why the hosts cannot be had any more, each in one line.
        self.unavailable: list[str] = []
        self._hosts: list[dict[str, Any]] = []
        # Daemons: one that does not end in time must not keep the process.
        self._threads = [
            threading.Thread(target=self._work, args=[pool], name="worker", daemon=True)
            for pool in pools
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def wait(self, number: int) -> Ran:
        """Return how case `number` ended, once it has.

        Each case has its deadlines, so this has one.

        Raises:
            Cancelled: it has not been run, and will not be.
        """
        try:
            return self._futures[number].result()
        except CancelledError as e:
            raise Cancelled("the run ends early") from e

    def ended(self) -> Mapping[int, Ran]:
        """Return how the cases ended that did, by number."""
        return {
            number: future.result()
            for number, future in enumerate(self._futures)
            if future.done() and not future.cancelled() and future.exception() is None
        }

    def hosts(self) -> list[dict[str, Any]]:
        """Return the descriptions of all hosts that were used, each once."""
        different: list[dict[str, Any]] = []
        for host in self._hosts:
            if host not in different:
                different.append(host)
        return different

    def _work(self, pool: HostPool) -> None:
        try:
            with pool:
                try:
                    self._run_all(pool)
                finally:
                    self._hosts += pool.describe()
        except BaseException as e:
            self.errors.append(e)
            self._cancel_rest()

    def _run_all(self, pool: HostPool) -> None:
        while not self._lab.stopping.is_set():
            number = self._queue.take(pool)
            if number is None:
                return
            future = self._futures[number]
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(self._lab.run(pool, self._cases[number]))
            except HostUnavailable as e:
                self.unavailable.append(str(e))
                future.set_exception(Cancelled(str(e)))
                self._cancel_rest()
            except BaseException as e:
                future.set_exception(e)
                if not isinstance(e, Exception):
                    self._cancel_rest()

    def _cancel_rest(self) -> None:
        self._lab.stopping.set()
        for future in self._futures:
            future.cancel()

    def _stop(self) -> None:
        """End the threads; a case that is under way has no outcome."""
        if not all(future.done() for future in self._futures):
            self._lab.stopping.set()
        until = time.monotonic() + _END_S
        while alive := [thread for thread in self._threads if thread.is_alive()]:
            if self._lab.stopping.is_set():
                # Again and again: a session may just be coming up.
                for pool in self._pools:
                    pool.cancel()
            if time.monotonic() > until:
                raise HarnessError(f"a worker did not end within {_END_S:.0f} s")
            alive[0].join(_LOOK_S)
