"""State of a vCPU and of its VM, got and set on a real /dev/kvm."""

from __future__ import annotations

import pytest
from real_mode_code import HLT

from kvm_ioctl.asm_kvm import (
    KVM_VCPU_TSC_CTRL,
    KVM_VCPU_TSC_OFFSET,
    IrqchipId,
    NestedStateFlags,
    kvm_nested_state,
    kvm_regs,
)
from kvm_ioctl.capabilities import Cap
from kvm_ioctl.handles import Kvm, KvmError, MsrRefused, Vm
from kvm_ioctl.linux_kvm import MpState, kvm_irq_routing_entry

MSR_IA32_SYSENTER_CS = 0x174
MSR_IA32_APICBASE = 0x1B
MSR_NONE = 0xDEADBEEF

pytestmark = pytest.mark.kvm


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
