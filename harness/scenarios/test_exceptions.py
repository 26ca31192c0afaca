"""Exceptions in L2: intercepted they exit before delivery, not intercepted L2's handler gets them.

APM vol. 2, 15.12 Exception Intercepts, 15.7.2 Intercepts During IDT Interrupt Delivery, 8.2
Vectors, 8.4.2 Page-Fault Error Code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from harness.facts import nested_svm
from harness.machine.addresses import Gpa
from harness.proxy.guest_level import GuestLevel
from harness.proxy.layout import GDT_CS32, IDT_OFFSET, STACK_TOP, TABLES_OFFSET, TRAP_STACK_TOP
from harness.proxy.ops import Op, instruction
from harness.proxy.paging import PAGE, Pte
from harness.proxy.program import (
    AC,
    BP,
    BR,
    DB,
    DE,
    DF,
    GP,
    MF,
    NM,
    NP,
    OF,
    PF,
    SS,
    UD,
    XF,
    load,
    store,
    vector_name,
)
from harness.scenarios.case import scenario
from harness.scenarios.context import Context
from harness.scenarios.intercept_rows import address_of
from harness.scenarios.l2 import expect_exit, expect_fault, expect_no_fault, proxy_machine
from harness.svm.exit_codes import ExitCode
from harness.svm.msrs import Cr0
from harness.svm.vmcb import EventInj

HANG_S = 5.0

_TYPE_EXCEPTION = 3
_TYPE_SOFTWARE = 4

NOT_PRESENT_SELECTOR: Final = 0x58
"""The first entry of a proxy's GDT that is free."""
_NOT_PRESENT_DATA = 0x00CF_1300_0000_FFFF
BAD_SELECTOR: Final = 0xF8
"""A null descriptor in a proxy's GDT."""
_GATE_TYPE_OFFSET = 5
_ABSENT_INTERRUPT_GATE = 0x0E

# push $GDT_CS32; lea 1f(%rip), %rax; push %rax; lretq; 1: what follows is 32-bit code
_TO_32_BIT = bytes((0x6A, GDT_CS32)) + bytes.fromhex("488d0503000000 50 48cb")
_SINGLE_STEP = bytes.fromhex("9c 810c2400010000 9d 90")
"""pushf; orl $RFLAGS.TF, (%rsp); popf; nop"""
_OVERFLOW = _TO_32_BIT + bytes.fromhex("b8ffffff7f 83c001 ce")
"""mov $0x7fffffff, %eax; add $1, %eax; into"""
_OUT_OF_BOUNDS = _TO_32_BIT + bytes.fromhex("b805000000 6203")
"""mov $5, %eax; bound %eax, (%ebx)"""
_X87_DIVIDE = bytes.fromhex("dbe3 66c7033b03 d92b d9e8 d9ee def9 9b")
"""fninit; movw $0x33b, (%rbx); fldcw (%rbx); fld1; fldz; fdivp; fwait: 1/0 with ZM clear"""
_SSE_DIVIDE = bytes.fromhex("c703801d0000 0fae13 0f57c0 b801000000 f30f2ac8 f30f5ec8")
"""movl $0x1d80, (%rbx); ldmxcsr (%rbx); xorps %xmm0, %xmm0; mov $1, %eax; cvtsi2ss %eax, %xmm1;
divss %xmm0, %xmm1: 1/0 with ZM clear"""
_FWAIT = bytes.fromhex("9b")
_UNALIGNED_LOAD = bytes.fromhex("9c 810c2400000400 9d 8b4301")
"""pushf; orl $RFLAGS.AC, (%rsp); popf; movl 1(%rbx), %eax"""


@dataclass(frozen=True)
class Raise:
    """A way to raise an exception."""

    vector: int
    code: bytes
    offset: int
    """Where in the code the instruction that raises it starts."""
    error_code: int = 0
    rax: int = 0
    trap_bytes: int = 0
    """Of a trap: the instruction's bytes, as the handler sees RIP after it."""
    prepare: Callable[[GuestLevel], None] = lambda _: None
    exit_after: bool = False
    """#VMEXIT, too, has RIP after the instruction."""
    user: bool = False
    """At CPL 3."""

    def op(self, level: GuestLevel) -> Op:
        """Return the operation."""
        return level.exec_op(self.code, user=self.user, rax=self.rax, rbx=level.scratch)


def _add_not_present_segment(level: GuestLevel) -> None:
    at = Gpa(level.instance.gpa + TABLES_OFFSET + NOT_PRESENT_SELECTOR)
    level.cpu.machine.memory.write_int(at, 8, _NOT_PRESENT_DATA)


def _set_task_switched(level: GuestLevel) -> None:
    level.vmcb["cr0"] |= Cr0.TS.mask


def _set_monitor_coprocessor(level: GuestLevel) -> None:
    level.vmcb["cr0"] |= Cr0.TS.mask | Cr0.MP.mask


def _check_alignment(level: GuestLevel) -> None:
    level.vmcb["cr0"] |= Cr0.AM.mask


def _break_gate(level: GuestLevel) -> None:
    """Make the gate of #DE not present: #NP while #DE is delivered is #DF."""
    # A first exception maps all that delivery touches: the host must not come in between.
    level.do(instruction("UD2")())
    at = Gpa(level.instance.gpa + IDT_OFFSET + _GATE_TYPE_OFFSET)
    level.cpu.machine.memory.write_int(at, 1, _ABSENT_INTERRUPT_GATE)


RAISES: Final = {
    "DE": Raise(DE, bytes.fromhex("31c9 31d2 48f7f1"), 4),
    "DB": Raise(DB, _SINGLE_STEP, len(_SINGLE_STEP) - 1, trap_bytes=1, exit_after=True),
    "BP": Raise(BP, instruction("INT3").code, 0, trap_bytes=1),
    "OF": Raise(OF, _OVERFLOW, len(_OVERFLOW) - 1, trap_bytes=1),
    "BR": Raise(BR, _OUT_OF_BOUNDS, len(_OUT_OF_BOUNDS) - 2),
    "UD": Raise(UD, instruction("UD2").code, 0),
    "NM": Raise(NM, instruction("FLDZ").code, 0, prepare=_set_task_switched),
    "NP": Raise(
        NP,
        instruction("MOV_DS").code,
        0,
        error_code=NOT_PRESENT_SELECTOR,
        rax=NOT_PRESENT_SELECTOR,
        prepare=_add_not_present_segment,
    ),
    "SS": Raise(
        SS,
        instruction("MOV_SS").code,
        0,
        error_code=NOT_PRESENT_SELECTOR,
        rax=NOT_PRESENT_SELECTOR,
        prepare=_add_not_present_segment,
    ),
    "GP": Raise(GP, instruction("MOV_DS").code, 0, error_code=BAD_SELECTOR, rax=BAD_SELECTOR),
    "MF": Raise(MF, _X87_DIVIDE, len(_X87_DIVIDE) - 1),
    "NM_FWAIT": Raise(NM, _FWAIT, 0, prepare=_set_monitor_coprocessor),
    "XF": Raise(XF, _SSE_DIVIDE, len(_SSE_DIVIDE) - 4),
    "AC": Raise(AC, _UNALIGNED_LOAD, len(_UNALIGNED_LOAD) - 3, prepare=_check_alignment, user=True),
}


@scenario(needs=[nested_svm], axes={"exception": tuple(RAISES)}, levels=2)
def test_exception_exits_if_and_only_if_intercepted(context: Context, exception: str) -> None:
    """An exception exits with vector and error code if L1 intercepts it; if not, L2 handles it."""
    how = RAISES[exception]
    l2 = proxy_machine(context, timeout_s=HANG_S).l1.launch()
    how.prepare(l2)
    op = how.op(l2)
    fault = l2.fault_of(op)
    expect_fault(context, "L2's instruction", fault, how.vector, how.error_code)
    assert fault is not None
    at = address_of(op) + how.offset
    context.expect("RIP in L2's handler", fault.rip, at + how.trap_bytes, hex)

    l2.configure({f"intercept.excp.{how.vector}": 1})
    exit_ = l2.run_to_exit(op)
    expect_exit(context, exit_, ExitCode.SVM_EXIT_EXCP_BASE + how.vector)
    context.expect("EXITINFO1", exit_.exit_info_1, how.error_code, hex)
    context.expect("RIP at exit", exit_.vmcb["rip"], at + how.trap_bytes * int(how.exit_after), hex)
    context.expect("EXITINTINFO.VALID", exit_.exit_int_info.VALID, 0)


@scenario(needs=[nested_svm], axes={"vector": (DE, BP, UD)}, levels=2)
def test_int_n_is_no_exception_intercept(context: Context, vector: int) -> None:
    """INT n with an exception's vector does not trigger that exception's intercept."""
    machine = proxy_machine(context, timeout_s=HANG_S)
    l2 = machine.l1.launch(vmcb={f"intercept.excp.{vector}": 1})
    # Only vectors without error code: INT n pushes none, and the handler would miss it.
    expect_fault(context, f"INT {vector}", l2.fault_of(l2.int_n(vector)), vector)


# Faults in the delivery of faults


def _divide_with_absent_gate(l2: GuestLevel) -> Op:
    _break_gate(l2)
    return instruction("DIV")()


def _int_beyond_limit(l2: GuestLevel) -> Op:
    """Return INT 80h, and then #GP, beyond an IDT that ends with #DF."""
    # sidt (%rbx); movw $limit, (%rbx); lidt (%rbx); int $0x80
    limit = (16 * (DF + 1) - 1).to_bytes(2, "little")
    code = b"\x0f\x01\x0b\x66\xc7\x03" + limit + b"\x0f\x01\x1b\xcd\x80"
    return l2.exec_op(code, user=False, rbx=l2.scratch)


_DOUBLE_FAULTS = {"absent_gate": _divide_with_absent_gate, "beyond_limit": _int_beyond_limit}


@scenario(needs=[nested_svm], axes={"how": tuple(_DOUBLE_FAULTS)}, levels=2)
def test_fault_in_the_delivery_of_a_fault_is_df(context: Context, how: str) -> None:
    """A contributory fault while one is delivered is #DF with error code 0 in L2."""
    l2 = proxy_machine(context, timeout_s=HANG_S).l1.launch()
    expect_fault(context, "the instruction", l2.fault_of(_DOUBLE_FAULTS[how](l2)), DF, 0)


@scenario(needs=[nested_svm], axes={"how": tuple(_DOUBLE_FAULTS)}, levels=2)
def test_intercepted_df_exits(context: Context, how: str) -> None:
    """A double fault of L2 exits as #DF with error code 0 if L1 intercepts #DF."""
    l2 = proxy_machine(context, timeout_s=HANG_S).l1.launch(vmcb={f"intercept.excp.{DF}": 1})
    exit_ = l2.run_to_exit(_DOUBLE_FAULTS[how](l2))
    expect_exit(context, exit_, ExitCode.SVM_EXIT_EXCP_BASE + DF)
    context.expect("EXITINFO1", exit_.exit_info_1, 0, hex)


@scenario(needs=[nested_svm], levels=2)
def test_intercepted_fault_in_delivery_reports_the_first_one(context: Context) -> None:
    """An intercepted fault while #DE is delivered exits with #DE in EXITINTINFO."""
    l2 = proxy_machine(context, timeout_s=HANG_S).l1.launch(vmcb={f"intercept.excp.{NP}": 1})
    _break_gate(l2)
    op = instruction("DIV")()
    exit_ = l2.run_to_exit(op)
    expect_exit(context, exit_, ExitCode.SVM_EXIT_EXCP_BASE + NP)
    wanted = EventInj.of(VALID=1, TYPE=_TYPE_EXCEPTION, VEC=DE)
    context.expect("EXITINTINFO", exit_.exit_int_info, wanted)


_DELIVERIES = {
    "UD": (instruction("UD2"), EventInj.of(VALID=1, TYPE=_TYPE_EXCEPTION, VEC=UD), 0),
    "GP": (
        instruction("MOV_DS"),
        EventInj.of(VALID=1, TYPE=_TYPE_EXCEPTION, VEC=GP, VALID_ERR=1),
        BAD_SELECTOR,
    ),
    "INT80": (instruction("INT80"), EventInj.of(VALID=1, TYPE=_TYPE_SOFTWARE, VEC=0x80), 0),
}


@scenario(
    needs=[nested_svm],
    axes={"event": tuple(_DELIVERIES), "npt": (True, False)},
    levels=2,
)
def test_page_fault_in_delivery_reports_the_event(context: Context, event: str, npt: bool) -> None:
    """An intercepted #PF on the handler's stack exits with the event's vector in EXITINTINFO."""
    line, wanted, error_code = _DELIVERIES[event]
    l2 = proxy_machine(context, timeout_s=HANG_S).l1.launch(
        npt=npt, vmcb={f"intercept.excp.{PF}": 1}
    )
    l2.ping()
    # IST 1 is in another page than the stack that the program runs on.
    assert (TRAP_STACK_TOP - 8) // PAGE != STACK_TOP // PAGE - 1
    stack_page = l2.instance.gpa + TRAP_STACK_TOP - PAGE // 2
    l2.configure({})
    l2.tables.unmap(stack_page)
    exit_ = l2.run_to_exit(line(rax=BAD_SELECTOR))
    expect_exit(context, exit_, ExitCode.SVM_EXIT_EXCP_BASE + PF)
    context.expect("EXITINTINFO", exit_.exit_int_info, wanted)
    context.expect("its error code", exit_.vmcb["exit_int_info_err"], error_code, hex)
    context.expect("EXITINFO2, page", exit_.exit_info_2 // PAGE, stack_page // PAGE, hex)


# Page faults of L2's own tables


@dataclass(frozen=True)
class PageFault:
    """A page-table entry, an access to it, and the error code (APM vol. 2, 8.4.2)."""

    error_code: int
    clear: int = 0
    set_: int = 0
    write: bool = False
    user: bool = False
    fetch: bool = False


_P, _W, _U, _RSV, _ID = (1 << n for n in range(5))
PAGE_FAULTS: Final = {
    "absent_read": PageFault(0, clear=Pte.P),
    "absent_write": PageFault(_W, clear=Pte.P, write=True),
    "absent_user": PageFault(_U, clear=Pte.P, user=True),
    "read_only_write": PageFault(_P | _W, clear=Pte.W, write=True),
    "supervisor_user": PageFault(_P | _U, clear=Pte.U, user=True),
    "no_execute": PageFault(_P | _ID, set_=Pte.NX, fetch=True),
    "reserved": PageFault(_P | _RSV, set_=1 << 51),
}


def _access(l2: GuestLevel, gva: int, kind: PageFault) -> Op:
    if kind.fetch:
        return l2.exec_op(b"\xff\xe3", user=False, rbx=gva)  # jmp *%rbx
    op = store(gva, 1) if kind.write else load(gva)
    return op.user if kind.user else op


@scenario(
    needs=[nested_svm],
    axes={"fault": tuple(PAGE_FAULTS), "npt": (True, False)},
    levels=2,
)
def test_page_fault_exits_if_and_only_if_intercepted(
    context: Context, fault: str, npt: bool
) -> None:
    """A #PF of L2's own tables has the same error code and address in L2 and in an exit."""
    kind = PAGE_FAULTS[fault]
    l2 = proxy_machine(context, timeout_s=HANG_S).l1.launch(npt=npt)
    gva = l2.scratch + PAGE
    l2.tables.protect(gva, clear=kind.clear, set_=kind.set_)
    op = _access(l2, gva, kind)
    seen = l2.fault_of(op)
    expect_fault(context, "the access", seen, PF, kind.error_code)
    assert seen is not None
    context.expect("CR2", seen.cr2, gva, hex)

    l2.configure({f"intercept.excp.{PF}": 1, "cr2": 0})
    exit_ = l2.run_to_exit(op)
    expect_exit(context, exit_, ExitCode.SVM_EXIT_EXCP_BASE + PF)
    context.expect("EXITINFO1", exit_.exit_info_1, kind.error_code, hex)
    context.expect("EXITINFO2", exit_.exit_info_2, gva, hex)
    context.expect("CR2 in the VMCB", exit_.vmcb["cr2"], 0, hex)


@scenario(needs=[nested_svm], axes={"npt": (True, False)}, levels=2)
def test_intercepted_page_fault_can_be_mended(context: Context, npt: bool) -> None:
    """After an intercepted #PF L1 maps the page, and L2's access succeeds."""
    machine = proxy_machine(context, timeout_s=HANG_S)
    l2 = machine.l1.launch(npt=npt, vmcb={f"intercept.excp.{PF}": 1})
    gva = l2.scratch + PAGE
    whole = l2.tables.entry(gva)
    machine.memory.write_int(Gpa(gva), 8, 0x1234)
    l2.tables.unmap(gva)
    exit_ = l2.run_to_exit(load(gva))
    expect_exit(context, exit_, ExitCode.SVM_EXIT_EXCP_BASE + PF)
    l2.tables.set_entry(gva, whole)
    result = l2.finish()[0]
    expect_no_fault(context, "the access", result.fault)
    context.expect("what L2 read", result.value, 0x1234, hex)


@scenario(needs=[nested_svm], axes={"other": (GP, UD, PF)}, levels=2)
def test_intercept_of_another_exception_does_not_count(context: Context, other: int) -> None:
    """Intercepting one exception does not make another one exit."""
    machine = proxy_machine(context, timeout_s=HANG_S)
    l2 = machine.l1.launch(vmcb={f"intercept.excp.{other}": 1})
    fault = l2.fault_of(instruction("DIV")())
    context.expect("exception in L2", vector_name(fault.vector if fault else -1), "#DE", str)
