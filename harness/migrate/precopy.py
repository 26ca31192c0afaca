"""Sending memory while the guest runs: all of it once, then again what was written meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from harness.machine.machine import Machine
from harness.machine.memory import PAGE_SIZE
from harness.migrate.dirty import DirtyPages, DirtyTracker, Tracking, count, join
from harness.migrate.links import Cancel, Link
from harness.migrate.memory_image import Batch, Bearer, Memory, PageBits, count_of_bits
from harness.migrate.same_process import SourceEnd
from harness.migrate.shape import backings_of
from harness.migrate.stream import StreamWriter
from harness.migrate.transfer import write_memory, write_pages

_PACE_BYTES: Final = 64 << 10


@dataclass(frozen=True)
class Options:
    """How a machine is sent."""

    tracking: Tracking | None = None
    """By default the one that the machine was made for."""
    few_pages: int = 64
    """As soon as so few are left, the machine is stopped for them."""
    most_rounds: int = 30
    """After so many it is stopped for whatever is left, `Sent.converged` being false."""
    most_seconds: float = 60.0
    """The same by time; a round that has begun is finished."""
    bytes_per_s: float | None = None
    """What the link may be used for while the machine runs; by default all it can."""
    page_checksums: bool = False
    """Have a checksum of every run of pages, see `stream`; for links that are not to be trusted."""
    stall_s: float = 30.0
    """The link is lost if no byte moves for so many seconds."""
    welcome_s: float = 30.0
    """How long the destination may take to make an empty VM."""
    ready_s: float = 60.0
    """How long it may take to restore the state, the machine being stopped."""
    commit_s: float = 10.0
    """How long handing over may take, after which nobody knows."""
    pause_s: float = 10.0
    """How long vCPUs may take to come out of KVM_RUN."""


@dataclass(frozen=True)
class Round:
    """All memory, or what was written during the round before."""

    pages: int
    size_bytes: int
    """On the link, headers included."""
    seconds: float

    def __str__(self) -> str:
        return f"{self.pages} pages, {self.size_bytes} bytes, {self.seconds:.3f} s"


class PacedSink:
    """Writes to a link, no faster than allowed; looks whether the destination refuses."""

    def __init__(
        self,
        link: Link,
        bytes_per_s: float | None,
        cancel: Cancel,
        on_input: Callable[[], None],
    ) -> None:
        self.bytes_per_s = bytes_per_s
        self._hurries = False
        self._link = link
        self._cancel = cancel
        self._on_input = on_input
        self._free_at = time.monotonic()

    def write(self, data: bytes | bytearray | memoryview, /) -> None:
        """Take all of the bytes."""
        self.write_all([data])

    def hurry(self) -> None:
        """Only write from now on: somebody is going to listen soon."""
        self.bytes_per_s, self._hurries = None, True

    def write_all(self, pieces: Sequence[bytes | bytearray | memoryview], /) -> None:
        """Take all of the bytes of all pieces."""
        if not self._hurries and self._link.has_input():
            self._on_input()
        if self.bytes_per_s is None:
            self._link.write_all(pieces)
            return
        whole = memoryview(b"".join(pieces))
        for at in range(0, len(whole), _PACE_BYTES):
            piece = whole[at : at + _PACE_BYTES]
            self._link.write(piece)
            self.pace(len(piece))

    @property
    def bearer(self) -> Bearer | None:
        """What takes pages to a destination in this process, no faster than allowed."""
        return _PacedBearer(self, self._link) if isinstance(self._link, SourceEnd) else None

    def pace(self, size_bytes: int) -> None:
        """Wait for as long as so many bytes take at least."""
        if self.bytes_per_s is None:
            return
        now = time.monotonic()
        self._free_at = max(self._free_at, now) + size_bytes / self.bytes_per_s
        self._cancel.sleep(self._free_at - now)


class _PacedBearer:
    """Brings pages over a link within this process."""

    def __init__(self, sink: PacedSink, link: SourceEnd[Any]) -> None:
        self._sink, self._link = sink, link

    def bring(self, batch: Batch, memory: Memory) -> None:
        """Bring those of spans."""
        self._link.bring(batch, memory)
        self._sink.pace(batch.size_bytes)

    def bring_bits(self, backing: int, pages: PageBits, memory: Memory) -> None:
        """Bring those of bits."""
        self._link.bring_bits(backing, pages, memory)
        self._sink.pace(count_of_bits(pages) * PAGE_SIZE)


class PreCopy:
    """The rounds of one migration."""

    def __init__(
        self, machine: Machine, writer: StreamWriter, tracker: DirtyTracker, options: Options
    ) -> None:
        self.rounds: list[Round] = []
        self.converged = False
        """Whether so few pages were left as was asked for."""
        self._machine = machine
        self._writer = writer
        self._tracker = tracker
        self._options = options
        self._memories = list(map(Memory, backings_of(machine)))
        self._left: DirtyPages = {}
        self._until = 0.0

    def run(self) -> None:
        """Send memory until few pages are left, or a limit is reached; the guest may run."""
        self._until = time.monotonic() + self._options.most_seconds
        self._round(self._send_all)
        self.run_on()

    def run_on(self) -> None:
        """Send what was written again and again, until there is little of it, or as `run`."""
        while True:
            join(self._left, self._tracker.collect())
            self.converged = count(self._left) <= self._options.few_pages
            if self.converged or len(self.rounds) >= self._options.most_rounds:
                return
            if time.monotonic() >= self._until:
                return
            self._round(self._send_left)

    def rehearse(self) -> None:
        """Send one page of each mapping once more, as `finish` sends those that are left."""
        for number, memory in enumerate(self._memories):
            write_pages(self._writer, number, memory, {0: 1})

    def finish(self) -> None:
        """Send the rest; the guest must not run any more."""
        join(self._left, self._tracker.collect(last=True))
        self._round(self._send_left)

    def _round(self, send: Callable[[], int]) -> None:
        started, before = time.monotonic(), self._writer.written_bytes
        pages = send()
        size = self._writer.written_bytes - before
        self.rounds.append(Round(pages, size, time.monotonic() - started))

    def _send_all(self) -> int:
        """Send what is not zero: everything is at the destination, to begin with."""
        return write_memory(self._writer, self._machine)

    def _send_left(self) -> int:
        left, self._left = self._left, {}
        return sum(
            write_pages(self._writer, number, self._memories[number], pages)
            for number, pages in sorted(left.items())
        )
