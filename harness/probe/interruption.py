"""Being told to end (SIGTERM) in the middle of borrowing from the kernel or giving back."""

from __future__ import annotations

import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Put SIGTERM off until the block is over.

    Its handler raises wherever the main thread happens to be: within half-done steps nobody would
    know what there is to give back. It is the handler that is replaced, not the signal mask, since
    another thread would take the signal and the main one would still raise.
    """
    if threading.current_thread() is not threading.main_thread():
        # Only the main thread handles signals.
        yield
        return
    told: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
        if told:
            signal.raise_signal(signal.SIGTERM)


class Borrowed(ABC):
    """What is borrowed from the kernel in a `with`, and given back whatever happens."""

    @abstractmethod
    def _borrow(self) -> None: ...

    @abstractmethod
    def _give_back(self) -> None:
        """Give back what there is: also after half of `_borrow`, and if nothing is left."""

    def __enter__(self) -> Self:
        try:
            with uninterrupted():
                self._borrow()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _end(self) -> None:
        with uninterrupted():
            self._give_back()
