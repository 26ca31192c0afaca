"""Dirty logs and dirty rings on a real /dev/kvm."""

from __future__ import annotations

import ctypes
import mmap

import pytest

from kvm_ioctl import exits
from kvm_ioctl.capabilities import Cap
from kvm_ioctl.exit_codes import ExitReason
from kvm_ioctl.handles import DirtyPage, Kvm, KvmError, Vm
from kvm_ioctl.linux_kvm import MemFlags

WRITE_TWO_PAGES_HLT = "a20030 a20050 f4"
"""mov [0x3000],al; mov [0x5000],al; hlt"""
WRITE_240_PAGES_HLT = "be0010 8ede c6060000aa 81c60001 75f3 f4 ebfd"
"""Write the first byte of every page from 0x10000 to 0xff000, by way of ds; hlt for ever."""

pytestmark = pytest.mark.kvm


def test_dirty_log_names_written_pages_and_is_then_clear(guest, vm: Vm) -> None:
    machine = guest(WRITE_TWO_PAGES_HLT, MemFlags.KVM_MEM_LOG_DIRTY_PAGES)
    assert machine.vcpu.enter() == exits.HltExit()
    assert vm.get_dirty_log(0, 8) == bytearray([1 << 3 | 1 << 5, 0, 0, 0, 0, 0, 0, 0])
    assert not any(vm.get_dirty_log(0, 8))


def test_dirty_log_cleared_by_hand(guest, vm: Vm) -> None:
    offered = vm.check_extension(Cap.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2)
    if not offered:
        pytest.skip(f"KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 is {offered}")
    vm.enable_cap(Cap.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, args=(1,))
    machine = guest(WRITE_TWO_PAGES_HLT, MemFlags.KVM_MEM_LOG_DIRTY_PAGES)
    machine.vcpu.enter()
    assert vm.get_dirty_log(0, 8)[0] == 1 << 3 | 1 << 5
    vm.clear_dirty_log(0, bytes([1 << 3]), 8)
    assert vm.get_dirty_log(0, 8)[0] == 1 << 5
    with pytest.raises(ValueError, match="a bitmap of 1 bytes is too short for 9 pages"):
        vm.clear_dirty_log(0, b"\0", 9)


def test_dirty_ring_names_written_pages(kvm: Kvm, vm: Vm, guest) -> None:
    limit = vm.check_extension(Cap.KVM_CAP_DIRTY_LOG_RING_ACQ_REL)
    if not limit:
        pytest.skip(f"KVM_CAP_DIRTY_LOG_RING_ACQ_REL is {limit}")
    vm.enable_dirty_ring(65536)
    machine = guest(WRITE_TWO_PAGES_HLT, MemFlags.KVM_MEM_LOG_DIRTY_PAGES)
    ring = machine.vcpu.map_dirty_ring(65536)
    assert ring.harvest() == []
    for _ in range(2):
        assert machine.vcpu.enter() == exits.HltExit()
        assert set(ring.harvest()) == {DirtyPage(0, 0, 3), DirtyPage(0, 0, 5)}
        assert ring.harvest() == []
        assert vm.reset_dirty_rings() == 2
        machine.restart()


def test_dirty_ring_goes_round(vm: Vm, guest) -> None:
    limit = vm.check_extension(Cap.KVM_CAP_DIRTY_LOG_RING_ACQ_REL)
    if not limit:
        pytest.skip(f"KVM_CAP_DIRTY_LOG_RING_ACQ_REL is {limit}")
    ring_bytes = 4096 * 4
    vm.enable_dirty_ring(ring_bytes)
    machine = guest(WRITE_TWO_PAGES_HLT, MemFlags.KVM_MEM_LOG_DIRTY_PAGES)
    ring = machine.vcpu.map_dirty_ring(ring_bytes)
    for _ in range(ring.capacity):  # twice round, at two pages each time
        assert machine.vcpu.enter() == exits.HltExit()
        assert len(ring.harvest()) == 2
        assert vm.reset_dirty_rings() == 2
        machine.restart()


def test_full_dirty_ring_is_an_exit_and_no_page_is_lost(vm: Vm, guest) -> None:
    ring_bytes = 4096
    try:
        vm.enable_dirty_ring(ring_bytes)
    except KvmError as e:
        pytest.skip(f"a ring of {ring_bytes} bytes, which 240 pages overflow, is refused: {e}")
    with_data = mmap.mmap(-1, 0xF0000)
    machine = guest(WRITE_240_PAGES_HLT)
    hva = ctypes.addressof(ctypes.c_char.from_buffer(with_data))
    flags = MemFlags.KVM_MEM_LOG_DIRTY_PAGES
    vm.set_user_memory_region(1, 0x10000, hva, len(with_data), flags)
    ring = machine.vcpu.map_dirty_ring(ring_bytes)
    # Where a KVM looks at its request only on entry, the guest halts first.
    seen = [machine.vcpu.enter().reason for _ in range(3)]
    assert ExitReason.KVM_EXIT_DIRTY_RING_FULL in seen
    pages: set[DirtyPage] = set()
    for _ in range(3):
        pages.update(ring.harvest())
        vm.reset_dirty_rings()
        last = machine.vcpu.enter()
    assert last == exits.HltExit()
    assert pages == {DirtyPage(0, 1, page) for page in range(240)}
    vm.delete_memory_region(1)


def test_dirty_bitmap_is_whole_words(vm: Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vm, "call", lambda request, payload: 0)
    assert [len(vm.get_dirty_log(0, pages)) for pages in (1, 64, 65)] == [8, 8, 16]
