"""A machine's memory as runs of pages."""

from __future__ import annotations

import ctypes
import mmap
import os
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from harness.machine.memory import PAGE_SIZE

RUN_PAGES: Final = 256
"""The most pages in one run; 1 MiB."""

_PAGEMAP_ENTRY = 8
_CHUNK_BYTES = 256 * _PAGEMAP_ENTRY
_PRESENT_OR_SWAPPED = 3 << 62
"""Documentation/admin-guide/mm/pagemap.rst, bits 63 and 62."""
_TOP_BYTE, _IN_TOP_BYTE = 7, _PRESENT_OR_SWAPPED >> 56
_ZERO_PAGE: Final = bytes(PAGE_SIZE)


@dataclass(frozen=True)
class Run:
    """Pages of one mapping that follow one another."""

    backing: int
    first: int
    """The first page's number in the mapping."""
    count: int


def populated(backing: mmap.mmap) -> list[int]:
    """Return the numbers of the pages that a mapping has memory for; all others read as zeroes.

    Raises OSError: there is no /proc/self/pagemap.
    """
    address = ctypes.addressof(ctypes.c_char.from_buffer(backing))
    pages = len(backing) // PAGE_SIZE
    with open("/proc/self/pagemap", "rb", buffering=0) as file:
        data = os.pread(file.fileno(), pages * _PAGEMAP_ENTRY, address // PAGE_SIZE * 8)
    return list(_present(data))


def _present(entries: bytes) -> Iterator[int]:
    """Yield the numbers of the entries that have a page.

    Most of a machine's memory has none: what is all alike is looked at once.
    """
    for at in range(0, len(entries), _CHUNK_BYTES):
        raw = entries[at : at + _CHUNK_BYTES]
        all_alike = raw == raw[:_PAGEMAP_ENTRY] * (len(raw) // _PAGEMAP_ENTRY)
        if not all_alike or raw[_TOP_BYTE] & _IN_TOP_BYTE:
            numbered = enumerate(array("Q", raw), at // _PAGEMAP_ENTRY)
            yield from (page for page, entry in numbered if entry & _PRESENT_OR_SWAPPED)


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
