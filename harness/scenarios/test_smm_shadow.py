"""What a context was in the middle of when an SMI came: shadows, exceptions, halts, single steps.

APM vol. 2, 10.2.3 SMRAM State-Save Area, 10.3 Using SMM (Exceptions and Interrupts, Auto-Halt
Restart), 15.21.5 Interrupt Shadows. Kernel: enter_smm(), rsm_load_state_64(),
kvm_vcpu_has_events(); commit fb28875fd7da ("KVM: x86: smm: preserve interrupt shadow in SMRAM",
6.2).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

from harness.errors import ScenarioFailure
from harness.facts import nested_svm, smm
from harness.machine.threads import VcpuThread
from harness.proxy.apic import Apic, Delivery
from harness.proxy.level import Level
from harness.proxy.machine import ProxyMachine
from harness.proxy.ops import Policy, instruction
from harness.proxy.program import DB, UD, Result, nop, wait_interrupt
from harness.scenarios.case import scenario
from harness.scenarios.context import Context
from harness.scenarios.l2 import proxy_machine
from harness.scenarios.migration_stops import (
    STOP_PORT,
    change_events,
    step_to,
    wait_halted,
)
from harness.scenarios.smi import SINGLE_STEPS, Log, events_of, expect_unnoticed, step_over_rsm
from harness.storm.smi import count_smis, levels_hit, send_message
from harness.svm.exit_codes import ExitCode, describe
from kvm_ioctl.asm_kvm import InterruptShadow, kvm_vcpu_events
from kvm_ioctl.exits import DebugExit

LEVELS: Final = (1, 2)
"""The level that the SMI interrupts."""
VECTOR: Final = 0x41
_SMI_S: Final = 10.0
_POLL_S: Final = 0.01
_RFLAGS_TF: Final = 1 << 8
_NOP: Final = instruction("NOP1").code
_OUT: Final = bytes((0xE6, STOP_PORT))

# Interrupt shadows


@scenario(needs=[nested_svm, smm], axes={"shadow": ("STI", "MOV_SS"), "level": LEVELS}, levels=2)
def test_interrupt_shadow_is_kept_over_an_smi(context: Context, shadow: str, level: int) -> None:
    """An interrupt shadow that KVM_SET_VCPU_EVENTS sets is in the save area, and back after RSM."""
    machine = proxy_machine(context, smm=True)
    machine.level(level, npt=False).ping()

    def change(events: kvm_vcpu_events) -> None:
        events.interrupt.shadow = InterruptShadow[f"KVM_X86_SHADOW_INT_{shadow}"]

    change_events(machine, change)
    given = events_of(machine).interrupt.shadow
    handler = machine.inject_smi()
    context.expect("shadow in the save area", handler.save_area.int_shadow, given)
    step_over_rsm(handler)
    context.expect("shadow after RSM", events_of(machine).interrupt.shadow, given)


# Exceptions


@scenario(
    needs=[nested_svm, smm],
    axes={"level": LEVELS, "intercepted": (False, True)},
    levels=2,
)
def test_pending_exception_and_smi_are_both_taken(
    context: Context, level: int, intercepted: bool
) -> None:
    """With an exception about to be delivered an SMI comes besides: each is taken once."""
    machine = proxy_machine(context, smm=True)
    guest = machine.l1
    if level == 2:
        guest = machine.l1.launch(vmcb={"intercept.excp.6": int(intercepted)}, npt=False)
    guest.set_policy(UD, Policy.COUNT)
    guest.ping()

    def change(events: kvm_vcpu_events) -> None:
        events.exception.injected, events.exception.nr = 1, UD

    change_events(machine, change)
    seen = count_smis(machine)
    machine.vcpus[0].vcpu.smi()
    guest.run(nop())
    context.expect("#UDs taken", guest.counted(UD), 1)
    context.expect("SMIs", [smi.level for smi in seen], [guest.name])


@scenario(needs=[nested_svm, smm], axes={"intercepted": (False, True)}, levels=2)
def test_exception_of_l2_and_smi_are_both_taken(context: Context, intercepted: bool) -> None:
    """An SMI at the instruction of L2 that raises an exception: both come, in either order."""
    machine = proxy_machine(context, smm=True)
    l2 = machine.l1.launch(vmcb={"intercept.excp.6": int(intercepted)}, npt=False)
    l2.set_policy(UD, Policy.FAULT)
    l2.ping()
    op = l2.exec_op(_NOP + instruction("UD2").code, user=False)
    l2.instance.send([op])
    step_to(l2, op.args[-1] + 1)
    seen = count_smis(machine)
    machine.vcpus[0].vcpu.smi()
    results = l2.go_on()
    context.expect("SMIs", len(seen), 1)
    if intercepted:
        exit_ = "none" if l2.exit is None else l2.exit.name
        context.expect("exit", exit_, describe(ExitCode.SVM_EXIT_EXCP_BASE + UD), str)
        context.expect("RIP of the exit", l2.exit and l2.exit.vmcb["rip"], op.args[-1] + 1)
    else:
        context.expect("exception", isinstance(results, list) and results[0].vector, UD)


# HLT


def _halt(machine: ProxyMachine, level: int) -> tuple[Level, VcpuThread[list[Result]]]:
    """Let a level halt with IF=1, in a thread."""
    Apic(machine.l1).enable()
    guest = machine.level(level, npt=False)
    Apic(guest)
    guest.ping()
    program = wait_interrupt(VECTOR, hlt=True)
    thread = machine.in_thread(guest, lambda mine: mine.run(program))
    wait_halted(machine)
    return guest, thread


def _wait_for_one(seen: Sequence[object]) -> None:
    """Wait until a handler in another thread has noted an SMI.

    Raises ScenarioFailure: it does not.
    """
    deadline = time.monotonic() + _SMI_S
    while not seen:
        if time.monotonic() > deadline:
            raise ScenarioFailure(f"no SMI was handled within {_SMI_S:g} s")
        time.sleep(_POLL_S)


@scenario(needs=[nested_svm, smm], axes={"level": LEVELS}, levels=2)
def test_smi_reaches_a_halted_vcpu(context: Context, level: int) -> None:
    """A vCPU that has halted, L2's HLT not intercepted, handles an SMI and can still be woken."""
    machine = proxy_machine(context, smm=True, irqchip=True)
    seen = count_smis(machine)
    guest, thread = _halt(machine, level)
    send_message(machine, Delivery.SMI)
    _wait_for_one(seen)
    machine.interrupt(VECTOR)
    context.expect("the wait", thread.join(machine.timeout_s)[0].ok, True)
    context.expect("SMIs", [smi.level for smi in seen], [guest.name])
    context.expect("L1 alive", machine.l1.ping(), True)


@scenario(needs=[nested_svm, smm], axes={"level": LEVELS}, levels=2)
def test_save_area_tells_of_a_halt(context: Context, level: int) -> None:
    """The save area's auto-halt-restart byte is 1 if the SMI came while the vCPU was halted."""
    machine = proxy_machine(context, smm=True, irqchip=True)
    restart: list[int] = []
    machine.smm.handler = lambda handler: restart.append(handler.save_area.auto_hlt_restart)
    _, thread = _halt(machine, level)
    send_message(machine, Delivery.SMI)
    _wait_for_one(restart)
    machine.interrupt(VECTOR)
    thread.join(machine.timeout_s)
    context.expect("auto_hlt_restart", restart, [1])


# Single steps


@scenario(needs=[nested_svm, smm], axes={"level": LEVELS, "npt": (True, False)}, levels=2)
def test_single_steps_of_userspace_go_through_smm(context: Context, level: int, npt: bool) -> None:
    """KVM_GUESTDBG_SINGLESTEP steps into the handler and out of it, and the guest sees no TF."""
    machine = proxy_machine(context, smm=True)
    guest = machine.level(level, npt=npt)
    guest.ping()
    op = guest.exec_op(3 * _NOP, user=False)
    guest.instance.send([op])
    at = op.args[-1] + 1
    step_to(guest, at)
    runner = machine.vcpus[0]
    runner.vcpu.set_guest_debug(SINGLE_STEPS)
    runner.vcpu.smi()
    exit_ = runner.step(machine.timeout_s)
    context.expect("the step ends in", type(exit_).__name__, DebugExit.__name__, str)
    context.expect("in SMM", events_of(machine).smi.smm, 1)
    area = machine.smm.save_area
    context.expect("RIP saved", area.rip, at, hex)
    context.expect("TF saved", bool(area.rflags & _RFLAGS_TF), False)
    runner.vcpu.set_guest_debug(0)
    machine.cpus[0].wait_report(machine.timeout_s)
    step_over_rsm(machine.smm)
    context.expect("RIP after RSM", runner.vcpu.get_regs().rip, at, hex)
    results = guest.go_on()
    context.expect("the program", isinstance(results, list) and results[0].ok, True)
    context.expect("#DBs in the guest", guest.counted(DB), 0)


@scenario(needs=[nested_svm, smm], axes={"level": LEVELS, "npt": (True, False)}, levels=2)
def test_trap_flag_of_the_guest_goes_on_after_smis(context: Context, level: int, npt: bool) -> None:
    """A guest that single-steps itself has as many #DBs with SMIs in between as without."""

    def journey(machine: ProxyMachine, log: Log) -> None:
        machine.l1.enable_svm()
        guest = machine.level(level, npt=npt)
        guest.set_policy(DB, Policy.COUNT)
        guest.ping()
        log("traced", guest.run(guest.exec_op(_TRACED, user=False))[0].ok)
        log("#DBs", guest.counted(DB))
        log("ports", [str(write) for write in machine.cpus[0].port_writes])

    expect_unnoticed(context, journey)


# pushf; orl $TF, (%rsp); popf
_TF_ON: Final = bytes.fromhex("9c 810c2400010000 9d")
# pushf; andl $~TF, (%rsp); popf
_TF_OFF: Final = bytes.fromhex("9c 812424fffeffff 9d")
_TRACED: Final = _TF_ON + _NOP + _OUT + _NOP + _OUT + _NOP + _TF_OFF
_TRACED_VMRUN: Final = _TF_ON + instruction("VMRUN").code + _TF_OFF + instruction("STGI").code


@scenario(needs=[nested_svm, smm], axes={"npt": (True, False)}, levels=2)
def test_smi_in_l2_of_an_l1_that_traps_goes_unnoticed(context: Context, npt: bool) -> None:
    """L1's RFLAGS.TF at VMRUN is for after #VMEXIT: an SMI in L2 neither sees it nor loses it."""

    def journey(machine: ProxyMachine, log: Log) -> None:
        l1 = machine.l1
        l1.set_policy(DB, Policy.COUNT)
        l2 = l1.launch(npt=npt)
        l2.vmcb["rip"] = l2.instance.put_code(_OUT + _NOP + instruction("VMMCALL").code)
        log("VMRUN", l1.run(l1.exec_op(_TRACED_VMRUN, rax=l2.vmcb.gpa))[0].ok)
        exit_ = describe(l2.vmcb["exit_code"])
        context.expect("exit of L2", exit_, describe(ExitCode.SVM_EXIT_VMMCALL), str)
        log("#DBs", l1.counted(DB))
        log("ports", [str(write) for write in machine.cpus[0].port_writes])

    smis = expect_unnoticed(context, journey)
    context.expect("an SMI in L2", "L2" in levels_hit(smis), True)
