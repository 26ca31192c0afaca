import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.machine.addresses import Gpa
from harness.machine.errors import MachineError
from harness.proxy.paging import ALL, LARGE_PAGE, PAGE, PageAllocator, PageTables, Pte, translate

TOP = 0x40_0000_0000


@pytest.fixture
def tables(memory, pages):
    return PageTables(memory, pages)


def test_identity_maps_all_of_the_range_and_nothing_else(memory, tables):
    tables.identity(0, 4 * LARGE_PAGE)
    for address in (0, 0x1234, LARGE_PAGE, 4 * LARGE_PAGE - 1):
        assert translate(memory, tables.root, address) == (address, Pte.P | Pte.W | Pte.U)
    assert translate(memory, tables.root, 4 * LARGE_PAGE) is None
    assert not tables.walk(4 * LARGE_PAGE).present


def test_identity_crosses_a_gigabyte(memory, tables):
    tables.identity((1 << 30) - LARGE_PAGE, (1 << 30) + LARGE_PAGE)
    for address in ((1 << 30) - 1, 1 << 30):
        assert translate(memory, tables.root, address)[0] == address


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    mappings=st.dictionaries(
        st.integers(0, TOP // PAGE).map(lambda n: n * PAGE),
        st.integers(0, 1 << 20).map(lambda n: n * PAGE),
        min_size=1,
        max_size=6,
    ),
    offset=st.integers(0, PAGE - 1),
)
def test_what_is_mapped_translates(memory, mappings, offset):
    tables = PageTables(memory, PageAllocator(Gpa(0x1000), Gpa(8 << 20)))
    memory.zero(Gpa(0), 8 << 20)
    for address, target in mappings.items():
        tables.map(address, target)
    for address, target in mappings.items():
        assert translate(memory, tables.root, address + offset)[0] == target + offset


def test_a_split_large_page_maps_the_same_but_for_the_changed_page(memory, tables):
    tables.identity(0, LARGE_PAGE)
    tables.protect(0x5000, clear=Pte.W)
    tables.unmap(0x6000)
    assert translate(memory, tables.root, 0x5008) == (0x5008, Pte.P | Pte.U)
    assert translate(memory, tables.root, 0x6000) is None
    for address in (0x4FFF, 0x7000, LARGE_PAGE - 1):
        assert translate(memory, tables.root, address) == (address, Pte.P | Pte.W | Pte.U)
    assert tables.entry(0x5000) == 0x5000 | ALL & ~int(Pte.W)


def test_flags_of_upper_levels_count(memory, tables):
    tables.map(0x5000, 0x5000)
    upper = tables.root
    memory.write_int(upper, 8, memory.read_int(upper, 8) & ~int(Pte.U) | int(Pte.NX))
    assert translate(memory, tables.root, 0x5000) == (0x5000, Pte.P | Pte.W | Pte.NX)


def test_any_bits_can_be_written(memory, tables):
    tables.map(0x5000, 0x5000)
    tables.set_entry(0x5000, 0x000F_FFFF_FFFF_F001)
    assert tables.walk(0x5000).value == 0x000F_FFFF_FFFF_F001


def test_only_changes_of_present_entries_are_told(memory, pages):
    told = []
    tables = PageTables(memory, pages, lambda: told.append(1))
    tables.identity(0, LARGE_PAGE)
    tables.map(TOP, 0)
    assert not told
    tables.unmap(TOP)
    assert told
    del told[:]
    tables.map(TOP, 0)
    assert not told


def test_pages_run_out_with_one_line():
    pages = PageAllocator(Gpa(0x1800), Gpa(0x4000))
    assert pages.take() == 0x2000
    assert pages.take(1) == 0x3000
    with pytest.raises(MachineError, match="out of guest memory"):
        pages.take()


def test_alignment_of_pages():
    pages = PageAllocator(Gpa(0x1000), Gpa(0x40000))
    assert pages.take(0x10000, 0x10000) == 0x10000
