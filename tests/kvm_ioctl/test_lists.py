from __future__ import annotations

import errno
import os

import pytest

from kvm_ioctl.asm_kvm import kvm_cpuid2, kvm_cpuid_entry2
from kvm_ioctl.lists import new_cpuid, read_cpuid
from kvm_ioctl.request import Ioctl, KvmError, VcpuFd
from kvm_ioctl.requests import VcpuRequests

LEAVES = [kvm_cpuid_entry2(function=0), kvm_cpuid_entry2(function=1, eax=5)] * 100


class FakeVcpu(VcpuFd):
    """Answers KVM_GET_CPUID2 like KVM; ``counts`` is whether it says how many entries it gave."""

    def __init__(self, fd: int, leaves: list[kvm_cpuid_entry2], counts: bool, error: int) -> None:
        super().__init__(fd)
        self.leaves, self.counts, self.error = leaves, counts, error
        self.tried: list[int] = []

    def call(self, request: Ioctl, payload: kvm_cpuid2) -> int:  # type: ignore[override]
        self.tried.append(payload.nent)
        if payload.nent < len(self.leaves):
            raise KvmError(self.error, request.name, self.kind)
        for i, leaf in enumerate(self.leaves):
            payload.entries[i] = leaf
        if self.counts:
            payload.nent = len(self.leaves)
        return 0


@pytest.fixture
def fd() -> int:
    return os.open("/dev/null", os.O_RDWR)


@pytest.mark.parametrize("counts", [True, False], ids=["counts", "leaves nent (5.10)"])
@pytest.mark.parametrize("leaves", [[], LEAVES[:3], LEAVES], ids=["none", "few", "many"])
def test_cpuid_has_the_entries_that_kvm_wrote(
    fd: int, leaves: list[kvm_cpuid_entry2], counts: bool
) -> None:
    with FakeVcpu(fd, leaves, counts, errno.E2BIG) as vcpu:
        got = read_cpuid(vcpu, VcpuRequests.KVM_GET_CPUID2)
    assert [bytes(entry) for entry in got] == [bytes(entry) for entry in leaves]


def test_buffer_grows_for_e2big_only(fd: int) -> None:
    with FakeVcpu(fd, LEAVES, True, errno.E2BIG) as vcpu:
        read_cpuid(vcpu, VcpuRequests.KVM_GET_CPUID2)
        assert vcpu.tried == [128, 256]
        vcpu.error = errno.EFAULT
        with pytest.raises(KvmError, match="KVM_GET_CPUID2 on vcpu fd: EFAULT"):
            read_cpuid(vcpu, VcpuRequests.KVM_GET_CPUID2)


def test_new_cpuid_takes_any_iterable() -> None:
    payload = new_cpuid(iter(LEAVES[:2]))
    assert (payload.nent, payload.entries[1].eax) == (2, 5)
