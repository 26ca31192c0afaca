"""The MP table, read back as the kernel's mpparse.c does."""

import struct

import pytest

from harness.machine.memory_map import CONVENTIONAL_END
from harness.machine.mp_table import MAX_MP_VCPUS, MP_TABLE_GPA, mp_table

LENGTHS = {0: 20, 1: 8, 2: 8, 3: 8, 4: 8}


def parse(data):
    """Return the entries by kind; every checksum must hold."""
    assert data[:4] == b"_MP_"
    assert sum(data[:16]) & 0xFF == 0
    at = struct.unpack_from("<I", data, 4)[0] - MP_TABLE_GPA
    length, count = (
        struct.unpack_from("<H", data, at + 4)[0],
        struct.unpack_from("<H", data, at + 34)[0],
    )
    table = data[at : at + length]
    assert table[:4] == b"PCMP"
    assert sum(table) & 0xFF == 0
    found = {kind: [] for kind in LENGTHS}
    at = 44
    for _ in range(count):
        kind = table[at]
        found[kind].append(table[at : at + LENGTHS[kind]])
        at += LENGTHS[kind]
    assert at == length
    return found


@pytest.mark.parametrize("vcpus", [1, 4, MAX_MP_VCPUS])
def test_every_cpu_is_listed_and_the_first_boots(vcpus):
    cpus = parse(mp_table(vcpus))[0]
    assert [cpu[1] for cpu in cpus] == list(range(vcpus))
    assert [cpu[3] for cpu in cpus] == [3] + [1] * (vcpus - 1)


def test_the_timer_is_at_pin_2_and_all_other_lines_at_their_own():
    sources = parse(mp_table(2))[3]
    pins = {source[5]: source[7] for source in sources}
    assert pins[0] == 2
    assert pins[4] == 4
    assert 2 not in pins
    assert len(pins) == 15


def test_the_io_apic_has_an_id_of_its_own():
    entries = parse(mp_table(3))
    [io_apic] = entries[2]
    assert io_apic[1] == 3
    assert {source[6] for source in entries[3]} == {3}


def test_the_largest_stays_below_video_memory():
    assert MP_TABLE_GPA + len(mp_table(MAX_MP_VCPUS)) <= CONVENTIONAL_END


@pytest.mark.parametrize("vcpus", [0, MAX_MP_VCPUS + 1])
def test_other_numbers_are_refused(vcpus):
    with pytest.raises(ValueError, match=f"{vcpus} vCPUs"):
        mp_table(vcpus)
