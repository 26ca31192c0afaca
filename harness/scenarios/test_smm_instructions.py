"""SVM instructions in an SMI handler, and what RSM brings back after them.

APM vol. 2, 10.3.3 SMM Operating Environment (EFER is 0 on entry), 10.3.5 Exiting SMM, 15.22 SMM
Support; vol. 3, chapter 4; kernel: svm_enter_smm(), svm_leave_smm(), nested_svm_vmrun().
"""

from __future__ import annotations

from typing import Final

from harness.facts import nested_svm, smm
from harness.proxy.level import Level
from harness.proxy.machine import ProxyMachine
from harness.proxy.ops import Op
from harness.proxy.ops import instruction as line_of
from harness.proxy.program import GP, UD, wrmsr
from harness.proxy.smm import SmmLevel
from harness.scenarios.bare_code import THE_END, Ending, raised
from harness.scenarios.case import scenario
from harness.scenarios.context import Context
from harness.scenarios.l2 import expect_fault, gif_of, proxy_machine
from harness.scenarios.smi import step_over_rsm
from harness.scenarios.test_instruction_modes import ALL, UNKNOWN_HYPERCALL
from harness.scenarios.test_instructions import WITH_VMCB
from harness.svm.msrs import Efer, Msr
from harness.svm.vmcb import VMCB_SAVE_OFFSET, vmcb_save_area

HANG_S = 5.0
LEVELS: Final = (1, 2)
"""The level that the SMI interrupts."""


def _operation(handler: Level, instruction: str) -> Op:
    """Return the instruction; a VMCB is a page of the handler's scratch memory."""
    operand = {"VMMCALL": UNKNOWN_HYPERCALL}.get(instruction, 0)
    if instruction in WITH_VMCB:
        operand = handler.cpu.machine.pages.take()
    if instruction == "VMLOAD":
        # Of a TR that is none, the next change of CPL would be the end. #UD without SVME.
        handler.do(line_of("VMSAVE")(rax=operand))
    return line_of(instruction)(rax=operand)


def _wanted(instruction: str, svme: int, cpl: int) -> Ending:
    if instruction == "VMMCALL":
        return THE_END
    if not svme or instruction == "SKINIT":
        return raised(UD)
    if cpl:
        return raised(GP)
    # Not the manual's rule but KVM's: it hosts no guest from SMM (nested_svm_vmrun()).
    return raised(UD) if instruction == "VMRUN" else THE_END


def _seen(handler: Level, op: Op) -> Ending:
    fault = handler.fault_of(op)
    return raised(fault.vector, fault.error_code) if fault else THE_END


def _set_svme(handler: SmmLevel, svme: int) -> None:
    efer = Efer(handler.rdmsr(Msr.MSR_EFER))
    handler.wrmsr(Msr.MSR_EFER, efer.replace(SVME=svme))


@scenario(
    needs=[nested_svm, smm],
    axes={"level": LEVELS, "svme": (0, 1), "instruction": ALL},
    levels=2,
)
def test_svm_instruction_in_smm(context: Context, level: int, svme: int, instruction: str) -> None:
    """In SMM an SVM instruction is #UD until the handler sets EFER.SVME; RSM undoes all of it."""
    machine = proxy_machine(context, smm=True, timeout_s=HANG_S)
    machine.l1.enable_svm()
    interrupted = machine.level(level, npt=False)
    efer = Efer(interrupted.rdmsr(Msr.MSR_EFER))
    handler = machine.inject_smi()
    _set_svme(handler, svme)
    # CPL 3 without SVME is test_instructions' subject, and no other in SMM.
    for cpl in (0, 3) if svme else (0,):
        op = _operation(handler, instruction)
        seen = _seen(handler, op.user if cpl else op)
        context.expect(f"{instruction} at CPL {cpl}", seen, _wanted(instruction, svme, cpl), str)
    if svme:
        # CLGI leaves SMM by itself: GIF is in no save area.
        handler.do(line_of("STGI")())
    # With SVME set, RSM is the subject of the scenario below.
    _set_svme(handler, 0)
    context.expect("level after RSM", handler.rsm().name, interrupted.name, str)
    context.expect("EFER after RSM", Efer(interrupted.rdmsr(Msr.MSR_EFER)), efer)
    context.expect("L1 alive", machine.l1.ping(), True)
    context.expect("L2 answers", machine.level(2, npt=False).ping(), True)


@scenario(needs=[nested_svm, smm], axes={"level": LEVELS}, levels=2)
def test_svme_does_not_survive_into_smm(context: Context, level: int) -> None:
    """In SMM EFER.SVME is 0, time and again, and after RSM it is what it was."""
    machine = proxy_machine(context, smm=True, timeout_s=HANG_S)
    machine.l1.enable_svm()
    interrupted = machine.level(level, npt=False)
    interrupted.ping()
    for _ in range(3):
        handler = machine.inject_smi()
        context.expect("SVME in SMM", Efer(handler.rdmsr(Msr.MSR_EFER)).SVME, 0)
        context.expect("level after RSM", handler.rsm().name, interrupted.name, str)
        context.expect("SVME after RSM", Efer(interrupted.rdmsr(Msr.MSR_EFER)).SVME, 1)
    context.expect("L1 alive", machine.l1.ping(), True)


@scenario(needs=[nested_svm, smm], axes={"level": LEVELS}, levels=2)
def test_rsm_of_a_handler_with_svme_set(context: Context, level: int) -> None:
    """RSM of a handler that set EFER.SVME comes back to L1 and to L2, which go on."""
    machine = proxy_machine(context, smm=True, timeout_s=HANG_S)
    machine.l1.enable_svm()
    interrupted = machine.level(level, npt=False)
    interrupted.ping()
    handler = machine.inject_smi()
    _set_svme(handler, 1)
    if level == 2:
        # By single steps, and looked at before L2 runs: a KVM that lost L1's state has lost its
        # own intercepts with it, and L2 would take the host down.
        step_over_rsm(handler)
        kept, wanted = _kept_cr3(machine), int(machine.l1.tables.root)
        context.expect("CR3 that KVM keeps for L1", kept, wanted, hex)
        machine.cpus[0].wait_report(HANG_S)
    else:
        handler.rsm()
    context.expect("SVME after RSM", Efer(interrupted.rdmsr(Msr.MSR_EFER)).SVME, 1)
    context.expect("L1 alive", machine.l1.ping(), True)
    context.expect("L2 answers", machine.level(2, npt=False).ping(), True)


def _kept_cr3(machine: ProxyMachine) -> int:
    """Return L1's CR3 in the nested state, whose save area is that of L1."""
    blob = bytes(machine.vcpus[0].vcpu.get_nested_state().data)
    at = VMCB_SAVE_OFFSET + vmcb_save_area.cr3.offset
    return int.from_bytes(blob[at : at + 8], "little")


@scenario(needs=[nested_svm, smm], axes={"level": LEVELS}, levels=2)
def test_hsave_address_can_be_read_in_smm(context: Context, level: int) -> None:
    """VM_HSAVE_PA keeps its value in SMM, and takes no illegal one there either."""
    machine = proxy_machine(context, smm=True, timeout_s=HANG_S)
    machine.l1.enable_svm()
    before = machine.l1.rdmsr(Msr.MSR_VM_HSAVE_PA)
    machine.level(level, npt=False).ping()
    handler = machine.inject_smi()
    context.expect("VM_HSAVE_PA in SMM", handler.rdmsr(Msr.MSR_VM_HSAVE_PA), before, hex)
    op = wrmsr(Msr.MSR_VM_HSAVE_PA, before | 8)
    expect_fault(context, "VM_HSAVE_PA, not aligned", handler.fault_of(op), GP, 0)
    handler.rsm()
    context.expect("L1 alive", machine.l1.ping(), True)


@scenario(needs=[nested_svm, smm], levels=2)
def test_gif_is_1_after_rsm(context: Context) -> None:
    """An SMI is taken with GIF=1 only, so GIF is 1 after RSM to L1 and to L2."""
    machine = proxy_machine(context, smm=True, timeout_s=HANG_S)
    for level in LEVELS:
        interrupted = machine.level(level, npt=False)
        interrupted.ping()
        machine.inject_smi().rsm()
        context.expect(f"GIF after RSM to L{level}", gif_of(interrupted), True)
        context.expect(f"L{level} alive", interrupted.ping(), True)
