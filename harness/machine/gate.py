"""Holding a machine's vCPUs back between two KVM_RUNs, while its state is taken or exchanged."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Protocol

from harness.machine.errors import MachineError

_POLL_S = 0.00005
_KICK_AGAIN_S = 0.002
_LONGEST_PAUSE_S = 600.0


class Runner(Protocol):
    """What a gate holds back."""

    index: int
    inside: bool
    """Somewhere between passing the gate and having left KVM_RUN."""

    def interrupt_run(self) -> None:
        """Get the vCPU out of KVM_RUN, if it is in there."""


class Gate:
    """Open: vCPUs run. Closed: whoever is about to run waits."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._pauses = 0
        self._condemned = ""

    @property
    def closed(self) -> bool:
        """Whether vCPUs are held back now."""
        return self._pauses > 0

    def pass_through(self, runner: Runner) -> None:
        """Enter; waits while the gate is closed.

        No lock is taken where it is open, for this is done for every run: the runner says that it
        is inside and then looks at the gate, who closes it looks in the other order, and the GIL
        keeps both.

        Raises MachineError: it was closed for ten minutes, or for good.
        """
        runner.inside = True
        while self.closed:
            runner.inside = False
            with self._changed:
                opened = self._changed.wait_for(self._is_settled, _LONGEST_PAUSE_S)
            if self._condemned:
                raise MachineError(f"vCPU {runner.index}: {self._condemned}")
            if not opened:
                raise MachineError(
                    f"vCPU {runner.index}: held back by a pause for {_LONGEST_PAUSE_S:g} s"
                )
            runner.inside = True

    def close(self, runners: Sequence[Runner], timeout_s: float) -> None:
        """Close the gate; no runner is inside then. Every call needs an `open`.

        Raises MachineError: one does not come out within `timeout_s` seconds; it is as before.
        """
        with self._changed:
            self._pauses += 1
        try:
            self._clear(runners, timeout_s)
        except BaseException:
            self.open()
            raise

    def open(self) -> None:
        """Take one `close` back."""
        with self._changed:
            self._pauses -= 1
            self._changed.notify_all()

    def condemn(self, why: str) -> None:
        """Let nobody pass any more: who waits, or comes while the gate is closed, gets an error."""
        with self._changed:
            self._condemned = why
            self._changed.notify_all()

    def _is_settled(self) -> bool:
        return not self.closed or bool(self._condemned)

    def _clear(self, runners: Sequence[Runner], timeout_s: float) -> None:
        deadline, kick_at = time.monotonic() + timeout_s, 0.0
        while inside := [runner for runner in runners if runner.inside]:
            now = time.monotonic()
            if now > deadline:
                names = ", ".join(f"vCPU {runner.index}" for runner in inside)
                raise MachineError(f"{names}: not out of KVM_RUN within {timeout_s:g} s")
            if now >= kick_at:
                for runner in inside:
                    # Again and again: it may be on its way in, where nothing holds it yet.
                    runner.interrupt_run()
                kick_at = now + _KICK_AGAIN_S
            # Shortly: whoever waits for this counts microseconds, of which the guest loses each.
            time.sleep(_POLL_S)
