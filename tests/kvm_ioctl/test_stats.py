from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from real_mode_code import OUT_IN_STORE_HLT

from kvm_ioctl.capabilities import Cap
from kvm_ioctl.handles import Vm
from kvm_ioctl.linux_kvm import StatsBase, StatsType, StatsUnit
from kvm_ioctl.stats import StatDescriptor, StatsError, StatsFd

NAME_BYTES = 16


def descriptor(name: bytes, flags: int, exponent: int, size: int, offset: int) -> bytes:
    return struct.pack("=IhHII", flags, exponent, size, offset, 7) + name.ljust(NAME_BYTES, b"\0")


def forged(descriptors: list[bytes], values: bytes) -> bytes:
    id_offset, desc_offset = 24, 24 + NAME_BYTES
    block = b"".join(descriptors)
    data_offset = desc_offset + len(block)
    header = struct.pack(
        "=6I", 0, NAME_BYTES, len(descriptors), id_offset, desc_offset, data_offset
    )
    return header + b"kvm-1/vcpu-0".ljust(NAME_BYTES, b"\0") + block + values


GOOD = forged(
    [
        descriptor(b"exits", 0x000, 0, 1, 0),
        descriptor(b"halt_wait_ns", 0x020, -9, 1, 8),
        descriptor(b"hist", 0x124, 3, 3, 16),
        descriptor(b"newer", 0xFFF, 0, 1, 40),
    ],
    struct.pack("=6Q", 11, 22, 1, 2, 1 << 63, 5),
)


@pytest.fixture
def stats_of(tmp_path: Path):
    opened = []

    def make(data: bytes) -> StatsFd:
        path = tmp_path / "stats"
        path.write_bytes(data)
        opened.append(StatsFd(os.open(path, os.O_RDONLY)))
        return opened[-1]

    yield make
    for stats in opened:
        stats.close()


def test_values_by_name(stats_of) -> None:
    stats = stats_of(GOOD)
    assert stats.id == "kvm-1/vcpu-0"
    assert stats.read() == {
        "exits": 11,
        "halt_wait_ns": 22,
        "hist": [1, 2, 1 << 63],
        "newer": 5,
    }


def test_descriptors_say_type_unit_base_and_exponent(stats_of) -> None:
    exits, halt, hist, newer = stats_of(GOOD).descriptors
    assert exits.type is StatsType.KVM_STATS_TYPE_CUMULATIVE
    assert halt == StatDescriptor(
        "halt_wait_ns",
        StatsType.KVM_STATS_TYPE_CUMULATIVE,
        StatsUnit.KVM_STATS_UNIT_SECONDS,
        StatsBase.KVM_STATS_BASE_POW10,
        -9,
        1,
        8,
        7,
    )
    assert hist.type is StatsType.KVM_STATS_TYPE_LOG_HIST
    assert hist.unit is StatsUnit.KVM_STATS_UNIT_SECONDS
    assert hist.base is StatsBase.KVM_STATS_BASE_POW2
    assert (newer.type, newer.unit, newer.base) == (0xF, 0xF0, 0xF00)


def test_no_statistics_at_all(stats_of) -> None:
    assert stats_of(forged([], b"")).read() == {}


@pytest.mark.parametrize("length", range(0, len(GOOD) - 48, 9))
def test_truncated_header_id_or_descriptors_are_one_error(stats_of, length: int) -> None:
    with pytest.raises(StatsError, match="statistics end after"):
        stats_of(GOOD[:length])


def test_truncated_values_are_one_error(stats_of) -> None:
    stats = stats_of(GOOD[:-1])
    with pytest.raises(StatsError, match="statistics end after 47 of 48 bytes"):
        stats.read()


def test_values_are_read_anew(stats_of) -> None:
    stats = stats_of(GOOD)
    with open(f"/proc/self/fd/{stats.fileno()}", "r+b") as file:
        file.seek(len(GOOD) - 48)
        file.write(struct.pack("=Q", 12))
    assert stats.read()["exits"] == 12


@pytest.mark.kvm
def test_statistics_count_exits(guest, vm: Vm) -> None:
    vcpu = guest(OUT_IN_STORE_HLT).vcpu
    if not vm.check_extension(Cap.KVM_CAP_BINARY_STATS_FD):
        pytest.skip("KVM_CAP_BINARY_STATS_FD is 0")
    with vcpu.stats() as stats:
        before = stats.read()["exits"]
        vcpu.enter()
        assert stats.read()["exits"] > before
        assert "vcpu-0" in stats.id
    with vm.stats() as stats:
        assert "remote_tlb_flush" in stats.read()
