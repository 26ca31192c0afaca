"""Task switches, #TS and more of 32-bit L2; FERR_FREEZE, ICEBP and MWAIT, which have rules too.

APM vol. 2, 12.3 Task Management, 15.12 Exception Intercepts, 15.14.1 Task Switch Intercept, 15.14.2
Ferr_Freeze Intercept, 15.9 Instruction Intercepts, 8.2.10 #TS; appendix B.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from harness.facts import nested_svm
from harness.machine.addresses import Gpa
from harness.proxy.ops import instruction
from harness.proxy.program import DB, TS, simple
from harness.scenarios.bare_code import (
    LOW,
    NO_SELECTOR,
    OTHER_CODE,
    OTHER_STACK_TOP,
    OTHER_TSS,
    OTHER_TSS_SELECTOR,
    RFLAGS_NT,
    RING_1_VECTOR,
    TASK_GATE_SELECTOR,
    TASK_GATE_VECTOR,
    TSS,
    BareCode,
    ending_of,
    raised,
)
from harness.scenarios.case import scenario
from harness.scenarios.context import Context
from harness.scenarios.intercept_rows import address_of
from harness.scenarios.l2 import expect_exit, expect_fault, expect_no_fault, proxy_machine
from harness.svm.bits import Bits, bits
from harness.svm.exit_codes import ExitCode
from harness.svm.msrs import Cr0

HANG_S = 5.0


class TaskSwitchInfo2(Bits):
    """EXITINFO2 of SVM_EXIT_TASK_SWITCH (APM vol. 2, 15.14.1 Task Switch Intercept)."""

    RFLAGS_RF = bits(48)
    HAS_ERROR_CODE = bits(44)
    FAR_JUMP = bits(38)
    IRET = bits(36)
    ERROR_CODE = bits(31, 0)


def _far(opcode: int, selector: int) -> bytes:
    return bytes((opcode,)) + struct.pack("<IH", 0, selector)


_CALL, _JUMP = 0x9A, 0xEA
_NO_CAUSE = TaskSwitchInfo2(0)


@dataclass(frozen=True)
class Switch:
    """A way to switch tasks, and EXITINFO2 of its intercept."""

    code: bytes
    info2: TaskSwitchInfo2 = _NO_CAUSE
    nested: bool = False
    """RFLAGS.NT is set before: IRET returns to the task that the TSS links to."""


SWITCHES: Final = {
    "call_tss": Switch(_far(_CALL, OTHER_TSS_SELECTOR)),
    "call_gate": Switch(_far(_CALL, TASK_GATE_SELECTOR)),
    "jmp_tss": Switch(_far(_JUMP, OTHER_TSS_SELECTOR), TaskSwitchInfo2.of(FAR_JUMP=1)),
    "jmp_gate": Switch(_far(_JUMP, TASK_GATE_SELECTOR), TaskSwitchInfo2.of(FAR_JUMP=1)),
    "interrupt_gate": Switch(bytes((0xCD, TASK_GATE_VECTOR))),
    "iret": Switch(b"\xcf", TaskSwitchInfo2.of(IRET=1), nested=True),
}
_MARK = 0x7A5C


def _prepare(bare: BareCode, switch: Switch) -> int:
    """Write the other task, which marks EBX and ends in HLT; return RFLAGS to start with."""
    memory = bare.level.cpu.machine.memory
    memory.write(Gpa(OTHER_CODE), b"\xbb" + struct.pack("<I", _MARK) + b"\xf4")
    bare.write_tss(
        OTHER_TSS,
        cr3=bare.state["cr3"],
        eip=OTHER_CODE,
        eflags=2,
        esp=LOW + OTHER_STACK_TOP,
        cs=0x08,
        **dict.fromkeys(("ss", "ds", "es", "fs", "gs"), 0x10),
        # Beyond the limit: no I/O map.
        io_map=0xFFFF << 16,
    )
    if not switch.nested:
        return 2
    bare.write_tss(TSS, link=OTHER_TSS_SELECTOR)
    bare.make_busy(OTHER_TSS_SELECTOR)
    return 2 | RFLAGS_NT


@scenario(needs=[nested_svm], axes={"switch": tuple(SWITCHES)}, levels=2)
def test_intercepted_task_switch_exits(context: Context, switch: str) -> None:
    """An intercepted task switch exits with the new TSS in EXITINFO1 and its cause in EXITINFO2."""
    how = SWITCHES[switch]
    machine = proxy_machine(context, timeout_s=HANG_S)
    l2 = machine.l1.launch(vmcb={"intercept.task_switch": 1})
    bare = BareCode(l2, "protected")
    rflags = _prepare(bare, how)
    exit_ = bare.enter_l2(how.code, rflags=rflags)
    expect_exit(context, exit_, ExitCode.SVM_EXIT_TASK_SWITCH)
    context.expect("EXITINFO1, the TSS", exit_.exit_info_1, OTHER_TSS_SELECTOR, hex)
    context.expect("EXITINFO2", TaskSwitchInfo2(exit_.exit_info_2).replace(RFLAGS_RF=0), how.info2)
    context.expect("TR, still the old one", exit_.vmcb["tr.base"], TSS, hex)


@scenario(needs=[nested_svm], axes={"switch": tuple(SWITCHES), "npt": (True, False)}, levels=2)
def test_task_switch_that_is_not_intercepted_happens(
    context: Context, switch: str, npt: bool
) -> None:
    """A task switch of L2 that L1 does not intercept loads the new task and its TR."""
    how = SWITCHES[switch]
    l2 = proxy_machine(context, timeout_s=HANG_S).l1.launch(npt=npt)
    bare = BareCode(l2, "protected")
    rflags = _prepare(bare, how)
    exit_ = bare.enter_l2(how.code, rflags=rflags)
    expect_exit(context, exit_, ExitCode.SVM_EXIT_HLT)
    context.expect("RIP, in the new task", exit_.vmcb["rip"], OTHER_CODE + 5, hex)
    context.expect("EBX", exit_.gprs.rbx, _MARK, hex)
    # VMRUN and #VMEXIT leave TR alone, so L1 sees L2's with VMSAVE, which the proxy executes.
    context.expect("TR", exit_.vmcb["tr.selector"], OTHER_TSS_SELECTOR, hex)
    context.expect("TR.base", exit_.vmcb["tr.base"], OTHER_TSS, hex)
    context.expect("CR0.TS", Cr0(exit_.vmcb["cr0"]).TS, 1)


# #TS: only outside long mode


@scenario(needs=[nested_svm], axes={"mode": ("protected", "legacy_paging")}, levels=2)
def test_invalid_tss_exits_if_and_only_if_intercepted(context: Context, mode: str) -> None:
    """An inner stack that is none is #TS with its selector, in an exit if L1 intercepts #TS."""
    machine = proxy_machine(context, timeout_s=HANG_S)
    code = bytes((0xCD, RING_1_VECTOR))
    bare = BareCode(machine.l1.launch(), mode, cpl=3)
    context.expect("in L2's handler", bare.run_in_l2(code), raised(TS, NO_SELECTOR), str)
    bare = BareCode(machine.l1.launch(vmcb={f"intercept.excp.{TS}": 1}), mode, cpl=3)
    exit_ = bare.enter_l2(code)
    expect_exit(context, exit_, ExitCode.SVM_EXIT_EXCP_BASE + TS)
    context.expect("EXITINFO1", exit_.exit_info_1, NO_SELECTOR, hex)
    context.expect("the ending", ending_of(exit_).what, f"SVM_EXIT_EXCP_BASE+{TS}", str)


# Instructions whose intercepts have conditions


@scenario(needs=[nested_svm], levels=2)
def test_intercepted_icebp_exits(context: Context) -> None:
    """ICEBP that L1 intercepts exits, RIP at it, and not as #DB."""
    vmcb = {"intercept.icebp": 1, f"intercept.excp.{DB}": 1}
    l2 = proxy_machine(context, timeout_s=HANG_S).l1.launch(vmcb=vmcb)
    op = l2.exec_op(instruction("ICEBP").code)
    exit_ = l2.run_to_exit(op)
    expect_exit(context, exit_, ExitCode.SVM_EXIT_ICEBP)
    context.expect("RIP", exit_.vmcb["rip"], address_of(op), hex)
    exit_.skip()
    expect_no_fault(context, "what follows ICEBP", l2.finish()[0].fault)


@scenario(needs=[nested_svm], levels=2)
def test_icebp_that_is_not_intercepted_is_db(context: Context) -> None:
    """ICEBP that L1 does not intercept is #DB in L2, RIP after it."""
    l2 = proxy_machine(context, timeout_s=HANG_S).l1.launch()
    op = l2.exec_op(instruction("ICEBP").code)
    fault = l2.fault_of(op)
    expect_fault(context, "ICEBP", fault, DB)
    assert fault is not None
    context.expect("RIP", fault.rip, address_of(op) + 1, hex)


@scenario(needs=[nested_svm], levels=2)
def test_unarmed_mwait_does_not_exit_for_the_armed_intercept(context: Context) -> None:
    """MWAIT without a MONITOR before it does not exit for the intercept of armed MWAIT."""
    l2 = proxy_machine(context, timeout_s=HANG_S).l1.launch(vmcb={"intercept.mwait_cond": 1})
    expect_no_fault(context, "MWAIT", l2.fault_of(simple("MWAIT")))


@scenario(needs=[nested_svm], levels=2)
def test_armed_mwait_exits_for_the_armed_intercept(context: Context) -> None:
    """MWAIT after MONITOR exits as SVM_EXIT_MWAIT_COND if L1 intercepts armed MWAIT."""
    l2 = proxy_machine(context, timeout_s=HANG_S).l1.launch(vmcb={"intercept.mwait_cond": 1})
    code = instruction("MONITOR").code + b"\x31\xc0" + instruction("MWAIT").code
    exit_ = l2.run_to_exit(l2.exec_op(code, rax=l2.scratch))
    expect_exit(context, exit_, ExitCode.SVM_EXIT_MWAIT_COND)


_X87_DIVIDE = bytes.fromhex("dbe3 66c7033b03 d92b d9e8 d9ee def9 9b")
"""fninit; movw $0x33b, (%rbx); fldcw (%rbx); fld1; fldz; fdivp; fwait: 1/0 with ZM clear"""


@scenario(needs=[nested_svm], levels=2)
def test_intercepted_ferr_freeze_exits(context: Context) -> None:
    """With CR0.NE=0 an unmasked x87 exception freezes L2, which exits if L1 intercepts it."""
    l2 = proxy_machine(context, timeout_s=HANG_S).l1.launch(vmcb={"intercept.ferr_freeze": 1})
    l2.vmcb["cr0"] &= ~Cr0.NE.mask
    exit_ = l2.run_to_exit(l2.exec_op(_X87_DIVIDE, rbx=l2.scratch))
    expect_exit(context, exit_, ExitCode.SVM_EXIT_FERR_FREEZE)
