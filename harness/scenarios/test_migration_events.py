"""Migration while something is about to happen to L2: interrupts, NMIs, exceptions, SMIs, halts.

APM vol. 2, 15.13 Interrupt Intercepts, 15.20 Event Injection, 15.21 Interrupt and Local APIC
Support. Kernel: kvm_vcpu_ioctl_x86_get_vcpu_events(), svm_check_nested_events().
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from harness.facts import nested_svm
from harness.proxy.apic import Apic
from harness.proxy.guest_level import GuestLevel
from harness.proxy.level import Level
from harness.proxy.machine import ProxyMachine
from harness.proxy.ops import Op, Policy
from harness.proxy.program import NMI, UD, cpuid, nop, simple, triple_fault, vmmcall, wait_interrupt
from harness.proxy.vmexit import VmExit
from harness.scenarios.case import scenario
from harness.scenarios.context import Context
from harness.scenarios.migration_stops import (
    STOP_PORT,
    change_events,
    outcome,
    run_to_port,
    step_to,
    triple_fault_event,
    vmrun_only,
    wait_halted,
)
from harness.scenarios.test_injection import EVENTS, SOME
from harness.scenarios.twins import Log, Trip, expect_twins
from harness.svm.exit_codes import ExitCode
from harness.svm.vmcb import IntCtl
from kvm_ioctl.asm_kvm import VcpuEventFlags, kvm_vcpu_events

VECTOR: Final = 0x41
SOFT_VECTOR: Final = 0x80


def _nothing(_: ProxyMachine) -> None:
    pass


def _one_nop(_: Level) -> Op:
    return nop()


def _sti(_: Level) -> Op:
    return simple("STI_NOP_CLI")


def _int_80(level: Level) -> Op:
    return level.int_n(SOFT_VECTOR)


@dataclass(frozen=True)
class Pending:
    """Something that waits where the machine is moved, and what lets it happen."""

    vector: int
    intercept: str
    """The VMCB's bit by which L1 asks for it."""
    raise_: Callable[[ProxyMachine], None] = _nothing
    release: Callable[[Level], Op] = _one_nop
    vmcb: Mapping[str, int] = field(default_factory=dict)
    ran: bool = False
    """L2 runs once more before the machine is moved."""


def _interrupt(machine: ProxyMachine) -> None:
    machine.interrupt(VECTOR)


def _nmi(machine: ProxyMachine) -> None:
    machine.vcpus[0].vcpu.nmi()


def _masked_nmi(machine: ProxyMachine) -> None:
    def mask(events: kvm_vcpu_events) -> None:
        events.nmi.masked = 1

    change_events(machine, mask)
    _nmi(machine)


def _exception(state: str) -> Callable[[ProxyMachine], None]:
    def change(events: kvm_vcpu_events) -> None:
        setattr(events.exception, state, 1)
        events.exception.nr = UD
        events.exception.has_error_code = 0

    return lambda machine: change_events(machine, change)


def _injected_interrupt(machine: ProxyMachine) -> None:
    def inject(events: kvm_vcpu_events) -> None:
        events.interrupt.injected, events.interrupt.nr, events.interrupt.soft = 1, VECTOR, 0

    change_events(machine, inject)


_VIRQ: Final = {"int_ctl": IntCtl.of(V_IRQ=1, V_INTR_PRIO=15), "int_vector": VECTOR}

PENDING: Final = {
    "interrupt": Pending(VECTOR, "intercept.intr", _interrupt, _sti),
    "interrupt_window": Pending(VECTOR, "intercept.intr", _interrupt, _sti, ran=True),
    "interrupt_injected": Pending(VECTOR, "intercept.intr", _injected_interrupt),
    "v_irq": Pending(VECTOR, "intercept.vintr", release=_sti, vmcb=_VIRQ),
    "nmi": Pending(NMI, "intercept.nmi", _nmi),
    "nmi_masked": Pending(NMI, "intercept.nmi", _masked_nmi, _int_80),
    "exception": Pending(UD, f"intercept.excp.{UD}", _exception("pending")),
    "exception_injected": Pending(UD, f"intercept.excp.{UD}", _exception("injected")),
}


def _l2(machine: ProxyMachine, vmcb: Mapping[str, int]) -> GuestLevel:
    """Return an L2 that has delivered an exception, so that all is mapped.

    It tells no APIC of interrupts: nothing here needs KVM to emulate or skip an instruction of L2,
    which is what `migrate_emulates` is about.
    """
    Apic(machine.l1).enable()
    l2 = machine.l1.launch()
    l2.set_policy(VECTOR, Policy.COUNT)
    l2.do(simple("UD2"))
    l2.instance.clear_vectors()
    l2.set_policy(UD, Policy.COUNT)
    l2.set_policy(SOFT_VECTOR, Policy.COUNT)
    if vmcb:
        l2.configure(vmcb)
        l2.ping()
    return l2


def _take(log: Log, l2: GuestLevel, vector: int, op: Op) -> None:
    """Let L2 run into what waits, and log who got it, how often."""
    seen = outcome(l2, [op, nop()])
    if isinstance(seen, VmExit) and seen.exit_code == ExitCode.SVM_EXIT_EXCP_BASE + UD:
        # Of an exception without an error code these are nothing: KVM leaves what the last exit of
        # its own to be there (nested_svm_inject_exception_vmexit).
        seen.vmcb.update({"exit_info_1": 0, "exit_info_2": 0})
        log("what L2 runs into", (seen.name, seen.vmcb["rip"]))
    else:
        log("what L2 runs into", seen)
    log("taken by L2", l2.counted(vector))
    if isinstance(seen, VmExit):
        l1 = seen.host
        log("L1", l1.run([simple("STI_NOP_CLI"), nop()]))
        log("taken by L1", l1.counted(vector))
        log("L2 goes on", l2.resume())
        log("taken by L2 then", l2.counted(vector))


@scenario(
    needs=[nested_svm], axes={"event": tuple(PENDING), "intercepted": (False, True)}, levels=2
)
def test_migrate_l2_with_a_pending_event(context: Context, event: str, intercepted: bool) -> None:
    """What waits for L2 when the machine is moved happens once, to L2 or as #VMEXIT."""
    pending = PENDING[event]
    vmcb = {**pending.vmcb, pending.intercept: int(intercepted)}

    def journey(machine: ProxyMachine, log: Log) -> Trip:
        l2 = _l2(machine, vmcb)
        pending.raise_(machine)
        if pending.ran:
            log("L2 runs on", l2.run(nop()))
        yield
        if pending.vmcb:
            # So that delivery itself touches nothing unmapped: quirk-free on emulated silicon.
            log("walk", l2.run(l2.int_n(SOFT_VECTOR)))
        _take(log, l2, pending.vector, pending.release(l2))

    expect_twins(context, journey, irqchip=True)


# sti; out %al, $STOP_PORT; nop; cli
_STI_OUT = bytes((0xFB, 0xE6, STOP_PORT, 0x90, 0xFA))
# sti; nop; out %al, $STOP_PORT; cli
_STI_NOP_OUT = bytes((0xFB, 0x90, 0xE6, STOP_PORT, 0xFA))


@scenario(
    needs=[nested_svm], axes={"shadow": (True, False), "intercepted": (False, True)}, levels=2
)
def test_migrate_l2_after_sti(context: Context, shadow: bool, intercepted: bool) -> None:
    """An interrupt shadow ends with the instruction after STI, moved or not."""
    code = _STI_OUT if shadow else _STI_NOP_OUT

    def journey(machine: ProxyMachine, log: Log) -> Trip:
        l2 = _l2(machine, {"intercept.intr": int(intercepted)})
        l2.instance.send([l2.exec_op(code), nop()])
        log("stopped at", run_to_port(machine))
        machine.interrupt(VECTOR)
        yield
        seen = l2.go_on()
        log("L2", seen)
        log("taken by L2", l2.counted(VECTOR))

    expect_twins(context, journey, irqchip=True)


@scenario(needs=[nested_svm], levels=2)
def test_migrate_l2_with_a_set_interrupt_shadow(context: Context) -> None:
    """An interrupt shadow that KVM_GET_VCPU_EVENTS tells of is there after the move."""

    def shadow(events: kvm_vcpu_events) -> None:
        events.interrupt.shadow = 1

    def journey(machine: ProxyMachine, log: Log) -> Trip:
        l2 = _l2(machine, {})
        log("STI", l2.run(simple("STI")))
        change_events(machine, shadow)
        yield
        log("CLI", l2.run(simple("CLI")))

    expect_twins(context, journey, irqchip=True)


@scenario(needs=[nested_svm], levels=2)
def test_migrate_l2_with_a_soft_interrupt_injected(context: Context) -> None:
    """A software interrupt of L2 that was on its way is taken once, by the INT n that raised it."""

    def inject(events: kvm_vcpu_events) -> None:
        events.interrupt.injected, events.interrupt.nr, events.interrupt.soft = 1, SOFT_VECTOR, 1

    def journey(machine: ProxyMachine, log: Log) -> Trip:
        l2 = _l2(machine, {})
        op = l2.int_n(SOFT_VECTOR)
        l2.instance.send([op, nop()])
        step_to(l2, op.args[-1])
        change_events(machine, inject)
        yield
        log("L2", l2.go_on())
        log("taken by L2", l2.counted(SOFT_VECTOR))

    expect_twins(context, journey, irqchip=True)


# Shutdown


@scenario(needs=[nested_svm, triple_fault_event], axes={"intercepted": (False, True)}, levels=2)
def test_migrate_l2_with_a_pending_shutdown(context: Context, intercepted: bool) -> None:
    """A triple fault of L2 that is pending ends the machine, or exits to L1."""

    def fault(events: kvm_vcpu_events) -> None:
        events.flags |= VcpuEventFlags.KVM_VCPUEVENT_VALID_TRIPLE_FAULT
        events.triple_fault.pending = 1

    def journey(machine: ProxyMachine, log: Log) -> Trip:
        l2 = _l2(machine, {"intercept.shutdown": int(intercepted)})
        change_events(machine, fault)
        yield
        log("L2", outcome(l2, nop()))
        if intercepted:
            log("L1", machine.l1.ping())

    expect_twins(context, journey, irqchip=True)


@scenario(needs=[nested_svm], axes={"intercepted": (False, True)}, levels=2, unsafe=True)
def test_migrate_before_a_shutdown(context: Context, intercepted: bool) -> None:
    """A shutdown of L2 after a move ends the machine, or exits to L1."""

    def journey(machine: ProxyMachine, log: Log) -> Trip:
        l2 = _l2(machine, {"intercept.shutdown": int(intercepted)})
        yield
        log("L2", outcome(l2, triple_fault()))
        if intercepted:
            log("L1", machine.l1.ping())

    expect_twins(context, journey, irqchip=True)


# Halted


@scenario(needs=[nested_svm], axes={"level": (1, 2, 3)}, levels=3)
def test_migrate_halted(context: Context, level: int) -> None:
    """A level that halted is woken after the move by an interrupt."""

    def journey(machine: ProxyMachine, log: Log) -> Trip:
        Apic(machine.l1).enable()
        guest = machine.level(level)
        guest.set_policy(VECTOR, Policy.COUNT)
        guest.ping()
        thread = machine.in_thread(guest, lambda it: it.run(wait_interrupt(VECTOR, hlt=True)))
        wait_halted(machine)
        yield
        machine.interrupt(VECTOR)
        log("woken", thread.join(machine.timeout_s)[0].ok)
        log("taken", guest.counted(VECTOR))
        log("goes on", guest.run(nop()))

    expect_twins(context, journey, irqchip=True)


# VMRUN is done, and hardware has not entered L2


@scenario(needs=[nested_svm], axes={"event": ("none", *SOME), "npt": (True, False)}, levels=2)
def test_migrate_right_after_vmrun(context: Context, event: str, npt: bool) -> None:
    """KVM_STATE_NESTED_RUN_PENDING: what VMRUN injects is taken once, after the move."""

    def journey(machine: ProxyMachine, log: Log) -> Trip:
        l2 = machine.l1.launch(npt=npt)
        l2.do(simple("UD2"))
        l2.instance.clear_vectors()
        exit_ = l2.run_to_exit([vmmcall(), nop()])
        exit_.skip()
        vector = UD
        if event != "none":
            injected = EVENTS[event]
            vector = injected.VEC
            l2.set_policy(vector, Policy.COUNT)
            error_code = 0x10 if injected.VALID_ERR else 0
            exit_.vmcb.update({"event_inj": injected, "event_inj_err": error_code})
        vmrun_only(l2)
        yield
        log("L2", l2.go_on())
        log("taken", l2.counted(vector))
        log("and on", l2.run(nop()))
        log("taken then", l2.counted(vector))
        log("L1", machine.l1.ping())

    expect_twins(context, journey)


def _interrupt_of_userspace(machine: ProxyMachine) -> None:
    machine.vcpus[0].vcpu.interrupt(VECTOR)


_AT_VMRUN: Final[Mapping[str, tuple[int, Callable[[ProxyMachine], None], Mapping[str, int]]]] = {
    "nmi": (NMI, _nmi, {"intercept.nmi": 1}),
    "interrupt": (VECTOR, _interrupt_of_userspace, {"intercept.intr": 1}),
}


@scenario(needs=[nested_svm], axes={"event": tuple(_AT_VMRUN)}, levels=2)
def test_migrate_right_after_vmrun_with_an_exit_pending(context: Context, event: str) -> None:
    """What L1 intercepts and is pending right after VMRUN exits after L2 was entered, once."""
    vector, raise_, vmcb = _AT_VMRUN[event]

    def journey(machine: ProxyMachine, log: Log) -> Trip:
        l2 = machine.l1.launch()
        exit_ = l2.run_to_exit([vmmcall(), nop()])
        exit_.skip()
        exit_.vmcb.update(vmcb)
        vmrun_only(l2)
        raise_(machine)
        yield
        seen = l2.go_on()
        log("L2", seen)
        if isinstance(seen, VmExit):
            log("L1", machine.l1.run([simple("STI_NOP_CLI"), nop()]))
            log("taken by L1", machine.l1.counted(vector))
            log("and on", l2.resume())

    expect_twins(context, journey)


@scenario(needs=[nested_svm], levels=3)
def test_migrate_right_after_vmrun_of_l3(context: Context) -> None:
    """KVM_STATE_NESTED_RUN_PENDING with L3: it goes on after the move."""

    def journey(machine: ProxyMachine, log: Log) -> Trip:
        l2 = machine.l1.launch()
        l3 = l2.launch()
        l3.ping()
        # An exit that only L1 asked for: L1 alone resumes L3 from it.
        l2.configure({"intercept.cpuid": 1})
        exit_ = l3.run_to_exit([cpuid(0), nop()])
        log("exit", exit_)
        exit_.skip()
        vmrun_only(l3)
        yield
        log("L3", l3.go_on())
        log("L2", l2.run(nop()))

    expect_twins(context, journey)
