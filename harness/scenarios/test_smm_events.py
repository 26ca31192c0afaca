"""What comes while a vCPU is in SMM, and what was blocked when it got there.

APM vol. 2, 10.3 Using SMM (Exceptions and Interrupts): SMIs, NMIs and INIT wait for RSM, an IRET
lets NMIs in. Kernel: enter_smm(), emulator_leave_smm(), svm_smi_blocked(),
kvm_vcpu_latch_init().
"""

from __future__ import annotations

import contextlib
from typing import Final

from harness.facts import nested_svm, smm
from harness.proxy.apic import Apic, Delivery
from harness.proxy.failure import GuestStopped
from harness.proxy.guest_level import GuestLevel
from harness.proxy.level import ENTER_DEFAULT, Level
from harness.proxy.machine import ProxyMachine
from harness.proxy.ops import EnterFlag, Policy
from harness.proxy.program import NMI, nop, simple
from harness.proxy.smm import SmmLevel
from harness.scenarios.case import scenario
from harness.scenarios.context import Context
from harness.scenarios.l2 import proxy_machine
from harness.scenarios.migration_stops import change_events, nested_flags, wait_mp_state
from harness.scenarios.smi import events_of
from harness.storm.smi import Smi, read_smi, send_message
from harness.svm.exit_codes import ExitCode, describe
from harness.svm.msrs import Cr0, Efer
from kvm_ioctl.asm_kvm import NestedStateFlags, kvm_vcpu_events
from kvm_ioctl.linux_kvm import MpState

LEVELS: Final = (1, 2)
"""The level that the SMI interrupts."""
_VECTOR: Final = 0x40
_END_S: Final = 10.0


@scenario(needs=[nested_svm, smm], axes={"level": (1, 2, 3), "count": (1, 3)}, levels=3)
def test_smi_in_smm_is_taken_after_rsm(context: Context, level: int, count: int) -> None:
    """SMIs that come in SMM are one SMI, which is taken right after RSM, where the first was."""
    machine = proxy_machine(context, smm=True)
    guest = machine.level(level, npt=False)
    guest.ping()
    seen: list[Smi] = []
    pending: list[int] = []

    def handle(handler: SmmLevel) -> None:
        seen.append(read_smi(handler))
        if len(seen) == 1:
            for _ in range(count):
                machine.vcpus[0].vcpu.smi()
            handler.ping()
        pending.append(events_of(machine).smi.pending)

    machine.smm.handler = handle
    machine.vcpus[0].vcpu.smi()
    guest.run(nop())
    context.expect("SMIs", len(seen), 2)
    context.expect("the second SMI", seen[1], seen[0], str)
    context.expect("interrupted", seen[0].level, guest.name)
    context.expect("smi.pending in each", pending, [1, 0])
    guest.ping()
    context.expect("SMIs later on", len(seen), 2)


@scenario(needs=[nested_svm, smm], axes={"level": LEVELS, "npt": (True, False)}, levels=2)
def test_nmi_in_smm_waits_for_rsm(context: Context, level: int, npt: bool) -> None:
    """An NMI that comes in SMM is held until RSM, then taken by who was interrupted."""
    machine = proxy_machine(context, smm=True)
    guest = machine.level(level, npt=npt)
    guest.ping()
    handler = machine.inject_smi()
    machine.vcpus[0].vcpu.nmi()
    handler.run([nop(), nop()])
    context.expect("NMIs in SMM", handler.counted(NMI), 0)
    context.expect("nmi.masked in SMM", events_of(machine).nmi.masked, 1)
    context.expect("RSM goes on at", handler.rsm().name, guest.name)
    guest.ping()
    context.expect("NMIs after RSM", guest.counted(NMI), 1)


@scenario(needs=[nested_svm, smm], levels=2)
def test_intercepted_nmi_of_smm_exits_after_rsm(context: Context) -> None:
    """An NMI that comes in SMM is L1's after RSM if L1 intercepts it: L2 exits, L1 takes it."""
    machine = proxy_machine(context, smm=True)
    l2 = machine.l1.launch(vmcb={"intercept.nmi": 1}, npt=False)
    l2.ping()
    handler = machine.inject_smi()
    machine.vcpus[0].vcpu.nmi()
    handler.ping()
    handler.instance.send([simple("RSM")])
    l2.go_on()
    context.expect("exit", _exit_of(l2), describe(ExitCode.SVM_EXIT_NMI), str)
    machine.l1.ping()
    seen = (handler.counted(NMI), l2.counted(NMI), machine.l1.counted(NMI))
    context.expect("NMIs in SMM, L2, L1", seen, (0, 0, 1))


@scenario(needs=[nested_svm, smm], axes={"level": LEVELS}, levels=2)
def test_iret_in_smm_lets_an_nmi_in(context: Context, level: int) -> None:
    """After an IRET of the handler an NMI is taken in SMM, by the handler's IDT, and only there."""
    machine = proxy_machine(context, smm=True)
    guest = machine.level(level, npt=False)
    guest.ping()
    handler = machine.inject_smi()
    handler.set_policy(_VECTOR, Policy.COUNT)
    machine.vcpus[0].vcpu.nmi()
    handler.ping()
    context.expect("NMIs before IRET", handler.counted(NMI), 0)
    handler.run([handler.int_n(_VECTOR), nop()])
    context.expect("NMIs after IRET", handler.counted(NMI), 1)
    handler.rsm()
    guest.ping()
    context.expect("NMIs after RSM", guest.counted(NMI), 0)
    machine.vcpus[0].vcpu.nmi()
    guest.ping()
    context.expect("the next NMI", guest.counted(NMI), 1)


def _mask_nmis(events: kvm_vcpu_events) -> None:
    events.nmi.masked = 1


@scenario(needs=[nested_svm, smm], axes={"level": LEVELS}, levels=2)
def test_nmis_that_were_blocked_are_blocked_after_rsm(context: Context, level: int) -> None:
    """An SMI in an NMI handler comes back to it: NMIs are blocked until that one's IRET."""
    machine = proxy_machine(context, smm=True)
    guest = machine.level(level, npt=False)
    guest.set_policy(_VECTOR, Policy.COUNT)
    guest.ping()
    change_events(machine, _mask_nmis)
    handler = machine.inject_smi()
    context.expect("smm_inside_nmi", events_of(machine).smi.smm_inside_nmi, 1)
    machine.vcpus[0].vcpu.nmi()
    handler.rsm()
    guest.ping()
    context.expect("nmi.masked after RSM", events_of(machine).nmi.masked, 1)
    context.expect("NMIs before IRET", guest.counted(NMI), 0)
    guest.run([guest.int_n(_VECTOR), nop()])
    context.expect("NMIs after IRET", guest.counted(NMI), 1)


@scenario(needs=[nested_svm, smm], axes={"level": LEVELS}, levels=2)
def test_init_in_smm_waits_for_rsm(context: Context, level: int) -> None:
    """INIT that comes in SMM is latched; after RSM the vCPU is reset and waits for a SIPI."""
    machine = proxy_machine(context, smm=True, irqchip=True, vcpus=2)
    # Until a vCPU writes to its APIC, KVM's map of APIC IDs does not have it.
    Apic(machine.cpus[1].l1).enable()
    guest = machine.level(level, npt=False, vcpu=1)
    guest.ping()
    handler = machine.inject_smi(1)
    send_message(machine, Delivery.INIT, 1)
    context.expect("the handler goes on", handler.ping(), True)
    context.expect("latched_init", events_of(machine, 1).smi.latched_init, 1)
    _rsm_until(machine, handler, MpState.KVM_MP_STATE_INIT_RECEIVED)
    vcpu, sregs = machine.vcpus[1].vcpu, machine.vcpus[1].vcpu.get_sregs()
    events = vcpu.get_vcpu_events()
    context.expect("smm, latched_init", (events.smi.smm, events.smi.latched_init), (0, 0))
    context.expect("CR0.PE, EFER.SVME", (Cr0(sregs.cr0).PE, Efer(sregs.efer).SVME), (0, 0))
    flags = vcpu.get_nested_state().flags & NestedStateFlags.KVM_STATE_NESTED_GUEST_MODE
    context.expect("GUEST_MODE", flags, 0)
    context.expect("vCPU 0 lives", machine.l1.ping(), True)


@scenario(needs=[nested_svm, smm], levels=2)
def test_intercepted_init_of_smm_exits_after_rsm(context: Context) -> None:
    """INIT that comes in SMM is L1's after RSM to L2 if L1 intercepts it: L2 exits."""
    machine = proxy_machine(context, smm=True, irqchip=True)
    Apic(machine.l1).enable()
    # With GIF=1 again L1 would take it, and be reset.
    no_stgi = ENTER_DEFAULT & ~EnterFlag.STGI
    l2 = machine.l1.launch(vmcb={"intercept.init": 1}, npt=False, enter_flags=no_stgi)
    l2.ping()
    handler = machine.inject_smi()
    send_message(machine, Delivery.INIT)
    handler.ping()
    context.expect("latched_init", events_of(machine).smi.latched_init, 1)
    handler.instance.send([simple("RSM")])
    l2.go_on()
    context.expect("exit", _exit_of(l2), describe(ExitCode.SVM_EXIT_INIT), str)
    flags = nested_flags(machine) & NestedStateFlags.KVM_STATE_NESTED_GUEST_MODE
    context.expect("GUEST_MODE", flags, 0)


def _exit_of(guest: GuestLevel) -> str:
    return "none" if guest.exit is None else guest.exit.name


def _rsm_until(machine: ProxyMachine, handler: SmmLevel, wanted: MpState) -> None:
    """Let vCPU 1 execute RSM, wait for a state that it does not leave by itself, and stop it.

    Raises ScenarioFailure: it does not get there.
    """

    def leave(_: Level) -> None:
        with contextlib.suppress(GuestStopped):
            handler.rsm()

    thread = machine.in_thread(handler, leave)
    try:
        wait_mp_state(machine, wanted, 1)
    finally:
        thread.stop(_END_S)
