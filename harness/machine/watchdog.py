"""Gets vCPU threads out of KVM_RUN when their time is up.

One thread per process watches all vCPUs that are being run. Time up means: `immediate_exit` is set
in the vCPU's `kvm_run`, then the thread gets a signal, again and again until it is out. In this
order no kick is lost: before KVM_RUN the flag ends it at once, inside it the signal does.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from math import inf
from threading import get_ident
from time import monotonic
from types import FrameType
from typing import Any, Final, Protocol
from weakref import WeakSet

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
    """One vCPU's permission to be inside KVM_RUN; `Watchdog.arm` gives it until a deadline."""

    __slots__ = (
        "__weakref__",
        "_on_stuck",
        "deadline",
        "expired_at",
        "fired",
        "run",
        "stuck",
        "thread_id",
    )

    def __init__(self, on_stuck: Callable[[], None]) -> None:
        self.run: RunPage | None = None
        self.deadline = inf
        """Monotonic seconds; never, while it is not armed."""
        self.expired_at = inf
        """When `Watchdog.expire` was called."""
        self.fired = False
        self.stuck = False
        self.thread_id = 0
        self._on_stuck = on_stuck

    def due_at(self) -> float:
        """Return when its time is up (monotonic seconds)."""
        deadline = self.deadline
        return deadline if deadline == inf else min(deadline, self.expired_at)

    def kick_if_due(self, now: float) -> float:
        """Kick the thread if its time is up; return when to look again (monotonic seconds)."""
        due_at = self.due_at()
        if now < due_at:
            return due_at
        self.fired = True
        # From now on `disarm` waits for us, but the thread may just have been through it.
        due_at, run = self.due_at(), self.run
        if now < due_at or run is None:
            self.fired = False
            return due_at
        run.immediate_exit = 1
        signal.pthread_kill(self.thread_id, KICK_SIGNAL)
        if now >= due_at + GRACE_S and not self.stuck:
            self.stuck = True
            self._on_stuck()
        return now + RESEND_S


class Watchdog:
    """Watches any number of threads; `with`-able through `install` and `uninstall`."""

    def __init__(self) -> None:
        # Arming and disarming go with every KVM_RUN and take no lock, so each side writes before it
        # reads what the other one writes; the GIL keeps that order. `arm`: the deadline, then
        # `_next_look`; the thread: `_next_look`, then the deadlines. `disarm`: no deadline, then
        # `fired`; the thread: `fired`, then the deadline. So no deadline is overlooked, and a kick
        # is only ever sent to a thread that is armed, or waits in `disarm` for the lock.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._watches: WeakSet[Watch] = WeakSet()
        self._next_look = inf
        """When the thread looks at the watches again; never, if there is no thread."""
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

    def watch(self, on_stuck: Callable[[], None]) -> Watch:
        """Make a watch, to be armed for every KVM_RUN of one vCPU.

        Args:
            on_stuck: called once, in the watchdog's thread, if signals do not help.

        """
        watch = Watch(on_stuck)
        with self._lock:
            self._watches.add(watch)
        return watch

    def arm(self, watch: Watch, run: RunPage, timeout_s: float) -> None:
        """Start watching the calling thread; it must call `disarm` when it is out of KVM_RUN.

        Args:
            watch: not armed.
            run: the `kvm_run` of the vCPU that the thread is about to run.
            timeout_s: seconds from now.

        Raises HarnessError: the watchdog is not installed.

        """
        if self._users == 0:
            raise HarnessError("the watchdog is not installed, its kicks would end the process")
        watch.run = run
        watch.thread_id = get_ident()
        watch.expired_at = inf
        watch.deadline = deadline = monotonic() + timeout_s
        # Mostly the thread looks before that anyway, for the sake of an earlier run.
        if deadline < self._next_look:
            self._look_now()

    def disarm(self, watch: Watch) -> None:
        """Stop watching: no kick comes after this, and `immediate_exit` is clear again."""
        watch.deadline = inf
        if watch.fired:
            self._settle(watch)
        # The page is unmapped with the vCPU, which it must not outlive.
        watch.run = None

    def expire(self, watch: Watch) -> None:
        """Let the time of a watch be up now; nothing, if it is not armed."""
        watch.expired_at = monotonic()
        self._look_now()

    def has_fired(self, watch: Watch) -> bool:
        """Tell whether an armed watch's time was up."""
        with self._lock:
            return watch.fired

    def forget_threads(self) -> None:
        """Begin anew in a child process, which has a copy of everything but the threads."""
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._thread, self._next_look = None, inf

    def _settle(self, watch: Watch) -> None:
        with self._lock:
            if watch.fired and watch.run is not None:
                watch.run.immediate_exit = 0
            watch.fired = watch.stuck = False

    def _look_now(self) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._loop, name="watchdog", daemon=True)
                self._thread.start()
            else:
                self._changed.notify()

    def _loop(self) -> None:
        with self._lock:
            try:
                while True:
                    self._next_look = inf  # before the deadlines are read, see __init__
                    now = monotonic()
                    self._next_look = min((w.kick_if_due(now) for w in self._watches), default=inf)
                    wait_s = self._next_look - monotonic()
                    self._changed.wait(None if wait_s == inf else max(wait_s, 0))
            finally:
                # What `on_stuck` raises ends this thread; the next watch then starts another one.
                self._thread, self._next_look = None, inf


def _ignore(_number: int, _frame: FrameType | None) -> None:
    """Do nothing: the signal's whole point is to end KVM_RUN with EINTR."""


def _set_handler(handler: Any) -> Any:
    try:
        return signal.signal(KICK_SIGNAL, handler)
    except ValueError as e:
        raise HarnessError("the first machine must be made in the main thread") from e


WATCHDOG: Final = Watchdog()
"""The one of this process."""

os.register_at_fork(after_in_child=WATCHDOG.forget_threads)
