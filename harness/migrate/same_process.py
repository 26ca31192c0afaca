"""A link between two ends in one process: pages are copied from mapping to mapping, in one thread.

The stream and the messages are those of every other link, but for the pages, which go past the
stream (`PAGES_BESIDE`), and for who waits: there is no second thread. Whenever the source's end has
to wait for a message, the destination does what it has to do until it needs more from the source::

    source, destination = ends()
    source.work = receiving(kvm, destination)
    sent = send(machine, source)
    received = source.received
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import Generic, TypeVar

from harness.errors import HarnessError
from harness.migrate.links import Link
from harness.migrate.memory_image import Batch, Memory, copy_batch

T = TypeVar("T")


class End(Link):
    """What both ends have: bytes that came, in memory."""

    def __init__(self, name: str, inbox: deque[memoryview], outbox: deque[memoryview]) -> None:
        super().__init__(name)
        self._inbox, self._outbox = inbox, outbox

    def read(self, size: int, /) -> bytes:
        """Return up to so many bytes, at least one; see `Link.read`."""
        self._check()
        if not self._inbox:
            self._await_input()
        data = self._inbox.popleft()
        if len(data) > size:
            self._inbox.appendleft(data[size:])
            data = data[:size]
        self.received_bytes += len(data)
        return bytes(data)

    def fill(self, buffers: Sequence[memoryview], /) -> None:
        """Fill all of the buffers; see `Link.fill`."""
        for buffer in buffers:
            done = 0
            while done < len(buffer):
                data = self.read(len(buffer) - done)
                buffer[done : done + len(data)] = data
                done += len(data)

    def write_all(self, pieces: Sequence[bytes | bytearray | memoryview], /) -> None:
        """Send all of the bytes of all pieces; see `Link.write`."""
        self._check()
        data = b"".join(pieces)
        if data:
            self._outbox.append(memoryview(data))
            self.sent_bytes += len(data)

    def has_input(self, within_s: float = 0.0) -> bool:
        """Tell whether there is something to read now; it never waits."""
        return bool(self._inbox)

    def _await_input(self) -> None:
        raise self.lost("nothing can come any more")


class DestinationEnd(End):
    """The destination's end."""

    def __init__(self, inbox: deque[memoryview], outbox: deque[memoryview]) -> None:
        super().__init__("the source", inbox, outbox)
        self.place: Callable[[str, Batch], Memory] | None = None
        """Returns the mapping that pages go to; to be set before WELCOME is said.

        Its first argument is what messages begin with; it raises StreamError if there is no place.
        """
        self._brought: deque[Batch] = deque()

    def came(self, batch: Batch) -> bool:
        """Tell whether the next pages that were brought are these, and forget them."""
        return bool(self._brought) and self._brought.popleft() == batch

    def take(self, batch: Batch, memory: Memory) -> None:
        """Put pages of a mapping where they go.

        Raises StreamError: they are outside memory.
        Raises LinkLost: the destination does not listen any more.
        """
        if self._closed or self.place is None:
            raise self.lost("there is no place for pages")
        copy_batch(self.place("pages past the stream", batch), memory, batch)
        self._brought.append(batch)


class SourceEnd(End, Generic[T]):
    """The source's end, which has the destination work."""

    def __init__(
        self, destination: DestinationEnd, inbox: deque[memoryview], outbox: deque[memoryview]
    ):
        super().__init__("the destination", inbox, outbox)
        self._destination = destination
        self.work: Generator[None, None, T] | None = None
        """What the destination does; it yields where it needs more from the source."""
        self.error: Exception | None = None
        """What the destination ended with, if it did not take the machine."""
        self._received: list[T] = []

    @property
    def received(self) -> T:
        """What the destination has made of the stream.

        Raises HarnessError: nothing yet.
        """
        if not self._received:
            raise HarnessError("the destination has not taken the machine")
        return self._received[0]

    def bring(self, batch: Batch, memory: Memory) -> None:
        """Copy pages of a mapping to where the destination has them.

        Raises StreamError: it has no such memory.
        Raises Cancelled: somebody wished so.
        """
        self._check()
        self._destination.take(batch, memory)
        self.sent_bytes += batch.size_bytes

    def catch_up(self) -> None:
        """Have the destination take the sections that are there; the last one must be whole."""
        while self._outbox and self.work is not None:
            self._work(self.work)

    def close(self) -> None:
        """Close both ends: what the destination has not taken, it throws away."""
        if self.work is not None:
            self.work.close()
        super().close()

    def _await_input(self) -> None:
        while not self._inbox and self.work is not None:
            self._work(self.work)
        if not self._inbox:
            raise self.lost("the destination has ended") from self.error

    def _work(self, work: Generator[None, None, T]) -> None:
        try:
            next(work)
        except StopIteration as e:
            self._received.append(e.value)
            self.work = None
        except Exception as e:  # it has refused, and whoever reads that raises it
            self.error, self.work = e, None


def ends() -> tuple[SourceEnd[T], DestinationEnd]:
    """Return the two ends of a link."""
    there, back = deque[memoryview](), deque[memoryview]()
    destination = DestinationEnd(there, back)
    return SourceEnd(destination, back, there), destination
