"""Migration in system management mode, entered from L1, L2 or L3, and with an SMI pending.

APM vol. 2, 10.3 SMM, 15.22 SMM Support. Kernel: svm_enter_smm(), svm_leave_smm(): while in SMM,
where L1 goes on after a later #VMEXIT is in the page at VM_HSAVE_PA (5.10: in KVM's own memory).
"""

from __future__ import annotations

from harness.facts import nested_svm, smm
from harness.proxy.apic import Apic
from harness.proxy.machine import ProxyMachine
from harness.proxy.ops import Policy
from harness.proxy.program import NMI, cpuid, load, nop, outb, rdmsr, simple, store
from harness.proxy.smm import SMI_COMMAND_PORT
from harness.proxy.vmexit import VmExit
from harness.scenarios.case import scenario
from harness.scenarios.context import Context
from harness.scenarios.migration_stops import change_events, outcome
from harness.scenarios.twins import Log, Trip, expect_twins
from harness.svm.msrs import Msr
from kvm_ioctl.asm_kvm import kvm_vcpu_events

LEVELS = (1, 2, 3)
_VECTOR = 0x40


@scenario(needs=[nested_svm, smm], axes={"level": LEVELS, "npt": (True, False)}, levels=3)
def test_migrate_in_smm(context: Context, level: int, npt: bool) -> None:
    """The SMI handler goes on after the move, and RSM leads back to the level it interrupted."""

    def journey(machine: ProxyMachine, log: Log) -> Trip:
        guest = machine.level(level, npt=npt)
        log("before", guest.run(store(guest.scratch, 0x77)))
        handler = machine.inject_smi()
        log("SMM", handler.run(store(handler.scratch, 5)))
        yield
        log("handler", handler.run([load(handler.scratch), rdmsr(Msr.MSR_EFER)]))
        yield
        log("RSM", handler.rsm().name)
        yield
        log("goes on", guest.run([load(guest.scratch), cpuid(0)]))
        log("L1", machine.l1.run([nop(), rdmsr(Msr.MSR_EFER)]))
        log("once more", guest.run(load(guest.scratch)))

    expect_twins(context, journey, smm=True)


def _count_smis(machine: ProxyMachine) -> list[int]:
    seen: list[int] = []
    machine.smm.handler = lambda _: seen.append(1)
    return seen


@scenario(needs=[nested_svm, smm], axes={"level": LEVELS}, levels=3)
def test_migrate_with_an_smi_pending(context: Context, level: int) -> None:
    """An SMI that is pending is taken once, after the move."""

    def journey(machine: ProxyMachine, log: Log) -> Trip:
        guest = machine.level(level)
        guest.run(nop())
        seen = _count_smis(machine)
        machine.vcpus[0].vcpu.smi()
        yield
        log("goes on", guest.run([store(guest.scratch, 1), nop()]))
        log("SMIs", len(seen))
        log("L1", machine.l1.ping())

    expect_twins(context, journey, smm=True)


@scenario(needs=[nested_svm, smm])
def test_migrate_with_an_smi_held_by_gif(context: Context) -> None:
    """An SMI that GIF=0 holds back is taken after the move, with STGI."""

    def journey(machine: ProxyMachine, log: Log) -> Trip:
        l1 = machine.l1
        l1.enable_svm()
        seen = _count_smis(machine)
        log("CLGI", l1.run(simple("CLGI")))
        machine.vcpus[0].vcpu.smi()
        log("held", [l1.ping(), len(seen)])
        yield
        log("still held", [l1.ping(), len(seen)])
        log("STGI", l1.run([simple("STGI"), nop()]))
        log("SMIs", len(seen))

    expect_twins(context, journey, smm=True)


@scenario(needs=[nested_svm, smm], levels=2)
def test_migrate_with_an_intercepted_smi_pending(context: Context) -> None:
    """An SMI that L1 intercepts exits after the move, and is taken in L1."""

    def journey(machine: ProxyMachine, log: Log) -> Trip:
        l2 = machine.l1.launch(vmcb={"intercept.smi": 1})
        l2.run(nop())
        seen = _count_smis(machine)
        machine.vcpus[0].vcpu.smi()
        yield
        exit_ = outcome(l2, nop())
        log("exit", exit_)
        log("L1", [machine.l1.ping(), len(seen)])
        if isinstance(exit_, VmExit):
            log("L2", l2.resume())

    expect_twins(context, journey, smm=True)


@scenario(needs=[nested_svm, smm], axes={"level": LEVELS}, levels=3)
def test_migrate_at_every_exit_of_smm(context: Context, level: int) -> None:
    """A program that raises SMIs by a port is moved at every exit, those of the handler too."""

    def journey(machine: ProxyMachine, log: Log) -> Trip:
        guest = machine.level(level)
        seen = _count_smis(machine)
        log("program", guest.run([outb(SMI_COMMAND_PORT, 1), cpuid(0), outb(SMI_COMMAND_PORT, 2)]))
        log("SMIs", len(seen))
        yield
        log("L1", machine.l1.ping())

    moves = expect_twins(context, journey, everywhere=True, smm=True)
    context.note("moves", count=moves)


@scenario(needs=[nested_svm, smm], axes={"level": LEVELS}, levels=3)
def test_migrate_in_smm_with_an_smi_latched(context: Context, level: int) -> None:
    """An SMI that is latched in SMM is taken once, after the move and RSM."""

    def journey(machine: ProxyMachine, log: Log) -> Trip:
        guest = machine.level(level, npt=False)
        guest.run(nop())
        handler = machine.inject_smi()
        machine.vcpus[0].vcpu.smi()
        log("SMM", handler.ping())
        yield
        seen = _count_smis(machine)
        log("handler", handler.ping())
        handler.instance.send([simple("RSM")])
        guest.go_on()
        log("goes on", guest.run([store(guest.scratch, 1), nop()]))
        log("SMIs", len(seen))

    expect_twins(context, journey, smm=True)


@scenario(needs=[nested_svm, smm], axes={"level": (1, 2)}, levels=2)
def test_migrate_in_smm_inside_an_nmi(context: Context, level: int) -> None:
    """SMM that was entered from an NMI handler goes back to it after the move: NMIs are blocked."""

    def mask(events: kvm_vcpu_events) -> None:
        events.nmi.masked = 1

    def journey(machine: ProxyMachine, log: Log) -> Trip:
        guest = machine.level(level, npt=False)
        guest.set_policy(_VECTOR, Policy.COUNT)
        guest.run(nop())
        change_events(machine, mask)
        handler = machine.inject_smi()
        machine.vcpus[0].vcpu.nmi()
        yield
        log("RSM", handler.rsm().name)
        log("before IRET", [guest.ping(), guest.counted(NMI)])
        log("IRET", guest.run([guest.int_n(_VECTOR), nop()]))
        log("after IRET", guest.counted(NMI))

    expect_twins(context, journey, smm=True)


@scenario(needs=[nested_svm, smm], levels=2)
def test_migrate_in_smm_with_an_interrupt_pending(context: Context) -> None:
    """What comes in SMM waits for RSM: an interrupt and an NMI of L2, after the move."""

    def journey(machine: ProxyMachine, log: Log) -> Trip:
        Apic(machine.l1).enable()
        l2 = machine.l1.launch()
        l2.do(simple("UD2"))
        handler = machine.inject_smi()
        machine.interrupt(0x41)
        machine.vcpus[0].vcpu.nmi()
        log("SMM", handler.ping())
        yield
        log("handler", handler.ping())
        log("RSM", handler.rsm().name)
        log("L2", l2.run([simple("STI_NOP_CLI"), nop()]))
        log("taken", [l2.counted(0x41), l2.counted(2)])

    expect_twins(context, journey, smm=True, irqchip=True)
