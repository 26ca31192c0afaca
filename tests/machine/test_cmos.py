import calendar

import pytest

from harness.machine.cmos import Cmos

NOON = calendar.timegm((2031, 10, 5, 12, 34, 56))  # a Sunday


def read(cmos, index):
    cmos.write(0x70, 1, index)
    return cmos.read(0x71, 1)


@pytest.fixture
def cmos():
    return Cmos(5 << 30, 4, now=lambda: NOON)


def test_the_clock_tells_utc_in_bcd(cmos):
    seen = [read(cmos, i) for i in (0x32, 9, 8, 7, 4, 2, 0)]
    assert seen == [0x20, 0x31, 0x10, 0x05, 0x12, 0x34, 0x56]
    assert read(cmos, 6) == 1, "Sunday is the first day"


def test_the_clock_is_valid_and_never_updating(cmos):
    assert not read(cmos, 0x0A) & 0x80
    assert read(cmos, 0x0B) == 0x02
    assert read(cmos, 0x0D) == 0x80


def test_the_clock_cannot_be_set(cmos):
    for index in (0, 0x0D):
        cmos.write(0x70, 1, index)
        cmos.write(0x71, 1, 0)
    assert (read(cmos, 0), read(cmos, 0x0D)) == (0x56, 0x80)


def word(cmos, index):
    return read(cmos, index) | read(cmos, index + 1) << 8


@pytest.mark.parametrize(
    ("ram_mib", "extended_kib", "above_16_mib", "above_4_gib"),
    [(8, 7 << 10, 0, 0), (128, 0xFFFF, 112 << 4, 0), (5 << 10, 0xFFFF, (3 << 14) - 256, 2 << 14)],
)
def test_memory_sizes(ram_mib, extended_kib, above_16_mib, above_4_gib):
    cmos = Cmos(ram_mib << 20, 1)
    assert word(cmos, 0x15) == 640
    assert word(cmos, 0x17) == word(cmos, 0x30) == extended_kib
    assert word(cmos, 0x34) == above_16_mib
    assert word(cmos, 0x5B) == above_4_gib


def test_other_bytes_are_memory_and_bit_7_of_the_index_is_not_an_address(cmos):
    cmos.write(0x70, 1, 0xC0)
    cmos.write(0x71, 1, 0x5A)
    assert read(cmos, 0x40) == 0x5A
    assert read(cmos, 0x5F) == 3
