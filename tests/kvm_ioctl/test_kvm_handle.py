"""The system handle on a real /dev/kvm, and what is said when there is none."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from kvm_ioctl.capabilities import Cap
from kvm_ioctl.handles import Kvm, KvmError, KvmOpenError, Vm
from kvm_ioctl.linux_kvm import kvm_userspace_memory_region

MSR_IA32_SYSENTER_CS = 0x174

pytestmark = pytest.mark.kvm


@pytest.mark.parametrize(
    ("make", "error", "why"),
    [
        (lambda path: None, errno.ENOENT, "there is no such file"),
        (lambda path: path.mkdir(), errno.EISDIR, "Is a directory"),
        (lambda path: path.touch(), errno.ENOTTY, "this is not KVM"),
    ],
    ids=["absent", "directory", "file"],
)
def test_unusable_device_is_one_line(
    tmp_path: Path, make: Callable[[Path], None], error: int, why: str
) -> None:
    path = tmp_path / "kvm"
    make(path)
    with pytest.raises(KvmOpenError, match=why) as raised:
        Kvm(str(path))
    assert raised.value.errno == error
    assert str(raised.value).startswith(f"cannot use KVM at {path}: ")


def test_no_permission_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(KvmOpenError, match="no permission; is this user in the group"):
        Kvm()


def test_version_and_capabilities(kvm: Kvm) -> None:
    assert kvm.api_version == 12
    assert kvm.vcpu_mmap_size >= 8192
    assert kvm.check_extension(Cap.KVM_CAP_USER_MEMORY) == 1
    assert kvm.check_extension(Cap.KVM_CAP_PPC_HTM) == 0


def test_supported_cpuid_has_the_vendor_leaf(kvm: Kvm) -> None:
    entries = kvm.supported_cpuid()
    assert {entry.function for entry in entries} >= {0, 1, 0x80000000}
    assert kvm.emulated_cpuid() != entries


def test_msr_lists_grow_until_they_fit(kvm: Kvm) -> None:
    assert MSR_IA32_SYSENTER_CS in kvm.msr_index_list()
    features = kvm.msr_feature_index_list()
    assert set(kvm.get_feature_msrs(features, skip_refused=True)) <= set(features)


def test_msr_list_too_short_is_e2big_and_says_the_length(kvm: Kvm) -> None:
    from kvm_ioctl.asm_kvm import kvm_msr_list

    short = kvm_msr_list.with_tail(1)
    assert kvm.try_call(Kvm.KVM_GET_MSR_INDEX_LIST, short) == errno.E2BIG
    assert short.nmsrs == len(kvm.msr_index_list())


def test_refusals_name_the_request(kvm: Kvm, vm: Vm) -> None:
    with pytest.raises(KvmError, match=r"^KVM_CREATE_VM on system fd: EINVAL \(Invalid argument\)"):
        kvm.create_vm(0x7FFF)
    bad = kvm_userspace_memory_region(memory_size=4095)
    assert vm.try_call(Vm.KVM_SET_USER_MEMORY_REGION, bad) == errno.EINVAL
    vm.create_vcpu(0)
    with pytest.raises(KvmError, match="KVM_CREATE_VCPU on vm fd: EEXIST"):
        vm.create_vcpu(0)


def test_immediate_argument_is_a_whole_unsigned_long(vm: Vm) -> None:
    # KVM compares it with the end of 32 bits: neither sign extension nor truncation passes.
    assert vm.try_call(Vm.KVM_SET_TSS_ADDR, 0xFFFB_D000) == 0
    assert vm.try_call(Vm.KVM_SET_TSS_ADDR, 1 << 32) == errno.EINVAL
    vm.set_identity_map_addr(0xFFFB_C000)
