from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from kvm_ioctl.asm_kvm import kvm_msrs
from kvm_ioctl.msrs import MsrBlocks, read_msrs, write_msrs
from kvm_ioctl.request import Ioctl, MsrRefused, VcpuFd
from kvm_ioctl.requests import VcpuRequests

REFUSED = 0xDEADBEEF
MAX_IO_MSRS = 256


class FakeVcpu(VcpuFd):
    """Takes and gives MSRs like KVM: up to the first that it refuses."""

    def __init__(self) -> None:
        super().__init__(os.open("/dev/null", os.O_RDWR))
        self.msrs: dict[int, int] = {}
        self.payloads: list[kvm_msrs] = []

    def call(self, request: Ioctl, payload: kvm_msrs) -> int:  # type: ignore[override]
        self.payloads.append(payload)
        assert payload.nmsrs < MAX_IO_MSRS
        for done, entry in enumerate(payload.entries):
            assert entry.reserved == 0
            if entry.index == REFUSED:
                return done
            if request is VcpuRequests.KVM_SET_MSRS:
                self.msrs[entry.index] = entry.data
            else:
                entry.data = self.msrs.get(entry.index, 0)
        return int(payload.nmsrs)


@pytest.fixture
def vcpu() -> Iterator[FakeVcpu]:
    with FakeVcpu() as fake:
        yield fake


def read(vcpu: FakeVcpu, blocks: MsrBlocks, *indices: int, skip: bool = False) -> dict[int, int]:
    return read_msrs(vcpu, VcpuRequests.KVM_GET_MSRS, blocks, indices, skip)


def write(vcpu: FakeVcpu, blocks: MsrBlocks, values: dict[int, int]) -> int:
    return write_msrs(vcpu, VcpuRequests.KVM_SET_MSRS, blocks, values)


VALUES = {0x10: 0, 0xC0000080: 0xD01, 0xFFFFFFFF: (1 << 64) - 1}


def test_values_arrive_whole_and_in_order(vcpu: FakeVcpu) -> None:
    blocks = MsrBlocks()
    assert write(vcpu, blocks, VALUES) == 3
    assert list(vcpu.msrs.items()) == list(VALUES.items())
    assert list(read(vcpu, blocks, *reversed(VALUES)).items()) == list(reversed(VALUES.items()))


def test_the_same_list_again_is_the_same_payload_with_new_values(vcpu: FakeVcpu) -> None:
    blocks = MsrBlocks()
    vcpu.msrs = dict(VALUES)
    assert read(vcpu, blocks, *VALUES) == VALUES
    vcpu.msrs[0x10] = 7
    assert read(vcpu, blocks, *VALUES) == VALUES | {0x10: 7}
    assert read(vcpu, blocks, 0x10) == {0x10: 7}
    assert write(vcpu, blocks, {0x10: 8}) == 1
    assert vcpu.msrs[0x10] == 8
    first, second, other, again = vcpu.payloads
    assert first is second
    assert other is again
    assert first is not other


def test_two_at_once_never_share_a_payload() -> None:
    blocks = MsrBlocks()
    mine = blocks.take((1, 2))
    other = blocks.take((1, 2))
    assert mine is not other
    blocks.give_back(mine)
    blocks.give_back(other)
    assert blocks.take((1, 2)) is other
    assert blocks.take((1, 2)) is not mine


@pytest.mark.parametrize("count", [0, 1, 255, 256, 600])
def test_lists_of_any_length(vcpu: FakeVcpu, count: int) -> None:
    values = {index: index << 32 for index in range(count)}
    assert write(vcpu, MsrBlocks(), values) == count
    assert read(vcpu, MsrBlocks(), *values) == values


def test_a_refused_one_is_named_skipped_or_counted(vcpu: FakeVcpu) -> None:
    blocks = MsrBlocks()
    wanted = [*range(300), REFUSED, 300, REFUSED]
    with pytest.raises(MsrRefused, match=r"MSR 0xdeadbeef refused \(300 of 303 done\)"):
        read(vcpu, blocks, *wanted)
    assert list(read(vcpu, blocks, *wanted, skip=True)) == list(range(301))
    assert write(vcpu, blocks, dict.fromkeys(wanted, 1)) == 300
    assert vcpu.msrs == dict.fromkeys(range(300), 1)


@pytest.mark.parametrize("index", [-1, 1 << 32])
def test_what_is_no_index_is_refused(vcpu: FakeVcpu, index: int) -> None:
    with pytest.raises(OverflowError):
        read(vcpu, MsrBlocks(), index)
    with pytest.raises(OverflowError):
        write(vcpu, MsrBlocks(), {index: 0})
    assert vcpu.payloads == []


@pytest.mark.parametrize("value", [-1, 1 << 64])
def test_what_is_no_value_is_refused(vcpu: FakeVcpu, value: int) -> None:
    with pytest.raises(OverflowError):
        write(vcpu, MsrBlocks(), {0x10: value})
    assert vcpu.payloads == []
