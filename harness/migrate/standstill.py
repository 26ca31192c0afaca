"""The time in which a machine stands still: nothing else may happen in it, and it is measured."""

from __future__ import annotations

import gc
import threading
import time


class _NoCollection:
    """Keeps the garbage collector away, in however many threads at once; a context manager."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._was_on = False

    def __enter__(self) -> None:
        with self._lock:
            if not self._users:
                self._was_on = gc.isenabled()
                gc.disable()
            self._users += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if not self._users and self._was_on:
                gc.enable()


NO_COLLECTION = _NoCollection()
"""The one of this process. A collection of everything takes as long as many migrations' ends."""


class Laps:
    """How long the parts of a standstill took."""

    def __init__(self) -> None:
        self.started = self._last = time.monotonic()
        self.seconds: dict[str, float] = {}
        """By the name of the part, in their order."""

    def end(self, part: str) -> None:
        """Say that a part has ended, which began where the one before it ended."""
        now = time.monotonic()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
        self._last = now

    @property
    def whole_s(self) -> float:
        """Seconds from the beginning to the end of the last part."""
        return self._last - self.started
