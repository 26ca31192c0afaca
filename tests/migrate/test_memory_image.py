"""Which pages of a mapping hold anything."""

import mmap

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.machine.memory import PAGE_SIZE
from harness.migrate.memory_image import (
    RUN_PAGES,
    Run,
    filled_runs,
    not_zero,
    populated,
    populated_runs,
    runs,
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
        ([5], [Run(1, 5, 1)]),
        ([1, 2, 3, 7, 9, 10], [Run(1, 1, 3), Run(1, 7, 1), Run(1, 9, 2)]),
        (range(RUN_PAGES + 1), [Run(1, 0, RUN_PAGES), Run(1, RUN_PAGES, 1)]),
    ],
)
def test_runs(pages, found):
    assert list(runs(1, pages)) == found


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.integers(0, 63), st.sampled_from([0, 1, 7, 4095]), max_size=20))
def test_what_holds_anything_of_a_run(written):
    data = bytearray(64 * PAGE_SIZE)
    for page, offset in written.items():
        data[page * PAGE_SIZE + offset] = 1
    found = filled_runs(Run(2, 100, 64), bytes(data))
    assert list(found) == list(runs(2, [100 + page for page in sorted(written)]))


def test_runs_of_a_mapping_are_no_longer_than_may_be():
    with mmap.mmap(-1, 600 * PAGE_SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as backing:
        backing[:] = b"\1" * len(backing)
        assert list(populated_runs(3, backing)) == list(runs(3, range(600)))
