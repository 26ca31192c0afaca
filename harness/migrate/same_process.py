"""A link between two ends in one process: pages are copied from mapping to mapping, in one thread.

The stream and the messages are those of every other link, but for the pages, which are brought
past the stream (`PAGES_BESIDE`), and for who waits: there is no second thread. Whenever the
source's end has to wait for a message, the destination does what it has to do until it needs more
from the source::

    source, destination = ends()
    source.work = receiving(kvm, destination)
    sent = send(machine, source)
    received = source.received
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from typing import Generic, TypeVar

from harness.errors import HarnessError
from harness.machine.memory import PAGE_SIZE
from harness.migrate.links import Link
from harness.migrate.memory_image import Batch, Bearer, Memory, PageBits, count_of_bits

T = TypeVar("T")


class End(Link):
    """What both ends have: bytes that came, in memory."""

    def __init__(self, name: str, inbox: deque[bytes], outbox: deque[bytes]) -> None:
        super().__init__(name)
        self._inbox, self._outbox = inbox, outbox
        self._ahead, self._at = b"", 0
        """What was taken from the inbox, and how much of it was read."""

    def read(self, size: int, /) -> bytes:
        """Return up to so many bytes, at least one; see `Link.read`."""
        self._check()
        if self._at == len(self._ahead):
            if not self._inbox:
                self._await_input()
            self._ahead, self._at = self._inbox.popleft(), 0
        data = self._ahead[self._at : self._at + size]
        self._at += len(data)
        self.received_bytes += len(data)
        return data

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
            self._outbox.append(data)
            self.sent_bytes += len(data)

    def has_input(self, within_s: float = 0.0) -> bool:
        """Tell whether there is something to read now; it never waits."""
        return self._at < len(self._ahead) or bool(self._inbox)

    def _await_input(self) -> None:
        raise self.lost("nothing can come any more")


class DestinationEnd(End):
    """The destination's end."""

    def __init__(self, inbox: deque[bytes], outbox: deque[bytes]) -> None:
        super().__init__("the source", inbox, outbox)
        self.taker: Bearer | None = None
        """What takes pages; to be set before WELCOME is said."""

    def taking(self) -> Bearer:
        """Return what takes pages.

        Raises LinkLost: the destination does not listen any more.
        """
        if self._closed or self.taker is None:
            raise self.lost("there is no place for pages")
        return self.taker


class SourceEnd(End, Generic[T]):
    """The source's end, which has the destination work."""

    def __init__(self, destination: DestinationEnd, inbox: deque[bytes], outbox: deque[bytes]):
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
        self._destination.taking().bring(batch, memory)
        self.sent_bytes += batch.size_bytes

    def bring_bits(self, backing: int, pages: PageBits, memory: Memory) -> None:
        """Do the same with pages that are no spans.

        Raises as `bring` does.
        """
        self._check()
        self._destination.taking().bring_bits(backing, pages, memory)
        self.sent_bytes += count_of_bits(pages) * PAGE_SIZE

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
    there, back = deque[bytes](), deque[bytes]()
    destination = DestinationEnd(there, back)
    return SourceEnd(destination, back, there), destination
