"""A machine's memory as runs of pages."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from harness.machine.memory import PAGE_SIZE

RUN_PAGES: Final = 256
"""The most pages in one run; 1 MiB."""

_PAGEMAP_ENTRY = 8
_TOP_BYTE, _PRESENT_OR_SWAPPED = 7, 3 << 6
"""Documentation/admin-guide/mm/pagemap.rst, bits 63 and 62, as they are in the top byte."""
_HAS_PAGE: Final = bytes(1 if byte & _PRESENT_OR_SWAPPED else 0 for byte in range(256))
_ZERO_PAGE: Final = bytes(PAGE_SIZE)
_ZERO_PAGES: Final = 16
_MANY_ZEROES: Final = bytes(_ZERO_PAGES * PAGE_SIZE)

# One byte a page, looked at by what is written in C: memory has hundreds of thousands.
_PIECES: Final = re.compile(rb"[^\0]{1,%d}" % RUN_PAGES)


@dataclass(frozen=True)
class Run:
    """Pages of one mapping that follow one another."""

    backing: int
    first: int
    """The first page's number in the mapping."""
    count: int

    @property
    def end(self) -> int:
        """The number of the first page past it."""
        return self.first + self.count


def populated(backing: mmap.mmap) -> list[int]:
    """Return the numbers of the pages that a mapping has memory for; all others read as zeroes.

    Raises OSError: there is no /proc/self/pagemap.
    """
    return [page for run in populated_runs(0, backing) for page in range(run.first, run.end)]


def populated_runs(number: int, backing: mmap.mmap) -> Iterator[Run]:
    """Yield the same as runs of mapping `number`.

    Raises OSError: there is no /proc/self/pagemap.
    """
    address = ctypes.addressof(ctypes.c_char.from_buffer(backing))
    pages = len(backing) // PAGE_SIZE
    with open("/proc/self/pagemap", "rb", buffering=0) as file:
        data = os.pread(file.fileno(), pages * _PAGEMAP_ENTRY, address // PAGE_SIZE * 8)
    return _flagged(number, 0, data[_TOP_BYTE::_PAGEMAP_ENTRY].translate(_HAS_PAGE))


def filled_runs(run: Run, data: bytes) -> Iterator[Run]:
    """Yield what of a run holds anything but zeroes.

    Args:
        run: of at most RUN_PAGES.
        data: what is in its pages.

    """
    # Most pages that hold anything do not begin with a zero.
    flags = bytearray(data[::PAGE_SIZE])
    page = flags.find(0)
    while page >= 0:
        at, step = page * PAGE_SIZE, 1
        # Zeroes come in great numbers, where they were only read.
        if data.startswith(_MANY_ZEROES, at):
            step = _ZERO_PAGES
        elif not data.startswith(_ZERO_PAGE, at):
            flags[page] = 1
        page = flags.find(0, page + step)
    return _flagged(run.backing, run.first, flags)


def _flagged(number: int, first: int, flags: bytes | bytearray) -> Iterator[Run]:
    """Yield the runs of pages, counted from `first`, whose byte is not 0."""
    for found in _PIECES.finditer(flags):
        yield Run(number, first + found.start(), found.end() - found.start())


def not_zero(backing: mmap.mmap, pages: Iterable[int]) -> Iterator[int]:
    """Yield those of the pages that hold anything but zeroes."""
    for page in pages:
        at = page * PAGE_SIZE
        if backing[at : at + PAGE_SIZE] != _ZERO_PAGE:
            yield page


def runs(backing: int, pages: Iterable[int]) -> Iterator[Run]:
    """Join pages, in ascending order, into runs of at most RUN_PAGES."""
    first = count = 0
    for page in pages:
        if count and page == first + count and count < RUN_PAGES:
            count += 1
            continue
        if count:
            yield Run(backing, first, count)
        first, count = page, 1
    if count:
        yield Run(backing, first, count)
