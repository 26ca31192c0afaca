"""Virtual and physical interrupts while L2 runs: V_IRQ, V_TPR, windows, shadows, masking.

APM vol. 2, 15.13 Interrupt Intercepts, 15.21 Interrupt and Local APIC Support: V_INTR_MASKING,
injecting virtual (INTR) interrupts, interrupt shadows.

QEMU's TCG (7.2) aborts when L2 itself lowers CR8 so far that a pending V_IRQ may be taken: see
`quirk-cr8-write-aborts-qemu`. Nothing here does it but the scenario that claims it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from harness.facts import nested_svm, npt
from harness.proxy.apic import APIC_BASE, ICR_LOW, Apic
from harness.proxy.guest_level import GuestLevel
from harness.proxy.layout import TRAP_STACK_TOP, Eoi
from harness.proxy.machine import ProxyMachine
from harness.proxy.ops import Policy, instruction
from harness.proxy.paging import PAGE, Pte
from harness.proxy.program import NMI, nop, simple, wait_interrupt, write_cr
from harness.scenarios.case import scenario
from harness.scenarios.context import Context
from harness.scenarios.intercept_rows import RFLAGS_ONE
from harness.scenarios.l2 import expect_exit, proxy_machine
from harness.svm.exit_codes import ExitCode
from harness.svm.vmcb import IntCtl

HANG_S = 5.0
VECTOR: Final = 0x60
_OTHER_VECTOR = 0x61
RFLAGS_IF: Final = 1 << 9
_VMMCALL = instruction("VMMCALL").code
_NOP = instruction("NOP1").code


def _virq(priority: int = 15, **fields: int) -> dict[str, int]:
    """Return VMCB fields of a pending virtual interrupt."""
    int_ctl = IntCtl.of(V_IRQ=1, V_INTR_PRIO=priority, **fields)
    return {"int_ctl": int_ctl, "int_vector": VECTOR}


def _int_ctl(l2: GuestLevel) -> IntCtl:
    """Return int_ctl after #VMEXIT."""
    l2.configure({})
    return IntCtl(l2.vmcb["control.int_ctl"])


def _l2_with(context: Context, fields: Mapping[str, int]) -> GuestLevel:
    """Return an L2 that has delivered an interrupt before it gets these fields.

    KVM has mapped IDT, stack and handler by then: what happens when it has not is the claim of
    `virtual_interrupt_may_be_the_first_event`, and no other scenario's.
    """
    l2 = proxy_machine(context, timeout_s=HANG_S).l1.launch()
    l2.run(l2.int_n(_OTHER_VECTOR))
    l2.configure(fields)
    return l2


# Virtual interrupts


@scenario(needs=[nested_svm], axes={"masking": (0, 1)}, levels=2)
def test_virtual_interrupt_is_taken_once(context: Context, masking: int) -> None:
    """A virtual interrupt goes through L2's IDT once L2 sets IF, and V_IRQ is clear then."""
    l2 = _l2_with(context, _virq(V_INTR_MASKING=masking))
    l2.run([nop(), simple("STI_NOP_CLI"), simple("STI_NOP_CLI")])
    context.expect("interrupts in L2", l2.counted(VECTOR), 1)
    context.expect("interrupts in L1", l2.host.counted(VECTOR), 0)
    context.expect("V_IRQ after #VMEXIT", _int_ctl(l2).V_IRQ, 0)


@scenario(needs=[nested_svm, npt], levels=2)
def test_virtual_interrupt_may_be_the_first_event(context: Context) -> None:
    """A virtual interrupt is taken even if its delivery is the first to touch a stack of L2."""
    l2 = proxy_machine(context, timeout_s=HANG_S).l1.launch(vmcb=_virq())
    assert l2.npt is not None
    # Without A, and no part of a large page, KVM does not map it along with its neighbours.
    l2.npt.protect((l2.instance.gpa + TRAP_STACK_TOP - 1) // PAGE * PAGE, clear=Pte.A)
    l2.run(simple("STI_NOP_CLI"))
    context.expect("interrupts in L2", l2.counted(VECTOR), 1)


@scenario(needs=[nested_svm], levels=2)
def test_virtual_interrupt_waits_for_if(context: Context) -> None:
    """With RFLAGS.IF clear in L2 a virtual interrupt stays pending, over #VMEXIT and VMRUN."""
    l2 = _l2_with(context, _virq())
    l2.ping()
    context.expect("interrupts with IF=0", l2.counted(VECTOR), 0)
    int_ctl = _int_ctl(l2)
    context.expect("V_IRQ after #VMEXIT", int_ctl.V_IRQ, 1)
    context.expect("V_INTR_PRIO after #VMEXIT", int_ctl.V_INTR_PRIO, 15)
    l2.run(simple("STI_NOP_CLI"))
    context.expect("interrupts with IF=1", l2.counted(VECTOR), 1)


@dataclass(frozen=True)
class Priority:
    """V_INTR_PRIO against V_TPR, and whether the interrupt is taken."""

    priority: int
    tpr: int
    ignore: int
    taken: bool


PRIORITIES: Final = {
    "above": Priority(2, 1, 0, True),
    "equal": Priority(1, 1, 0, False),
    "below": Priority(1, 2, 0, False),
    "highest": Priority(15, 14, 0, True),
    "both_highest": Priority(15, 15, 0, False),
    "lowest_above_zero": Priority(1, 0, 0, True),
    "equal_ignored": Priority(1, 1, 1, True),
    "below_ignored": Priority(0, 15, 1, True),
}


@scenario(needs=[nested_svm], axes={"case": tuple(PRIORITIES)}, levels=2)
def test_virtual_interrupt_needs_a_priority_above_v_tpr(context: Context, case: str) -> None:
    """A virtual interrupt is taken if V_INTR_PRIO is above V_TPR, or with V_IGN_TPR."""
    p = PRIORITIES[case]
    fields = _virq(p.priority, V_INTR_MASKING=1, V_TPR=p.tpr, V_IGN_TPR=p.ignore)
    l2 = _l2_with(context, fields)
    l2.run(simple("STI_NOP_CLI"))
    context.expect("interrupts", l2.counted(VECTOR), int(p.taken))
    context.expect("V_IRQ", _int_ctl(l2).V_IRQ, int(not p.taken))


@scenario(needs=[nested_svm], levels=2)
def test_cr8_of_l2_is_v_tpr(context: Context) -> None:
    """With V_INTR_MASKING CR8 of L2 is V_TPR, and L1's CR8 is another."""
    machine = proxy_machine(context, timeout_s=HANG_S)
    l1 = machine.l1
    l2 = l1.launch(vmcb={"int_ctl": IntCtl.of(V_INTR_MASKING=1, V_TPR=7)})
    context.expect("CR8 in L2", l2.read_cr(8), 7)
    l2.write_cr(8, 5)
    context.expect("V_TPR after #VMEXIT", _int_ctl(l2).V_TPR, 5)
    context.expect("CR8 in L1", l1.read_cr(8), 0)


@scenario(needs=[nested_svm], levels=2)
def test_cr8_without_masking_is_the_hosts(context: Context) -> None:
    """Without V_INTR_MASKING L2 and L1 share the task priority."""
    machine = proxy_machine(context, timeout_s=HANG_S)
    l2 = machine.l1.launch()
    l2.write_cr(8, 5)
    context.expect("CR8 in L2", l2.read_cr(8), 5)
    context.expect("CR8 in L1", machine.l1.read_cr(8), 5)


@scenario(needs=[nested_svm], levels=2)
def test_cr8_of_l2_holds_a_virtual_interrupt_back(context: Context) -> None:
    """A virtual interrupt that CR8 of L2 holds back is taken once L1 lowers V_TPR."""
    l2 = _l2_with(context, _virq(8, V_INTR_MASKING=1))
    l2.run([write_cr(8, 9), simple("STI_NOP")])
    context.expect("with CR8 above", l2.counted(VECTOR), 0)
    l2.configure({"int_ctl.V_TPR": 7})
    context.expect("CR8 in L2", l2.read_cr(8), 7)
    context.expect("with CR8 below", l2.counted(VECTOR), 1)


@scenario(needs=[nested_svm], levels=2)
def test_virtual_interrupt_is_taken_once_l2_lowers_cr8(context: Context) -> None:
    """A virtual interrupt that CR8 of L2 holds back is taken once L2 lowers CR8."""
    l2 = _l2_with(context, _virq(8, V_INTR_MASKING=1, V_TPR=9))
    l2.run([simple("STI_NOP"), write_cr(8, 7), nop(), simple("CLI")])
    context.expect("interrupts in L2", l2.counted(VECTOR), 1)
    context.expect("V_TPR after #VMEXIT", _int_ctl(l2).V_TPR, 7)


# Windows and shadows


@scenario(needs=[nested_svm], axes={"masking": (0, 1)}, levels=2)
def test_vintr_intercept_exits_where_the_window_opens(context: Context, masking: int) -> None:
    """An intercepted virtual interrupt exits after STI's shadow, and stays pending."""
    fields = _virq(V_INTR_MASKING=masking) | {"intercept.vintr": 1}
    l2 = proxy_machine(context, timeout_s=HANG_S).l1.launch(vmcb=fields)
    op = l2.exec_op(instruction("STI").code + 2 * _NOP, user=False)
    exit_ = l2.run_to_exit(op)
    expect_exit(context, exit_, ExitCode.SVM_EXIT_VINTR)
    context.expect("RIP", exit_.vmcb["rip"], op.args[-1] + 2, hex)
    context.expect("V_IRQ", exit_.vmcb["int_ctl.V_IRQ"], 1)
    context.expect("EXITINTINFO.VALID", exit_.exit_int_info.VALID, 0)
    context.expect("interrupts in L2", l2.counted(VECTOR), 0)


@scenario(needs=[nested_svm], axes={"why": ("IF", "V_TPR")}, levels=2)
def test_vintr_intercept_does_not_exit_while_masked(context: Context, why: str) -> None:
    """A virtual interrupt that cannot be taken does not exit either."""
    tpr = 15 if why == "V_TPR" else 0
    fields = _virq(8, V_INTR_MASKING=1, V_TPR=tpr) | {"intercept.vintr": 1}
    l2 = proxy_machine(context, timeout_s=HANG_S).l1.launch(vmcb=fields)
    results = l2.run(simple("STI_NOP_CLI") if why == "V_TPR" else nop())
    context.expect("exception", str(results[0].fault), "None", str)


@scenario(needs=[nested_svm], axes={"shadow": (0, 1)}, levels=2)
def test_interrupt_shadow_in_the_vmcb_holds_for_one_instruction(
    context: Context, shadow: int
) -> None:
    """With INTERRUPT_SHADOW in the VMCB L2 executes one instruction before an interrupt."""
    fields = _virq() | {"intercept.vintr": 1, "int_state": shadow}
    l2 = proxy_machine(context, timeout_s=HANG_S).l1.launch(vmcb=fields)
    code = l2.instance.put_code(2 * _NOP + _VMMCALL)
    l2.vmcb.update({"rip": code, "rflags": RFLAGS_ONE | RFLAGS_IF})
    exit_ = l2.enter()
    expect_exit(context, exit_, ExitCode.SVM_EXIT_VINTR)
    context.expect("RIP", exit_.vmcb["rip"], code + shadow, hex)
    context.expect("INTERRUPT_SHADOW", exit_.vmcb["int_state.INTERRUPT_SHADOW"], 0)


_SHADOWING = {
    "sti": (instruction("STI").code, 1),
    "mov_ss": (bytes.fromhex("8cd0 8ed0"), 1),  # mov %ss, %eax; mov %eax, %ss
    "nop": (_NOP, 0),
}


@scenario(needs=[nested_svm], axes={"instruction": tuple(_SHADOWING)}, levels=2)
def test_exit_saves_the_interrupt_shadow(context: Context, instruction: str) -> None:
    """#VMEXIT saves whether L2 was in an interrupt shadow."""
    before, wanted = _SHADOWING[instruction]
    l2 = proxy_machine(context, timeout_s=HANG_S).l1.launch(vmcb={"intercept.cpuid": 1})
    exit_ = l2.run_to_exit(l2.exec_op(before + b"\x0f\xa2", user=False))
    expect_exit(context, exit_, ExitCode.SVM_EXIT_CPUID)
    context.expect("INTERRUPT_SHADOW", exit_.vmcb["int_state.INTERRUPT_SHADOW"], wanted)


# Physical interrupts


def _with_apic(context: Context) -> ProxyMachine:
    machine = proxy_machine(context, timeout_s=HANG_S, irqchip=True)
    Apic(machine.l1).enable()
    return machine


def _launch(machine: ProxyMachine, intercept: int, masking: int) -> GuestLevel:
    fields = {"intercept.intr": intercept, "int_ctl": IntCtl.of(V_INTR_MASKING=masking)}
    l2 = machine.l1.launch(vmcb=fields)
    l2.instance.set_eoi(Eoi.XAPIC)
    l2.set_policy(0, Policy.COUNT)
    return l2


@scenario(needs=[nested_svm], axes={"intercept": (0, 1)}, levels=2)
def test_with_masking_the_hosts_if_holds_interrupts_back(context: Context, intercept: int) -> None:
    """With V_INTR_MASKING and IF=0 in L1 an interrupt waits for L1, whatever L2's IF."""
    machine = _with_apic(context)
    l1, l2 = machine.l1, _launch(machine, intercept, masking=1)
    l2.ping()
    machine.interrupt(VECTOR)
    results = l2.run([simple("STI_NOP"), simple("PAUSE"), simple("CLI")])
    context.expect("exceptions in L2", [r.vector for r in results], [None] * 3)
    context.expect("interrupts in L2", (l2.counted(VECTOR), l2.counted(0)), (0, 0))
    l1.run(simple("STI_NOP_CLI"))
    context.expect("interrupts in L1", l1.counted(VECTOR), 1)
    context.expect("V_IRQ in the VMCB", l2.vmcb["int_ctl.V_IRQ"], 0)


@scenario(needs=[nested_svm], axes={"masking": (0, 1)}, levels=2)
def test_intercepted_interrupt_is_l1s(context: Context, masking: int) -> None:
    """An intercepted interrupt exits, by L1's IF with V_INTR_MASKING, else by L2's; L1 takes it."""
    machine = _with_apic(context)
    l1, l2 = machine.l1, _launch(machine, 1, masking)
    if masking:
        l1.run(simple("STI"))
    l2.run(nop() if masking else simple("STI"))
    machine.interrupt(VECTOR)
    exit_ = l2.run_to_exit(nop())
    expect_exit(context, exit_, ExitCode.SVM_EXIT_INTR)
    context.expect("EXITINTINFO.VALID", exit_.exit_int_info.VALID, 0)
    l1.run(simple("STI_NOP_CLI"))
    context.expect("interrupts in L1", l1.counted(VECTOR), 1)
    context.expect("interrupts in L2", l2.counted(VECTOR), 0)
    context.expect("L2 goes on", l2.finish()[0].ok, True)


@scenario(needs=[nested_svm], levels=2)
def test_interrupt_from_l2_is_l1s_after_the_exit(context: Context) -> None:
    """An interrupt that comes with IF=0 in L2, not intercepted, is taken by L1 after #VMEXIT."""
    machine = _with_apic(context)
    l1, l2 = machine.l1, _launch(machine, 0, masking=0)
    # movl $ICR_LOW, %ebx; movl $self IPI, (%rbx); vmmcall
    to_self = (1 << 18 | 1 << 14 | VECTOR).to_bytes(4, "little")
    icr = (APIC_BASE + ICR_LOW).to_bytes(4, "little")
    code = b"\xbb" + icr + b"\xc7\x03" + to_self + _VMMCALL
    l1.ping()
    l2.vmcb["rip"] = l2.instance.put_code(code)
    # One program: a way out of KVM_RUN between the two would open the window by itself.
    entered, waited = l1.run([l2.entry_op(), wait_interrupt(VECTOR, polls=1 << 16)])
    context.expect("exit code", entered.values[0], ExitCode.SVM_EXIT_VMMCALL, hex)
    context.expect("interrupts in L1", l1.counted(VECTOR), 1)
    context.expect("the wait", waited.status.name, "DONE", str)


@scenario(needs=[nested_svm], axes={"intercept": (0, 1)}, levels=2)
def test_nmi_is_l1s_if_intercepted_else_l2s(context: Context, intercept: int) -> None:
    """An NMI while L2 runs exits if L1 intercepts it, and is handled in L1; else L2 handles it."""
    machine = proxy_machine(context, timeout_s=HANG_S)
    l1 = machine.l1
    l2 = l1.launch(vmcb={"intercept.nmi": intercept})
    l2.ping()
    machine.cpus[0].runner.vcpu.nmi()
    if intercept:
        expect_exit(context, l2.run_to_exit(nop()), ExitCode.SVM_EXIT_NMI)
    else:
        l2.run(nop())
    l1.ping()
    seen = (l1.counted(NMI), l2.counted(NMI))
    context.expect("NMIs in L1 and L2", seen, (intercept, 1 - intercept))
