"""Which pages of a mapping hold anything."""

import mmap

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.machine.memory import PAGE_SIZE
from harness.migrate.memory_image import (
    BATCH_PAGES,
    CHUNK_PAGES,
    Batch,
    Memory,
    batches,
    bits_of_pages,
    copy_batch,
    copy_bits,
    count_of_bits,
    end_of_bits,
    filled_spans,
    not_zero,
    populated,
    populated_spans,
    spans,
    spans_of_bits,
    together,
)

PAGES = 3000
"""Several pieces of pagemap, the last of them shorter."""


@settings(max_examples=40, deadline=None)
@given(st.sets(st.integers(0, PAGES - 1), max_size=40))
def test_exactly_the_pages_that_were_written_have_memory(wanted):
    with mmap.mmap(-1, PAGES * PAGE_SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as backing:
        # Else one write may give memory to hundreds of pages.
        backing.madvise(mmap.MADV_NOHUGEPAGE)
        for page in wanted:
            backing[page * PAGE_SIZE + page % PAGE_SIZE] = 1
        assert populated(backing) == sorted(wanted)


def test_all_pages_of_a_full_mapping_have_memory():
    with mmap.mmap(-1, 600 * PAGE_SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as backing:
        backing[:] = b"\1" * len(backing)
        assert populated(backing) == list(range(600))


def test_a_page_that_was_only_read_holds_nothing():
    with mmap.mmap(-1, 4 * PAGE_SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as backing:
        backing[2 * PAGE_SIZE] = 1
        assert backing[0] == 0
        assert list(not_zero(backing, range(4))) == [2]


@pytest.mark.parametrize(
    ("pages", "found"),
    [
        ([], []),
        ([5], [(5, 1)]),
        ([1, 2, 3, 7, 9, 10], [(1, 3), (7, 1), (9, 2)]),
        (range(BATCH_PAGES + 1), [(0, BATCH_PAGES), (BATCH_PAGES, 1)]),
    ],
)
def test_spans(pages, found):
    assert list(spans(pages)) == found


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.integers(0, 63), st.sampled_from([0, 1, 7, 4095]), max_size=20))
def test_what_holds_anything_of_a_span(written):
    data = bytearray((100 + 64 + 20) * PAGE_SIZE)
    data[99 * PAGE_SIZE] = data[164 * PAGE_SIZE] = 1  # what is around it does not count
    for page, offset in written.items():
        data[(100 + page) * PAGE_SIZE + offset] = 1
    found = filled_spans(memoryview(data), (100, 64))
    assert list(found) == list(spans([100 + page for page in sorted(written)]))


def test_spans_of_a_mapping_are_no_longer_than_may_be():
    with mmap.mmap(-1, 600 * PAGE_SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as backing:
        backing[:] = b"\1" * len(backing)
        assert list(populated_spans(backing)) == list(spans(range(600)))


@pytest.mark.parametrize(
    ("found", "put_together"),
    [
        ([], []),
        ([(1, 2), (5, 1)], [((1, 2), (5, 1))]),
        ([(0, BATCH_PAGES), (300, 1)], [((0, BATCH_PAGES),), ((300, 1),)]),
        ([(0, 1), (2, BATCH_PAGES)], [((0, 1),), ((2, BATCH_PAGES),)]),
        (
            [(2 * n, 1) for n in range(BATCH_PAGES + 1)],
            [tuple((2 * n, 1) for n in range(BATCH_PAGES)), ((2 * BATCH_PAGES, 1),)],
        ),
    ],
)
def test_batches_are_no_longer_than_may_be(found, put_together):
    assert list(batches(7, found)) == [Batch(7, some) for some in put_together]


def test_a_batch_shows_its_pages():
    memory = memoryview(bytes(range(8)) * PAGE_SIZE)
    batch = Batch(0, ((1, 2), (5, 1)))
    assert (batch.pages, batch.size_bytes) == (3, 3 * PAGE_SIZE)
    wanted = [memory[PAGE_SIZE : 3 * PAGE_SIZE], memory[5 * PAGE_SIZE : 6 * PAGE_SIZE]]
    assert batch.views(memory) == wanted


def test_a_view_does_not_keep_a_mapping_open():
    mapping = mmap.mmap(-1, PAGE_SIZE)
    view = Memory(mapping).view
    view[:2] = b"ab"
    assert mapping[:3] == b"ab\0"
    mapping.close()


@settings(max_examples=60, deadline=None)
@given(st.sets(st.integers(0, 3 * CHUNK_PAGES), max_size=300), st.integers(0, CHUNK_PAGES))
def test_bits_are_spans(some, run):
    wanted = some | set(range(run, run + 700))
    found = spans_of_bits(bits_of_pages(wanted))
    assert [page for at, count in found for page in range(at, at + count)] == sorted(wanted)
    assert max(count for _, count in found) <= BATCH_PAGES
    assert list(together(3, found)) == list(batches(3, found))


def test_no_bits_are_no_spans():
    assert spans_of_bits({}) == []
    assert list(together(0, [])) == []


def test_a_batch_is_copied_to_its_places():
    here, there = Memory(bytearray(b"\1" * 4 * PAGE_SIZE)), Memory(bytearray(4 * PAGE_SIZE))
    copy_batch(there, here, Batch(0, ((0, 1), (2, 2))))
    assert [there.view[page * PAGE_SIZE] for page in range(4)] == [1, 0, 1, 1]
    with pytest.raises(ValueError, match="the pages end at 0x5000, and memory before that"):
        copy_batch(there, here, Batch(0, ((0, 1), (4, 1))))


def test_bits_are_copied_to_their_places():
    pages = 2 * CHUNK_PAGES
    here, there = (Memory(mmap.mmap(-1, pages * PAGE_SIZE)) for _ in range(2))
    wanted = [0, 3, CHUNK_PAGES - 1, CHUNK_PAGES, pages - 1]
    for page in (*wanted, 1, CHUNK_PAGES + 1):
        here.view[page * PAGE_SIZE] = 7
    copy_bits(there, here, bits_of_pages(wanted))
    assert [page for page in range(pages) if there.view[page * PAGE_SIZE]] == wanted
    with pytest.raises(ValueError, match="the pages end at 0x2001000, and memory before that"):
        copy_bits(there, here, bits_of_pages([3, pages]))


def test_bits_have_an_end_and_a_count():
    assert (end_of_bits({}), count_of_bits({})) == (0, 0)
    some = bits_of_pages([CHUNK_PAGES + 5, 2])
    assert (end_of_bits(some), count_of_bits(some)) == (CHUNK_PAGES + 6, 2)
