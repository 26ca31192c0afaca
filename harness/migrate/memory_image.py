"""A machine's memory as spans of pages, and those in batches."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import struct
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain, compress
from operator import sub
from typing import Final, Protocol

from harness.machine.memory import PAGE_SIZE
from kvm_ioctl.batch import copy_pages

BATCH_PAGES: Final = 256
"""The most pages that travel together; 1 MiB."""

_PAGEMAP_ENTRY = 8
_TOP_BYTE, _PRESENT_OR_SWAPPED = 7, 3 << 6
"""Documentation/admin-guide/mm/pagemap.rst, bits 63 and 62, as they are in the top byte."""
_HAS_PAGE: Final = bytes(1 if byte & _PRESENT_OR_SWAPPED else 0 for byte in range(256))
_ZERO_PAGE: Final = bytes(PAGE_SIZE)
_ZERO_PAGES: Final = 16
_MANY_ZEROES: Final = bytes(_ZERO_PAGES * PAGE_SIZE)
_PYBUF_WRITE: Final = 0x200
_MEMORY_VIEW: Final = ctypes.pythonapi.PyMemoryView_FromMemory
_MEMORY_VIEW.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)
_MEMORY_VIEW.restype = ctypes.py_object

# One byte a page, looked at by what is written in C: memory has hundreds of thousands.
_PIECES: Final = re.compile(rb"[^\0]{1,%d}" % BATCH_PAGES)

_FLAGS: Final = bytes(byte == ord("1") for byte in range(256))

CHUNK_BYTES: Final = 512
CHUNK_PAGES: Final = 8 * CHUNK_BYTES

PageBits = dict[int, int]
"""A set of pages: by the number of a chunk of `CHUNK_PAGES`, bit n is its page n; no int is 0."""

Span = tuple[int, int]
"""Pages that follow one another: the number of the first one in the mapping, and how many."""


@dataclass(slots=True)
class Batch:
    """Spans of one mapping that travel together: in ascending order, at most `BATCH_PAGES`."""

    backing: int
    spans: tuple[Span, ...]
    pages: int = field(init=False)
    """How many pages there are."""

    def __post_init__(self) -> None:
        """Count them once: everybody asks."""
        self.pages = sum([count for _, count in self.spans])

    @property
    def size_bytes(self) -> int:
        """How many bytes they have."""
        return self.pages * PAGE_SIZE

    def table(self) -> bytes:
        """Return the spans as they travel: 8 bytes for each number, little-endian."""
        return struct.pack(f"<{2 * len(self.spans)}Q", *chain.from_iterable(self.spans))

    def views(self, memory: memoryview) -> list[memoryview]:
        """Return the pages of each span.

        Args:
            memory: the whole mapping.

        """
        return [memory[at * PAGE_SIZE : (at + count) * PAGE_SIZE] for at, count in self.spans]


def populated(backing: mmap.mmap) -> list[int]:
    """Return the numbers of the pages that a mapping has memory for; all others read as zeroes.

    Raises OSError: there is no /proc/self/pagemap.
    """
    return [page for at, count in populated_spans(backing) for page in range(at, at + count)]


def populated_spans(backing: mmap.mmap) -> Iterator[Span]:
    """Yield the same as spans of at most `BATCH_PAGES`.

    Raises OSError: there is no /proc/self/pagemap.
    """
    address = ctypes.addressof(ctypes.c_char.from_buffer(backing))
    pages = len(backing) // PAGE_SIZE
    with open("/proc/self/pagemap", "rb", buffering=0) as file:
        data = os.pread(file.fileno(), pages * _PAGEMAP_ENTRY, address // PAGE_SIZE * 8)
    return _flagged(0, data[_TOP_BYTE::_PAGEMAP_ENTRY].translate(_HAS_PAGE))


def filled_spans(memory: memoryview, span: Span) -> Iterator[Span]:
    """Yield what of a span holds anything but zeroes.

    Args:
        memory: the whole mapping.
        span: of at most `BATCH_PAGES`.

    """
    first, count = span
    end = (first + count) * PAGE_SIZE
    # Most pages that hold anything do not begin with a zero.
    flags = bytearray(memory[first * PAGE_SIZE : end : PAGE_SIZE])
    page = flags.find(0)
    while page >= 0:
        at, step = (first + page) * PAGE_SIZE, 1
        # Zeroes come in great numbers, where they were only read.
        if memory[at : min(at + len(_MANY_ZEROES), end)].tobytes() == _MANY_ZEROES:
            step = _ZERO_PAGES
        elif memory[at : at + PAGE_SIZE].tobytes() != _ZERO_PAGE:
            flags[page] = 1
        page = flags.find(0, page + step)
    return _flagged(first, flags)


def _flagged(first: int, flags: bytes | bytearray) -> Iterator[Span]:
    """Yield the spans of pages, counted from `first`, whose byte is not 0."""
    for found in _PIECES.finditer(flags):
        yield first + found.start(), found.end() - found.start()


def not_zero(backing: mmap.mmap, pages: Iterable[int]) -> Iterator[int]:
    """Yield those of the pages that hold anything but zeroes."""
    for page in pages:
        at = page * PAGE_SIZE
        if backing[at : at + PAGE_SIZE] != _ZERO_PAGE:
            yield page


def spans(pages: Iterable[int]) -> Iterator[Span]:
    """Join pages, in ascending order, into spans of at most `BATCH_PAGES`."""
    first = count = 0
    for page in pages:
        if count and page == first + count and count < BATCH_PAGES:
            count += 1
            continue
        if count:
            yield first, count
        first, count = page, 1
    if count:
        yield first, count


def bits_of_pages(pages: Iterable[int]) -> PageBits:
    """Return pages as bits."""
    found: PageBits = {}
    for page in pages:
        chunk, bit = divmod(page, CHUNK_PAGES)
        found[chunk] = found.get(chunk, 0) | 1 << bit
    return found


def pages_of_bits(pages: PageBits) -> Iterator[int]:
    """Yield pages, in ascending order."""
    for chunk, bits in sorted(pages.items()):
        yield from _numbers(chunk, bits)


def join_bits(pages: PageBits, more: PageBits) -> None:
    """Add pages to others."""
    for chunk, bits in more.items():
        pages[chunk] = pages.get(chunk, 0) | bits


def spans_of_bits(pages: PageBits) -> list[Span]:
    """Return the same as spans of at most `BATCH_PAGES`; none goes on in another chunk."""
    found: list[Span] = []
    for chunk, bits in sorted(pages.items()):
        # A span begins where the bit below is clear; it ends at the next bit that is clear.
        firsts = _numbers(chunk, bits & ~(bits << 1))
        counts = list(map(sub, _numbers(chunk, bits << 1 & ~bits), firsts))
        if max(counts) <= BATCH_PAGES:
            found += zip(firsts, counts, strict=True)
            continue
        for first, count in zip(firsts, counts, strict=True):
            for at in range(0, count, BATCH_PAGES):
                found.append((first + at, min(count - at, BATCH_PAGES)))
    return found


def end_of_bits(pages: PageBits) -> int:
    """Return the number of the page after the last one; 0 if there are none."""
    last = max(pages, default=0)
    return last * CHUNK_PAGES + pages.get(last, 0).bit_length()


def count_of_bits(pages: PageBits) -> int:
    """Return how many pages there are."""
    return sum([bits.bit_count() for bits in pages.values()])


def _numbers(chunk: int, bits: int) -> list[int]:
    """Return the pages of one chunk; there may be thousands, so C does what is done for each."""
    flags = format(bits, "b").encode().translate(_FLAGS)[::-1]
    first = chunk * CHUNK_PAGES
    # One more, for where a span ends.
    return list(compress(range(first, first + CHUNK_PAGES + 1), flags))


def together(backing: int, spans: Sequence[Span]) -> Iterator[Batch]:
    """Put the same as in `batches` together, if all spans are there: that takes less time."""
    ends = list(accumulate([count for _, count in spans]))
    at = done = 0
    while at < len(spans):
        until = bisect_right(ends, done + BATCH_PAGES, at)
        yield Batch(backing, tuple(spans[at:until]))
        at, done = until, ends[until - 1]


def batches(backing: int, found: Iterable[Span]) -> Iterator[Batch]:
    """Put spans, in ascending order and each of at most `BATCH_PAGES`, into batches.

    None is split: with long ones, batches are of one span each.
    """
    together: list[Span] = []
    pages = 0
    for span in found:
        if pages + span[1] > BATCH_PAGES:
            yield Batch(backing, tuple(together))
            together, pages = [], 0
        together.append(span)
        pages += span[1]
    if together:
        yield Batch(backing, tuple(together))


class Memory:
    """A mapping's bytes, and where they are.

    It does not keep the mapping from being closed, and is not to be used after that.
    """

    __slots__ = ("_mapping", "address", "view")

    def __init__(self, mapping: mmap.mmap | bytearray) -> None:
        self._mapping = mapping
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        self.view: memoryview = _MEMORY_VIEW(self.address, len(mapping), _PYBUF_WRITE)


class Bearer(Protocol):
    """Brings pages of a mapping to the same places of the destination's, past the stream.

    Both methods raise StreamError: it has no such memory.
    """

    def bring(self, batch: Batch, memory: Memory) -> None:
        """Bring those of a batch."""

    def bring_bits(self, backing: int, pages: PageBits, memory: Memory) -> None:
        """Bring pages that nobody has made spans of, which takes long."""


def copy_batch(there: Memory, here: Memory, batch: Batch) -> None:
    """Copy pages to the same places of another mapping.

    Raises ValueError: one of the mappings has no such pages.
    """
    first, count = batch.spans[-1]
    _expect_both(there, here, first + count)
    for first, count in batch.spans:
        at = first * PAGE_SIZE
        ctypes.memmove(there.address + at, here.address + at, count * PAGE_SIZE)


def copy_bits(there: Memory, here: Memory, pages: PageBits) -> None:
    """Do the same with pages that are no spans.

    Raises ValueError: one of the mappings has no such pages.
    """
    _expect_both(there, here, end_of_bits(pages))
    for chunk, bits in pages.items():
        at = chunk * CHUNK_PAGES * PAGE_SIZE
        copy_pages(bits.to_bytes(CHUNK_BYTES, "little"), there.address + at, here.address + at)


def _expect_both(there: Memory, here: Memory, end: int) -> None:
    least = min(len(there.view), len(here.view))
    if end * PAGE_SIZE > least:
        raise ValueError(f"the pages end at {end * PAGE_SIZE:#x}, and memory before that")
