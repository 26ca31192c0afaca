"""Gets vCPU threads out of KVM_RUN when their time is up.

One thread per process watches all vCPUs that are being run. Time up means: `immediate_exit` is set
in the vCPU's `kvm_run`, then the thread gets a signal, again and again until it is out. In this
order no kick is lost: before KVM_RUN the flag ends it at once, inside it the signal does.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Final, Protocol

from harness.errors import HarnessError

KICK_SIGNAL: Final = signal.SIGRTMIN
"""A realtime signal: nothing else uses it, unlike SIGUSR1 or SIGALRM."""

RESEND_S: Final = 0.02
"""Seconds between two signals to a thread that is still inside KVM_RUN."""

GRACE_S: Final = 5.0
"""Seconds after which a thread that ignores all signals counts as stuck."""


class RunPage(Protocol):
    """The part of `kvm_run` that the watchdog writes."""

    immediate_exit: Any


class Watch:
    """One thread's permission to be inside KVM_RUN until a deadline."""

    def __init__(self, run: RunPage, deadline: float, on_stuck: Callable[[], None]) -> None:
        self.run = run
        self.deadline = deadline
        self.fired = False
        self.stuck = False
        self.thread_id = threading.get_ident()
        self._on_stuck = on_stuck

    def kick_if_due(self, now: float) -> float:
        """Kick the thread if its time is up; return when to look again (monotonic seconds)."""
        if now < self.deadline:
            return self.deadline
        self.fired = True
        self.run.immediate_exit = 1
        signal.pthread_kill(self.thread_id, KICK_SIGNAL)
        if now >= self.deadline + GRACE_S and not self.stuck:
            self.stuck = True
            self._on_stuck()
        return now + RESEND_S


class Watchdog:
    """Watches any number of threads; `with`-able through `install` and `uninstall`."""

    def __init__(self) -> None:
        # A signal is only ever sent with this lock held and the watch armed: `disarm` takes the
        # lock too, so no kick reaches a thread that went on to something else.
        self._lock = threading.Condition()
        self._watches: set[Watch] = set()
        self._next_look = 0.0
        self._thread: threading.Thread | None = None
        self._users = 0
        self._previous: Any = None

    def install(self) -> None:
        """Take the kick signal; every call needs an `uninstall`.

        Raises HarnessError: first called outside the main thread, where Python has no signals.
        """
        with self._lock:
            if self._users == 0:
                self._previous = _set_handler(_ignore)
            self._users += 1

    def uninstall(self) -> None:
        """Give the signal's previous handler back with the last user."""
        with self._lock:
            self._users -= 1
            in_main = threading.current_thread() is threading.main_thread()
            # None: a handler that C code had installed, which Python cannot put back.
            if self._users == 0 and in_main and self._previous is not None:
                _set_handler(self._previous)

    def arm(self, run: RunPage, timeout_s: float, on_stuck: Callable[[], None]) -> Watch:
        """Start watching the calling thread; it must call `disarm` when it is out of KVM_RUN.

        Args:
            run: the `kvm_run` of the vCPU that the thread is about to run.
            timeout_s: seconds from now.
            on_stuck: called once, in the watchdog's thread, if signals do not help.

        Raises HarnessError: the watchdog is not installed.

        """
        if self._users == 0:
            raise HarnessError("the watchdog is not installed, its kicks would end the process")
        watch = Watch(run, time.monotonic() + timeout_s, on_stuck)
        with self._lock:
            self._watches.add(watch)
            if self._thread is None or not self._thread.is_alive():  # not alive: after a fork
                self._thread = threading.Thread(target=self._loop, name="watchdog", daemon=True)
                self._thread.start()
            elif watch.deadline < self._next_look:
                self._lock.notify()
        return watch

    def disarm(self, watch: Watch) -> None:
        """Stop watching: no kick comes after this, and `immediate_exit` is clear again."""
        with self._lock:
            self._watches.discard(watch)
            watch.run.immediate_exit = 0

    def expire(self, watch: Watch) -> None:
        """Let a watch's time be up now."""
        with self._lock:
            watch.deadline = min(watch.deadline, time.monotonic())
            self._lock.notify()

    def _loop(self) -> None:
        with self._lock:
            while True:
                now = time.monotonic()
                looks = [watch.kick_if_due(now) for watch in self._watches]
                self._next_look = min(looks, default=float("inf"))
                wait_s = self._next_look - time.monotonic() if looks else None
                self._lock.wait(wait_s)


def _ignore(_number: int, _frame: FrameType | None) -> None:
    """Do nothing: the signal's whole point is to end KVM_RUN with EINTR."""


def _set_handler(handler: Any) -> Any:
    try:
        return signal.signal(KICK_SIGNAL, handler)
    except ValueError as e:
        raise HarnessError("the first machine must be made in the main thread") from e


WATCHDOG: Final = Watchdog()
"""The one of this process."""
