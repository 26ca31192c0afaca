"""Memory slots, guest_memfd and devices on a real /dev/kvm."""

from __future__ import annotations

import errno
import os

import pytest

from kvm_ioctl.capabilities import Cap
from kvm_ioctl.handles import Kvm, KvmError, Vcpu, Vm
from kvm_ioctl.linux_kvm import kvm_userspace_memory_region

pytestmark = pytest.mark.kvm


def test_memory_region_can_be_deleted(guest, vm: Vm) -> None:
    machine = guest("a20030 f4")
    vm.delete_memory_region(0)
    assert machine.vcpu.try_call(Vcpu.KVM_RUN) in (0, errno.EFAULT)
    assert vm.try_call(Vm.KVM_SET_USER_MEMORY_REGION, kvm_userspace_memory_region()) == errno.EINVAL


@pytest.mark.parametrize(("as_id", "slot_id"), [(0, 5), (1, 0x10005)])
def test_address_space_is_the_upper_half_of_the_slot(
    vm: Vm, monkeypatch: pytest.MonkeyPatch, as_id: int, slot_id: int
) -> None:
    asked = []
    monkeypatch.setattr(vm, "call", lambda request, payload: asked.append((request, payload)))
    vm.set_user_memory_region(5, 0x1000, 0x2000, 0x3000, 2, as_id=as_id)
    vm.delete_memory_region(5, as_id=as_id)
    vm.get_dirty_log(5, 65, as_id=as_id)
    vm.clear_dirty_log(5, bytes(9), 65, 64, as_id=as_id)
    assert {payload.slot for _, payload in asked} == {slot_id}
    region = asked[0][1]
    assert (region.guest_phys_addr, region.userspace_addr) == (0x1000, 0x2000)
    assert (region.memory_size, region.flags) == (0x3000, 2)
    assert asked[1][1].memory_size == 0
    assert (asked[3][1].num_pages, asked[3][1].first_page) == (65, 64)


def test_guest_memfd_is_closed_with_its_vm(kvm: Kvm) -> None:
    offered = kvm.check_extension(Cap.KVM_CAP_GUEST_MEMFD)
    if not offered:
        pytest.skip(f"KVM_CAP_GUEST_MEMFD is {offered}")
    with kvm.create_vm() as vm:
        memfd = vm.create_guest_memfd(0x2000)
        assert os.fstat(memfd.fileno()).st_size == memfd.size_bytes == 0x2000
    assert memfd.closed


def test_unknown_device_is_refused(vm: Vm) -> None:
    with pytest.raises(KvmError, match="KVM_CREATE_DEVICE on vm fd: ENODEV"):
        vm.create_device(9999)
