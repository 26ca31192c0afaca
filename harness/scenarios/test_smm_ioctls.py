"""SMM as userspace sees and sets it: vCPU events, nested state, SREGS, reset, a missing SMRAM.

Kernel: kvm_vcpu_ioctl_x86_set_vcpu_events(), kvm_smm_changed(), svm_leave_nested(),
svm_get_nested_state(), svm_set_nested_state(), enter_smm(), shutdown_interception().
"""

from __future__ import annotations

import errno
from typing import Final

from harness.errors import ScenarioFailure
from harness.facts import nested_svm, smm
from harness.machine.hang import VcpuTimeout
from harness.machine.memory import SMRAM_AS_ID
from harness.proxy.l1_entry import enter_l1
from harness.proxy.machine import ProxyMachine
from harness.proxy.ops import instruction
from harness.proxy.program import load, nop, read_cr, triple_fault
from harness.scenarios.case import scenario
from harness.scenarios.context import Context
from harness.scenarios.l2 import gif_of, proxy_machine
from harness.scenarios.migration_stops import change_events, nested_flags, outcome
from harness.scenarios.smi import events_of
from harness.storm.smi import count_smis
from harness.svm.msrs import Efer, Msr
from harness.svm.smram import DEFAULT_SMBASE
from kvm_ioctl.asm_kvm import (
    NestedStateFlags,
    RunFlags,
    kvm_nested_state,
    kvm_regs,
    kvm_vcpu_events,
)
from kvm_ioctl.exits import ShutdownExit
from kvm_ioctl.handles import Vcpu
from kvm_ioctl.request import KvmError

LEVELS: Final = (1, 2)
"""The level that is current, or that the SMI interrupts."""
HANG_S: Final = 10.0
_NESTED_HEADER_BYTES: Final = 128
"""Size of KVM_GET_NESTED_STATE's answer outside guest mode."""
_BOOL: Final = (0, 1)


def _in_guest_mode(machine: ProxyMachine) -> bool:
    return bool(nested_flags(machine) & NestedStateFlags.KVM_STATE_NESTED_GUEST_MODE)


# KVM_SET_VCPU_EVENTS


@scenario(
    needs=[nested_svm, smm],
    axes={
        "level": LEVELS, "smm": _BOOL, "pending": _BOOL, "inside_nmi": _BOOL, "latched_init": _BOOL,
    },
    levels=2,
)  # fmt: skip
def test_smi_events_are_read_back_as_they_were_set(
    context: Context, level: int, smm: int, pending: int, inside_nmi: int, latched_init: int
) -> None:
    """Every combination of kvm_vcpu_events.smi is taken and given back; entering SMM leaves L2."""
    machine = proxy_machine(context, smm=True, irqchip=True)
    machine.level(level, npt=False).ping()
    wanted = (smm, pending, inside_nmi, latched_init)

    def change(events: kvm_vcpu_events) -> None:
        smi = events.smi
        smi.smm, smi.pending, smi.smm_inside_nmi, smi.latched_init = wanted

    change_events(machine, change)
    seen = events_of(machine).smi
    context.expect("smm, pending", (seen.smm, seen.pending), (smm, pending))
    # Inside an NMI is what SMM is in, so outside of SMM it says nothing.
    context.expect("smm_inside_nmi", seen.smm_inside_nmi, inside_nmi & smm)
    context.expect("latched_init", seen.latched_init, latched_init)
    context.expect("GUEST_MODE", _in_guest_mode(machine), level == 2 and not smm)


@scenario(needs=[nested_svm, smm], axes={"npt": (True, False)}, levels=2)
def test_entering_smm_by_ioctl_leaves_l2_for_good(context: Context, npt: bool) -> None:
    """Set and cleared with L2 current, smi.smm ends guest mode and leaves EFER and memory alone."""
    machine = proxy_machine(context, smm=True)
    vcpu = machine.vcpus[0].vcpu
    machine.level(2, npt=npt).ping()
    machine.vcpus[0].finish_io()
    before = vcpu.get_sregs().efer
    for wanted in (1, 0):
        _set_smm(machine, wanted)
        context.expect("smi.smm", events_of(machine).smi.smm, wanted)
        context.expect("GUEST_MODE", _in_guest_mode(machine), False)
        context.expect("EFER", Efer(vcpu.get_sregs().efer), Efer(before))
    _start_l1_again(machine)
    context.expect("L1 alive", machine.l1.ping(), True)
    l2 = machine.l1.launch(npt=npt)
    context.expect("another L2 answers", l2.ping(), True)


@scenario(needs=[nested_svm, smm], axes={"npt": (True, False)}, levels=2)
def test_l2_comes_back_after_smm_by_ioctl(context: Context, npt: bool) -> None:
    """After a forced leave L2 goes on from its saved state: SREGS, REGS, NESTED_STATE."""
    machine = proxy_machine(context, smm=True)
    vcpu = machine.vcpus[0].vcpu
    l2 = machine.level(2, npt=npt)
    l2.ping()
    machine.vcpus[0].finish_io()
    sregs, regs, nested = vcpu.get_sregs(), vcpu.get_regs(), vcpu.get_nested_state()
    for wanted in (1, 0):
        _set_smm(machine, wanted)
    vcpu.set_sregs(sregs)
    vcpu.set_regs(regs)
    vcpu.call(vcpu.KVM_SET_NESTED_STATE, nested)
    context.expect("GUEST_MODE", _in_guest_mode(machine), True)
    context.expect("L2 answers", l2.ping(), True)
    context.expect("L1 answers", machine.l1.ping(), True)


def _set_smm(machine: ProxyMachine, value: int) -> None:
    def change(events: kvm_vcpu_events) -> None:
        events.smi.smm = value

    change_events(machine, change)


@scenario(needs=[nested_svm, smm], axes={"level": LEVELS}, levels=2)
def test_smi_pending_by_ioctl_is_taken(context: Context, level: int) -> None:
    """KVM_SET_VCPU_EVENTS of smi.pending=1 is an SMI; of 0, it takes KVM_SMI back."""
    machine = proxy_machine(context, smm=True)
    guest = machine.level(level, npt=False)
    guest.ping()
    seen = count_smis(machine)

    def pend(events: kvm_vcpu_events) -> None:
        events.smi.pending = 1

    def withdraw(events: kvm_vcpu_events) -> None:
        events.smi.pending = 0

    change_events(machine, pend)
    guest.run(nop())
    context.expect("SMIs", [smi.level for smi in seen], [guest.name])
    machine.vcpus[0].vcpu.smi()
    context.expect("pending after KVM_SMI", events_of(machine).smi.pending, 1)
    change_events(machine, withdraw)
    guest.run(nop())
    context.expect("SMIs", len(seen), 1)


# In SMM


@scenario(needs=[nested_svm, smm], axes={"level": LEVELS}, levels=2)
def test_nested_state_in_smm_is_a_header(context: Context, level: int) -> None:
    """In SMM there is no guest mode to read or to set, and what was read can be set again."""
    machine = proxy_machine(context, smm=True)
    vcpu = machine.vcpus[0].vcpu
    machine.l1.enable_svm()
    guest = machine.level(level, npt=False)
    guest.ping()
    machine.vcpus[0].finish_io()
    outside = vcpu.get_nested_state()
    handler = machine.inject_smi()
    machine.vcpus[0].finish_io()
    inside = vcpu.get_nested_state()
    flags = vcpu.run.flags & RunFlags.KVM_RUN_X86_SMM
    context.expect("KVM_RUN_X86_SMM", flags, RunFlags.KVM_RUN_X86_SMM)
    context.note("GIF in SMM", gif=gif_of(handler))
    context.expect("size", inside.size, _NESTED_HEADER_BYTES)
    context.expect("GUEST_MODE", _in_guest_mode(machine), False)
    if level == 2:
        context.expect("GUEST_MODE set", _errno_of(vcpu, outside), "EINVAL", str)
    context.expect("what was read, set", _errno_of(vcpu, inside), "0", str)
    context.expect("RSM goes on at", handler.rsm().name, guest.name)
    context.expect("it lives", guest.ping(), True)
    context.expect("L1 alive", machine.l1.ping(), True)


def _errno_of(vcpu: Vcpu, state: kvm_nested_state) -> str:
    code = vcpu.try_call(vcpu.KVM_SET_NESTED_STATE, state)
    return errno.errorcode[code] if code else "0"


@scenario(needs=[nested_svm, smm], axes={"level": LEVELS}, levels=2)
def test_sregs_can_be_set_in_smm(context: Context, level: int) -> None:
    """KVM_SET_SREGS in SMM changes the handler's registers, and RSM brings back the others."""
    machine = proxy_machine(context, smm=True)
    machine.l1.enable_svm()
    guest = machine.level(level, npt=False)
    guest.write_cr(8, 3)
    guest.write(guest.scratch, 0x77)
    handler = machine.inject_smi()
    machine.vcpus[0].finish_io()
    vcpu = machine.vcpus[0].vcpu
    sregs = vcpu.get_sregs()
    context.expect("EFER.SVME in SMM", Efer(sregs.efer).SVME, 0)
    sregs.cr2 = 0x5000
    vcpu.set_sregs(sregs)
    context.expect("CR2 in SMM", handler.do(read_cr(2)).value, 0x5000, hex)
    context.expect("in SMM", events_of(machine).smi.smm, 1)
    context.expect("RSM goes on at", handler.rsm().name, guest.name)
    context.expect("its memory", guest.do(load(guest.scratch)).value, 0x77, hex)
    context.expect("its CR8", guest.read_cr(8), 3)
    context.expect("EFER.SVME", Efer(guest.rdmsr(Msr.MSR_EFER)).SVME, 1)
    context.expect("L1 alive", machine.l1.ping(), True)


# Reset


@scenario(
    needs=[nested_svm, smm],
    axes={"level": LEVELS, "first": ("KVM_SET_VCPU_EVENTS", "KVM_SET_SREGS")},
    levels=2,
)
def test_reset_by_userspace_in_smm_starts_afresh(context: Context, level: int, first: str) -> None:
    """A vCPU that userspace resets in SMM is out of it, and hosts guests again afterwards."""
    machine = proxy_machine(context, smm=True)
    machine.level(level, npt=False).ping()
    with context.kvm.create_vm() as vm, vm.create_vcpu(0) as pristine:
        sregs = pristine.get_sregs()
    machine.inject_smi()
    machine.vcpus[0].finish_io()
    vcpu = machine.vcpus[0].vcpu
    if first == "KVM_SET_VCPU_EVENTS":
        _set_smm(machine, 0)
        vcpu.set_sregs(sregs)
    else:
        vcpu.set_sregs(sregs)
        _set_smm(machine, 0)
    vcpu.set_regs(kvm_regs(rip=0xFFF0, rflags=2))
    context.expect("smi.smm", events_of(machine).smi.smm, 0)
    context.expect("GUEST_MODE", _in_guest_mode(machine), False)
    context.expect("EFER.SVME", Efer(vcpu.get_sregs().efer).SVME, 0)
    _start_l1_again(machine)
    context.expect("another L2 answers", machine.l1.launch(npt=False).ping(), True)
    context.expect("RSM goes on at", machine.inject_smi().rsm().name, "L2")


def _start_l1_again(machine: ProxyMachine) -> None:
    """Enter L1's proxy from its start, with EFER.SVME, whatever the vCPU was at."""
    cpu = machine.cpus[0]
    cpu.current = cpu.l1.entered = None
    enter_l1(cpu.runner.vcpu, cpu.l1.context, irqchip=machine.irqchip)
    cpu.wait_report(machine.timeout_s)
    cpu.l1.wrmsr(Msr.MSR_EFER, Efer(cpu.l1.rdmsr(Msr.MSR_EFER)).replace(SVME=1))


@scenario(needs=[nested_svm, smm], axes={"level": LEVELS, "intercepted": (False, True)}, levels=2)
def test_triple_fault_in_smm_is_a_shutdown(context: Context, level: int, intercepted: bool) -> None:
    """A triple fault of the SMI handler is KVM_EXIT_SHUTDOWN, and never L1's to see."""
    machine = proxy_machine(context, smm=True)
    guest = machine.l1
    if level == 2:
        guest = machine.l1.launch(vmcb={"intercept.shutdown": int(intercepted)}, npt=False)
    guest.ping()
    handler = machine.inject_smi()
    seen = outcome(handler, triple_fault())
    context.expect("KVM_RUN ends in", str(seen), str(ShutdownExit()))
    context.note("after it", smm=events_of(machine).smi.smm, guest_mode=_in_guest_mode(machine))
    other = proxy_machine(context, smm=True)
    context.expect("another VM lives", other.inject_smi() and other.smm.rsm().name, "L1")


# No SMRAM


@scenario(
    needs=[nested_svm, smm],
    axes={"level": LEVELS, "slot": ("absent", "removed", "removed_in_smm")},
    levels=2,
    unsafe=True,
)
def test_smi_without_smram_ends_one_vm_at_most(context: Context, level: int, slot: str) -> None:
    """With no memory behind SMBASE an SMI or RSM ends this VM's run; the host and others live."""
    machine = proxy_machine(context, smm=slot != "absent", timeout_s=HANG_S)
    machine.l1.enable_svm()
    machine.level(level, npt=False).ping()
    if slot == "removed_in_smm":
        handler = machine.inject_smi()
        # Where memory is that stays: the handler's own page is about to go.
        code = handler.instance.put_code(instruction("RSM").code)
        regs = machine.vcpus[0].vcpu.get_regs()
        regs.rip = code
        machine.vcpus[0].finish_io()
        machine.vcpus[0].vcpu.set_regs(regs)
    if slot != "absent":
        for place in machine.memory.slots(SMRAM_AS_ID):
            if place.gpa == DEFAULT_SMBASE:
                machine.memory.remove(place)
    if slot != "removed_in_smm":
        machine.vcpus[0].vcpu.smi()
    fate = _fate(machine)
    context.note("KVM_RUN", ended_in=fate)
    if fate.startswith("EIO"):
        again = machine.vcpus[0].vcpu.try_call(machine.vcpus[0].vcpu.KVM_GET_REGS, kvm_regs())
        context.expect("a later ioctl", errno.errorcode.get(again, "0"), "EIO", str)
    other = proxy_machine(context, smm=True)
    other.level(2, npt=False).ping()
    context.expect("RSM in another VM goes on at", other.inject_smi().rsm().name, "L2")


def _fate(machine: ProxyMachine) -> str:
    """Run a vCPU and return how that ended.

    Raises ScenarioFailure: it did not.
    """
    try:
        return str(machine.vcpus[0].run(HANG_S))
    except KvmError as e:
        return errno.errorcode.get(e.errno or 0, "?")
    except VcpuTimeout as e:
        raise ScenarioFailure(f"KVM_RUN does not end: {e}") from e
