"""The way between two harnesses: bytes in both directions, and no wait without an end.

`FdLink` is made of file descriptors, so that a socket, a pair of pipes or the standard streams of a
child (`ssh HOST ...`) are all the same to those who talk over it. `connections` has ways to get
one, `same_process` has the other kind. A link serves one hand-over and is closed at its end.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Final

from harness.migrate.errors import Cancelled, LinkLost

_AHEAD_BYTES: Final = 32 << 10
"""Read at once where less is asked for: headers and messages come with what is behind them."""

_MOST_PIECES: Final = 1024
"""IOV_MAX of Linux."""

_SLICE_S: Final = 0.05
"""How long a wait sleeps before it looks whether it was cancelled."""

_DEFAULT_STALL_S: Final = 30.0


class Cancel:
    """A wish, from any thread, that what waits shall give up."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        """Wish it; for ever."""
        self._event.set()

    def check(self) -> None:
        """Raise Cancelled, if it was wished."""
        if self._event.is_set():
            raise Cancelled("the migration was cancelled")

    def sleep(self, seconds: float) -> None:
        """Sleep; raise Cancelled as soon as it is wished."""
        self._event.wait(seconds)
        self.check()


Doing = tuple[str, float, float | None, Cancel | None]
"""What is going on; after how many seconds without a byte the link is lost; when it has to be done
(monotonic seconds); and who can end it."""


class Link(ABC):
    """One end. Reads and writes what there is; raises LinkLost where there is nothing any more."""

    def __init__(self, name: str, close: Callable[[], None] = lambda: None) -> None:
        """Begin.

        Args:
            name: what messages call the other end.
            close: what there is to do at the end.

        """
        self.name = name
        self.sent_bytes = 0
        """Bytes that are on their way. No other byte can ever arrive."""
        self.received_bytes = 0
        """Bytes that were read here; more may have been read ahead."""
        self._stack = contextlib.ExitStack()
        self._stack.callback(close)
        self._closed = False
        self.now: Doing = "talking", _DEFAULT_STALL_S, None, None

    def during(
        self,
        what: str,
        *,
        stall_s: float = _DEFAULT_STALL_S,
        within_s: float | None = None,
        cancel: Cancel | None = None,
    ) -> During:
        """Say what is going on, and how long it may take, for the time of a `with`.

        Args:
            what: a phrase for messages: "waiting for the destination's READY".
            stall_s: seconds in which at least one byte must move.
            within_s: seconds for all of it from now on, if given.
            cancel: whose wish ends it.

        """
        until = None if within_s is None else time.monotonic() + within_s
        return During(self, (what, stall_s, until, cancel))

    @abstractmethod
    def read(self, size: int, /) -> bytes:
        """Return up to so many bytes, at least one.

        Raises LinkLost: the other end is gone, or silent for too long.
        Raises Cancelled: somebody wished so.
        """

    @abstractmethod
    def fill(self, buffers: Sequence[memoryview], /) -> None:
        """Fill all of the buffers.

        Raises as `read` does.
        """

    def write(self, data: bytes | bytearray | memoryview, /) -> None:
        """Send all of the bytes.

        Raises LinkLost: the other end is gone, or takes nothing for too long.
        Raises Cancelled: somebody wished so.
        """
        self.write_all([data])

    @abstractmethod
    def write_all(self, pieces: Sequence[bytes | bytearray | memoryview], /) -> None:
        """Send all of the bytes of all pieces.

        Raises as `write` does.
        """

    @abstractmethod
    def has_input(self, within_s: float = 0.0) -> bool:
        """Tell whether there is something to read now, the end included."""

    def drain(self, within_s: float) -> None:
        """Throw away what comes, until the other end closes.

        A TCP socket that is closed with bytes unread takes back what it sent last.
        """
        with (
            contextlib.suppress(LinkLost),
            self.during("waiting for its end", within_s=within_s),
        ):
            while True:
                self.read(1 << 20)

    def close(self) -> None:
        """Close it; a second call does nothing."""
        if not self._closed:
            self._closed = True
            self._stack.close()

    def lost(self, why: str) -> LinkLost:
        """Return the error for a link that is of no more use."""
        return LinkLost(f"{self.now[0]}: link to {self.name} lost: {why}")

    def __enter__(self) -> Link:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(self) -> None:
        """Make sure that there is something to talk over, and that nobody wants it ended."""
        if self._closed:
            raise self.lost("it is closed")
        cancel = self.now[-1]
        if cancel is not None:
            cancel.check()


class During:
    """The time in which a link is used for one thing.

    A class, and no generator: some of these times are within that of a machine standing still.
    """

    __slots__ = ("_before", "_link", "_now")

    def __init__(self, link: Link, now: Doing) -> None:
        self._link, self._now = link, now

    def __enter__(self) -> None:
        self._before, self._link.now = self._link.now, self._now

    def __exit__(self, *_: object) -> None:
        self._link.now = self._before


class FdLink(Link):
    """One end that is made of file descriptors."""

    def __init__(
        self,
        read_fd: int,
        write_fd: int,
        name: str,
        close: Callable[[], None] = lambda: None,
    ) -> None:
        """Take the descriptors, which may be one; they do not block from now on.

        Args:
            read_fd: where the other end's bytes come from.
            write_fd: where ours go to.
            name: what messages call the other end.
            close: how to close them.

        """
        super().__init__(name, close)
        self._read_fd, self._write_fd = read_fd, write_fd
        self._readable, self._writable = select.poll(), select.poll()
        self._readable.register(read_fd, select.POLLIN)
        self._writable.register(write_fd, select.POLLOUT)
        self._ahead = memoryview(bytearray(_AHEAD_BYTES))
        self._ahead_at = self._ahead_end = 0
        for fd in {read_fd, write_fd}:
            os.set_blocking(fd, False)

    def read(self, size: int, /) -> bytes:
        """Return up to so many bytes, at least one; see `Link.read`."""
        if not self._ahead_bytes:
            self._ahead_at, self._ahead_end = 0, self._receive([self._ahead])
        return bytes(self._from_ahead(size))

    def fill(self, buffers: Sequence[memoryview], /) -> None:
        """Fill all of the buffers; see `Link.fill`."""
        rest = list(buffers)
        while rest:
            if self._ahead_bytes:
                found = self._from_ahead(len(rest[0]))
                rest[0][: len(found)] = found
                _advance(rest, len(found))
                continue
            some = rest[: _MOST_PIECES - 1]
            size = sum(map(len, some))
            count = self._receive([*some, self._ahead])
            self._ahead_at, self._ahead_end = 0, max(0, count - size)
            count = min(count, size)
            self.received_bytes += count
            if count == size:
                del rest[: len(some)]
            else:
                _advance(rest, count)

    def write_all(self, pieces: Sequence[bytes | bytearray | memoryview], /) -> None:
        """Send all of the bytes of all pieces; see `Link.write`."""
        rest = list(pieces)
        left = sum(map(len, rest))
        deadline = self._deadline()
        while left:
            self._check()
            try:
                count = os.writev(self._write_fd, rest[:_MOST_PIECES])
            except BlockingIOError:
                self._wait(self._writable, deadline)
                continue
            except OSError as e:
                raise self.lost(os.strerror(e.errno or 0)) from e
            self.sent_bytes += count
            left -= count
            deadline = self._deadline()
            if left:
                _advance(rest, count)
                # Mostly it is full now, and to be told so costs more than to ask.
                self._wait(self._writable, deadline)

    def has_input(self, within_s: float = 0.0) -> bool:
        """Tell whether there is something to read now, the end included."""
        if self._ahead_bytes:
            return True
        self._fd(self._read_fd)
        return bool(self._readable.poll(within_s * 1000))

    def _fd(self, fd: int) -> int:
        if self._closed:
            raise self.lost("it is closed")
        return fd

    @property
    def _ahead_bytes(self) -> int:
        return self._ahead_end - self._ahead_at

    def _from_ahead(self, size: int) -> memoryview:
        at = self._ahead_at
        self._ahead_at = min(at + size, self._ahead_end)
        self.received_bytes += self._ahead_at - at
        return self._ahead[at : self._ahead_at]

    def _receive(self, buffers: list[memoryview]) -> int:
        """Wait until there is something, put it into the buffers, and return how much it is."""
        deadline = self._deadline()
        while True:
            try:
                count = os.readv(self._fd(self._read_fd), buffers)
            except BlockingIOError:
                self._wait(self._readable, deadline)
                continue
            except OSError as e:
                raise self.lost(os.strerror(e.errno or 0)) from e
            if not count:
                raise self.lost("the other end closed it")
            return count

    def _deadline(self) -> float:
        _, stall_s, until, _ = self.now
        return time.monotonic() + stall_s if until is None else until

    def _wait(self, poll: select.poll, deadline: float) -> None:
        cancel = self.now[-1]
        while True:
            if cancel is not None:
                cancel.check()
            left = deadline - time.monotonic()
            if left <= 0:
                raise self.lost("nothing moved in time")
            if poll.poll(min(left, _SLICE_S) * 1000):
                return


def _advance(buffers: list[Any], count: int) -> None:
    """Take so many bytes away from the beginning; empty buffers go with them."""
    done = 0
    while done < len(buffers) and count >= len(buffers[done]):
        count -= len(buffers[done])
        done += 1
    del buffers[:done]
    if count:
        buffers[0] = memoryview(buffers[0])[count:]
