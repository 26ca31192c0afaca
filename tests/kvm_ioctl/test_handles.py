"""The handles on a real /dev/kvm; nothing here needs SVM, SMM or nesting."""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from kvm_ioctl import exits
from kvm_ioctl.asm_kvm import (
    KVM_VCPU_TSC_CTRL,
    KVM_VCPU_TSC_OFFSET,
    IrqchipId,
    NestedStateFlags,
    kvm_nested_state,
    kvm_regs,
)
from kvm_ioctl.capabilities import Cap
from kvm_ioctl.exit_codes import ExitReason
from kvm_ioctl.handles import (
    ClosedError,
    CoalescedWrite,
    DirtyPage,
    Kvm,
    KvmError,
    KvmOpenError,
    MsrRefused,
    Vcpu,
    Vm,
)
from kvm_ioctl.linux_kvm import (
    GuestDebug,
    MemFlags,
    MpState,
    kvm_irq_routing_entry,
    kvm_userspace_memory_region,
)
from kvm_ioctl.request import Ioctl

MSR_IA32_SYSENTER_CS = 0x174
MSR_IA32_APICBASE = 0x1B
MSR_NONE = 0xDEADBEEF

GuestMaker = Callable[..., "object"]

OUT_IN_STORE_HLT = "b041 e6f8 e4f9 a20090 f4"
"""mov al,0x41; out 0xf8,al; in al,0xf9; mov [0x9000],al; hlt"""

WRITE_TWO_PAGES_HLT = "a20030 a20050 f4"
"""mov [0x3000],al; mov [0x5000],al; hlt"""

WRITE_240_PAGES_HLT = "be0010 8ede c6060000aa 81c60001 75f3 f4 ebfd"
"""Write the first byte of every page from 0x10000 to 0xff000, by way of ds; hlt for ever."""

HLT, SPIN = "f4", "ebfe"

pytestmark = pytest.mark.kvm


# Without a device


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


# KVM itself


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


# Running


def test_port_mmio_and_hlt_exits(guest) -> None:
    vcpu = guest(OUT_IN_STORE_HLT).vcpu
    exit_ = vcpu.enter()
    assert (exit_.port, exit_.data, exit_.is_out) == (0xF8, b"A", True)
    exit_ = vcpu.enter()
    assert (exit_.port, exit_.size, exit_.is_out) == (0xF9, 1, False)
    vcpu.complete_io(b"\x5a")
    assert vcpu.enter() == exits.MmioExit(0x9000, b"\x5a", 1, True)
    assert vcpu.enter() == exits.HltExit()
    assert vcpu.get_regs().rax & 0xFF == 0x5A


def test_mmio_read_is_completed(guest) -> None:
    vcpu = guest("a10090 f4").vcpu  # mov ax,[0x9000]; hlt
    assert vcpu.enter() == exits.MmioExit(0x9000, b"", 2, False)
    with pytest.raises(ValueError, match="the guest reads 2 bytes, got 1"):
        vcpu.complete_mmio(b"\x01")
    vcpu.complete_mmio(b"\x34\x12")
    assert vcpu.enter() == exits.HltExit()
    assert vcpu.get_regs().rax & 0xFFFF == 0x1234


def test_string_out_has_all_its_data(guest) -> None:
    machine = guest("fc b90300 be0020 baf803 f36e f4")  # cld; cx=3; si=0x2000; dx=0x3f8; rep outsb
    machine.ram[0x2000:0x2003] = b"abc"
    data = b""
    while isinstance(exit_ := machine.vcpu.enter(), exits.IoExit):
        data += exit_.data
    assert data == b"abc"
    assert exit_ == exits.HltExit()


def test_triple_fault_is_shutdown(guest) -> None:
    machine = guest("0f0b")  # ud2, in protected mode with an empty IDT
    sregs = machine.vcpu.get_sregs()
    sregs.cr0 |= 1
    sregs.idt.limit = 0
    machine.vcpu.set_sregs(sregs)
    assert machine.vcpu.enter() == exits.ShutdownExit()


def test_single_step_is_a_debug_exit(guest) -> None:
    vcpu = guest("90 90 f4").vcpu
    vcpu.set_guest_debug(GuestDebug.KVM_GUESTDBG_ENABLE | GuestDebug.KVM_GUESTDBG_SINGLESTEP)
    exit_ = vcpu.enter()
    assert isinstance(exit_, exits.DebugExit)
    assert exit_.pc == 0x1001


def test_immediate_exit_is_interrupted(guest) -> None:
    vcpu = guest(SPIN).vcpu
    vcpu.run.immediate_exit = 1
    assert vcpu.enter() == exits.Interrupted()


def test_signal_is_interrupted(guest) -> None:
    vcpu = guest(SPIN).vcpu
    seen = []
    previous = signal.signal(signal.SIGALRM, lambda *_: seen.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
        assert vcpu.enter() == exits.Interrupted()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert seen


def test_interrupt_is_delivered(guest) -> None:
    machine = guest("fb 90 ebfd")  # sti; nop; spin
    machine.ram[0x20 * 4 : 0x20 * 4 + 4] = (0x2000).to_bytes(4, "little")
    machine.ram[0x2000:0x2001] = b"\xf4"
    vcpu = machine.vcpu
    vcpu.run.request_interrupt_window = 1
    assert vcpu.enter() == exits.IrqWindowOpenExit()
    vcpu.run.request_interrupt_window = 0
    vcpu.interrupt(0x20)
    assert vcpu.enter() == exits.HltExit()
    assert vcpu.get_regs().rip == 0x2001


def test_translate_walks_the_guests_mapping(guest) -> None:
    translation = guest(HLT).vcpu.translate(0x1234)
    assert (translation.valid, translation.physical_address) == (1, 0x1234)


def test_nmi_and_kvmclock_ctrl_are_requests(guest) -> None:
    vcpu = guest(HLT).vcpu
    vcpu.nmi()
    events = vcpu.get_vcpu_events()
    assert events.nmi.pending + events.nmi.injected >= 1
    # No guest clock was set up, which KVM says.
    assert vcpu.try_call(Vcpu.KVM_KVMCLOCK_CTRL) == errno.EINVAL


def test_signal_mask_lets_a_blocked_signal_end_kvm_run(guest) -> None:
    vcpu = guest(SPIN).vcpu
    vcpu.set_signal_mask([signal.SIGRTMIN + 3])
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    try:
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR2)
        assert vcpu.enter() == exits.Interrupted()
        assert signal.sigtimedwait({signal.SIGUSR2}, 0) is not None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def test_memory_fault_is_explained_once(guest, monkeypatch: pytest.MonkeyPatch) -> None:
    vcpu = guest(HLT).vcpu
    monkeypatch.setattr(Ioctl, "raw", lambda *_: -errno.EFAULT)
    vcpu.run.exit_reason = ExitReason.KVM_EXIT_MEMORY_FAULT
    vcpu.run.memory_fault.gpa = 0x5000
    exit_ = vcpu.enter()
    assert isinstance(exit_, exits.MemoryFaultExit)
    assert (exit_.gpa, exit_.error) == (0x5000, errno.EFAULT)
    with pytest.raises(KvmError, match="KVM_RUN on vcpu fd: EFAULT"):
        vcpu.enter()


# State


@pytest.mark.parametrize(
    "name",
    ["regs", "sregs", "sregs2", "fpu", "mp_state", "vcpu_events", "debugregs", "xcrs", "xsave"],
)
def test_what_was_got_can_be_set_and_got_again(guest, name: str) -> None:
    vcpu = guest(HLT).vcpu
    before = getattr(vcpu, f"get_{name}")()
    getattr(vcpu, f"set_{name}")(before)
    after = getattr(vcpu, f"get_{name}")()
    assert before.first_difference(after) is None
    assert before.same_as(after)


def test_set_values_are_got_back(guest) -> None:
    vcpu = guest(HLT).vcpu
    vcpu.set_regs(kvm_regs(rax=0x1122334455667788, r15=1 << 63, rip=0x1000, rflags=2))
    regs = vcpu.get_regs()
    assert (regs.rax, regs.r15) == (0x1122334455667788, 1 << 63)
    debugregs = vcpu.get_debugregs()
    debugregs.db[2] = 0xCAFE
    vcpu.set_debugregs(debugregs)
    assert vcpu.get_debugregs().db[2] == 0xCAFE


def test_xsave_has_the_length_that_kvm_says_and_carries_values(guest, vm: Vm) -> None:
    vcpu = guest(HLT).vcpu
    xsave = vcpu.get_xsave()
    assert xsave.allocated_bytes >= max(vm.check_extension(Cap.KVM_CAP_XSAVE2), 4096)
    xsave.region[0] = 0x27F  # FCW
    xsave.region[128] |= 1  # XSTATE_BV.FP
    vcpu.set_xsave(xsave)
    assert vcpu.get_fpu().fcw == 0x27F


def test_msrs_round_trip(guest) -> None:
    vcpu = guest(HLT).vcpu
    assert vcpu.set_msrs({MSR_IA32_SYSENTER_CS: 0x1234}) == 1
    values = vcpu.get_msrs([MSR_IA32_SYSENTER_CS, MSR_IA32_APICBASE])
    assert values[MSR_IA32_SYSENTER_CS] == 0x1234
    assert values[MSR_IA32_APICBASE] & ~0xFFF == 0xFEE00000


def test_refused_msr_is_named_skipped_or_counted(guest) -> None:
    vcpu = guest(HLT).vcpu
    wanted = [MSR_IA32_APICBASE, MSR_NONE, MSR_IA32_SYSENTER_CS]
    with pytest.raises(MsrRefused, match=r"MSR 0xdeadbeef refused \(1 of 3 done\)"):
        vcpu.get_msrs(wanted)
    assert list(vcpu.get_msrs(wanted, skip_refused=True)) == [wanted[0], wanted[2]]
    assert vcpu.set_msrs({MSR_IA32_SYSENTER_CS: 1, MSR_NONE: 1, MSR_IA32_APICBASE: 0}) == 1


def test_more_msrs_than_kvm_takes_at_once(guest) -> None:
    vcpu = guest(HLT).vcpu
    many = [MSR_IA32_SYSENTER_CS] * 600
    assert vcpu.get_msrs(many) == {MSR_IA32_SYSENTER_CS: 0}
    with pytest.raises(MsrRefused, match=r"\(600 of 601 done\)"):
        vcpu.get_msrs([*many, MSR_NONE])


def test_cpuid_round_trip(guest, kvm: Kvm) -> None:
    vcpu = guest(HLT).vcpu
    entries = [entry for entry in kvm.supported_cpuid() if entry.function in (0, 1, 0x80000000)]
    vcpu.set_cpuid2(entries)
    got = vcpu.get_cpuid2()
    # KVM may complete what it is given, but not reorder it.
    assert [entry.function for entry in got[:3]] == [0, 1, 0x80000000]
    assert got[0].same_as(entries[0])


def test_lapic_and_irqchip_round_trip(vm: Vm) -> None:
    vm.create_irqchip()
    vm.create_pit2()
    vcpu = vm.create_vcpu(0)
    lapic = vcpu.get_lapic()
    lapic.regs[0x80] = 0x20  # TPR
    vcpu.set_lapic(lapic)
    assert vcpu.get_lapic().regs[0x80] == 0x20
    for chip_id in IrqchipId:
        chip = vm.get_irqchip(chip_id)
        vm.set_irqchip(chip)
        assert vm.get_irqchip(chip_id).same_as(chip)
    pit = vm.get_pit2()
    vm.set_pit2(pit)
    vm.irq_line(5, 1)
    assert vm.get_irqchip(IrqchipId.KVM_IRQCHIP_PIC_MASTER).chip.pic.irr & 1 << 5


def test_gsi_routing_is_taken_whole(vm: Vm) -> None:
    vm.create_irqchip()
    route = kvm_irq_routing_entry(gsi=5, type=1)
    route.u.irqchip.irqchip, route.u.irqchip.pin = IrqchipId.KVM_IRQCHIP_IOAPIC, 5
    vm.set_gsi_routing([route])
    route.type = 99
    with pytest.raises(KvmError, match="KVM_SET_GSI_ROUTING on vm fd: EINVAL"):
        vm.set_gsi_routing([route])


def test_halted_vcpu_says_so(guest) -> None:
    vcpu = guest(HLT).vcpu
    assert vcpu.get_mp_state().mp_state == MpState.KVM_MP_STATE_RUNNABLE


def test_clock_and_tsc(guest, vm: Vm) -> None:
    vcpu = guest(HLT).vcpu
    clock = vm.get_clock()
    clock.clock += 10**12
    clock.flags = 0
    vm.set_clock(clock)
    assert vm.get_clock().clock >= 10**12
    assert vcpu.get_tsc_khz() > 1000


def test_tsc_offset_round_trip(guest, vm: Vm) -> None:
    vcpu = guest(HLT).vcpu
    control = vm.check_extension(Cap.KVM_CAP_TSC_CONTROL)
    if not control:
        pytest.skip(f"KVM_CAP_TSC_CONTROL is {control}: this KVM may keep the TSC as it is")
    vcpu.set_tsc_offset(0x1000)
    assert vcpu.get_tsc_offset() == 0x1000


def test_attributes_exist_or_not(guest) -> None:
    vcpu = guest(HLT).vcpu
    assert vcpu.has_attr(KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET)
    assert not vcpu.has_attr(KVM_VCPU_TSC_CTRL, 1)
    assert isinstance(vcpu.get_tsc_offset(), int)


def test_nested_state_or_its_refusal(guest, vm: Vm) -> None:
    vcpu = guest(HLT).vcpu
    if vm.check_extension(Cap.KVM_CAP_NESTED_STATE) == 0:
        with pytest.raises(KvmError, match="KVM_GET_NESTED_STATE on vcpu fd: EINVAL"):
            vcpu.get_nested_state()
        return
    state = vcpu.get_nested_state()
    assert state.size == 128
    assert state.allocated_bytes >= 4224
    assert not state.flags & NestedStateFlags.KVM_STATE_NESTED_GUEST_MODE
    vcpu.set_nested_state(state)


@pytest.mark.parametrize("offered", [0, 128, 4224, 8320])
def test_nested_state_buffer_is_always_whole(
    guest, monkeypatch: pytest.MonkeyPatch, offered: int
) -> None:
    vcpu = guest(HLT).vcpu
    asked: list[kvm_nested_state] = []
    monkeypatch.setattr(vcpu, "call", lambda request, state: asked.append(state.copy()))
    monkeypatch.setattr(vcpu.vm, "check_extension", lambda cap: offered)
    vcpu.get_nested_state()
    assert asked[-1].size == asked[-1].allocated_bytes == max(offered, 4224)


# Memory


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


def test_dirty_bitmap_is_whole_words(vm: Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vm, "call", lambda request, payload: 0)
    assert [len(vm.get_dirty_log(0, pages)) for pages in (1, 64, 65)] == [8, 8, 16]


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


def test_coalesced_writes_are_collected_in_order(guest, vm: Vm) -> None:
    vm.register_coalesced_pio(0xF8, 1)
    machine = guest("b041 e6f8 b042 e6f8 f4")
    ring = machine.vcpu.coalesced_ring()
    assert machine.vcpu.enter() == exits.HltExit()
    assert ring.drain() == [CoalescedWrite(0xF8, b"A", True), CoalescedWrite(0xF8, b"B", True)]
    assert ring.drain() == []


def test_coalesced_ring_goes_round(guest, vm: Vm) -> None:
    vm.register_coalesced_mmio(0x9000, 8)
    machine = guest("b041 a20090 fec0 ebf9")  # al=0x41; store; inc al; loop
    ring = machine.vcpu.coalesced_ring()
    collected = []
    for _ in range(4):
        # A full ring exits; what did not fit comes as an exit.
        exit_ = machine.vcpu.enter()
        collected += [write.data[0] for write in ring.drain()] + [exit_.data[0]]
    assert collected == [(0x41 + i) & 0xFF for i in range(len(collected))]
    assert len(collected) > 2 * ring.capacity


# Statistics


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


# Lifetime


def open_fds() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def test_closing_a_vm_closes_what_was_made_from_it(kvm: Kvm) -> None:
    gc.collect()
    before = open_fds()
    vm = kvm.create_vm()
    vcpu = vm.create_vcpu(0)
    stats = vcpu.stats()
    vm.close()
    vm.close()
    assert (vcpu.closed, stats.closed) == (True, True)
    assert open_fds() == before


def test_closed_handles_say_so(vm: Vm) -> None:
    vcpu = vm.create_vcpu(0)
    vcpu.close()
    vcpu.close()
    for use in (vcpu.enter, vcpu.get_regs, lambda: vcpu.run, vcpu.coalesced_ring):
        with pytest.raises(ClosedError, match="this vcpu fd is closed"):
            use()


def test_run_page_that_someone_still_holds_stays_readable(vm: Vm) -> None:
    vcpu = vm.create_vcpu(0)
    run = vcpu.run
    vcpu.close()
    assert run.exit_reason == 0


def test_many_vms_leave_nothing_behind(kvm: Kvm) -> None:
    gc.collect()
    before = open_fds()
    for _ in range(50):
        with kvm.create_vm() as vm, vm.create_vcpu(0) as vcpu:
            vcpu.get_regs()
    assert open_fds() == before


# The GIL

GIL_PROGRAM = Path(__file__).with_name("gil_program.py")
GIL_DEADLINE_S = 60


def test_waiting_for_a_running_vcpu_does_not_stop_other_threads(kvm: Kvm) -> None:
    """KVM_GET_XSAVE waits for KVM_RUN to end; who would end it must be able to run."""
    done = subprocess.run(
        [sys.executable, str(GIL_PROGRAM)],
        timeout=GIL_DEADLINE_S,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "kicked out while waiting\n"
