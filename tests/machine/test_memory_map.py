from itertools import pairwise

import pytest

from harness.machine.errors import MachineError
from harness.machine.memory_map import E820Type, e820_map, lower_kib, ram_ranges, upper_kib

MIB, GIB = 1 << 20, 1 << 30


def spans(ranges):
    return [(r.gpa, r.end) for r in ranges]


@pytest.mark.parametrize(
    ("size", "ram"),
    [
        (2 * MIB, [(0, 0xA0000), (0xC0000, 2 * MIB)]),
        (3 * GIB, [(0, 0xA0000), (0xC0000, 3 * GIB)]),
        (3 * GIB + MIB, [(0, 0xA0000), (0xC0000, 3 * GIB), (4 * GIB, 4 * GIB + MIB)]),
        (8 * GIB, [(0, 0xA0000), (0xC0000, 3 * GIB), (4 * GIB, 9 * GIB)]),
    ],
)
def test_memory_has_its_holes_where_a_pc_has_them(size, ram):
    assert spans(ram_ranges(size)) == ram


@pytest.mark.parametrize("size", [0, MIB, 2 * MIB + 1])
def test_a_size_that_makes_no_pc_is_refused(size):
    with pytest.raises(MachineError, match="a PC needs whole pages, 2 MiB or more"):
        ram_ranges(size)


@pytest.mark.parametrize("size", [2 * MIB, 128 * MIB, 3 * GIB, 5 * GIB])
def test_the_map_is_in_order_and_its_ram_is_there(size):
    e820 = e820_map(size)
    assert all(a.end <= b.gpa for a, b in pairwise(e820))
    ram = ram_ranges(size)
    for entry in e820:
        if entry.kind is E820Type.RAM:
            assert any(r.gpa <= entry.gpa and entry.end <= r.end for r in ram)


def test_what_multiboot_counts_ends_at_the_first_hole():
    assert (lower_kib(e820_map(5 * GIB)), upper_kib(e820_map(5 * GIB))) == (639, 3 * MIB - 1024)
    assert upper_kib(e820_map(2 * MIB)) == 1024
