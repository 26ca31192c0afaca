"""Instruction intercepts, one by one: taken they exit, not taken L2 goes on.

APM vol. 2, 15.9 Instruction Intercepts, 15.7.1 State Saved on Exit, 15.11.1 Selective CR0 write,
15.14.3 Shutdown Intercept, appendix C.
"""

from __future__ import annotations

from harness.errors import ScenarioFailure
from harness.facts import nested_svm
from harness.proxy.failure import GuestStopped
from harness.proxy.guest_level import GuestLevel
from harness.proxy.ops import Op, instruction
from harness.proxy.program import UD, simple, triple_fault, vector_name, write_cr
from harness.proxy.vmexit import VmExit
from harness.scenarios.case import scenario
from harness.scenarios.context import Context
from harness.scenarios.intercept_rows import BY_NAME, address_of, set_intercept
from harness.scenarios.l2 import expect_exit, expect_fault, expect_no_fault, proxy_machine
from harness.svm.exit_codes import ExitCode, describe
from harness.svm.msrs import Cr0
from kvm_ioctl.exits import HltExit, ShutdownExit

HANG_S = 5.0
"""An instruction that takes longer hangs."""


@scenario(needs=[nested_svm], axes={"instruction": tuple(BY_NAME)}, levels=2)
def test_instruction_exits_if_and_only_if_intercepted(context: Context, instruction: str) -> None:
    """An instruction exits, RIP at it, if L1 intercepts it; if not, L2 executes it."""
    row = BY_NAME[instruction]
    l1 = proxy_machine(context, timeout_s=HANG_S).l1
    l2 = l1.launch(vmcb=row.vmcb)
    op = row.op(l2)
    fault = l2.do(op).vector
    wanted = l1.do(row.op(l1)).vector if row.as_in_l1 else row.fault
    context.expect("its exception, not intercepted", fault, wanted, _show_vector)
    if not row.offered(l1):
        context.note(f"no {row.name} in CPUID: #UD may go before the intercept")
        return
    set_intercept(l2, row.intercept)
    exit_ = l2.run_to_exit(op)
    expect_exit(context, exit_, row.exit_code)
    context.expect("RIP", exit_.vmcb["rip"], address_of(op) + row.offset, hex)
    context.expect("EXITINTINFO.VALID", exit_.exit_int_info.VALID, 0)
    exit_.skip(row.length)
    exit_.vmcb["rsp"] += row.pops
    expect_no_fault(context, "what follows the instruction", l2.finish()[0].fault)


def _show_vector(vector: int | None) -> str:
    return "none" if vector is None else vector_name(vector)


# What needs more than a line of the table


@scenario(needs=[nested_svm], levels=2)
def test_vmmcall_that_is_not_intercepted_is_ud(context: Context) -> None:
    """VMMCALL raises #UD in L2 if L1 does not intercept it."""
    machine = proxy_machine(context, timeout_s=HANG_S)
    l2 = machine.l1.launch(vmcb={"intercept.vmmcall": 0})
    expect_fault(context, "VMMCALL", l2.fault_of(simple("VMMCALL")), UD)


@scenario(needs=[nested_svm], levels=2)
def test_intercepted_hlt_exits(context: Context) -> None:
    """An intercepted HLT exits before it halts."""
    l2 = proxy_machine(context, timeout_s=HANG_S).l1.launch(vmcb={"intercept.hlt": 1})
    exit_ = l2.run_to_exit(simple("HLT"))
    expect_exit(context, exit_, ExitCode.SVM_EXIT_HLT)
    exit_.skip()
    expect_no_fault(context, "what follows HLT", l2.finish()[0].fault)


@scenario(needs=[nested_svm], levels=2)
def test_hlt_that_is_not_intercepted_halts_l2(context: Context) -> None:
    """A HLT that L1 does not intercept halts the vCPU in L2: without APIC userspace is told."""
    machine = proxy_machine(context, timeout_s=HANG_S)
    l2 = machine.l1.launch()
    context.expect("KVM_RUN's exit", _stop(l2, simple("HLT")), HltExit.__name__, str)


@scenario(needs=[nested_svm], levels=2, axes={"npt": (True, False)})
def test_intercepted_shutdown_exits(context: Context, npt: bool) -> None:
    """A triple fault in L2 exits if L1 intercepts shutdown, and L1 lives on."""
    machine = proxy_machine(context, timeout_s=HANG_S)
    l2 = machine.l1.launch(npt=npt, vmcb={"intercept.shutdown": 1})
    expect_exit(context, l2.run_to_exit(triple_fault()), ExitCode.SVM_EXIT_SHUTDOWN)
    context.expect("L1 alive", machine.l1.ping(), True)


@scenario(needs=[nested_svm], levels=2)
def test_shutdown_that_is_not_intercepted_ends_l1(context: Context) -> None:
    """A triple fault in L2 that L1 does not intercept shuts the machine down."""
    l2 = proxy_machine(context, timeout_s=HANG_S).l1.launch()
    context.expect("KVM_RUN's exit", _stop(l2, triple_fault()), ShutdownExit.__name__, str)


def _stop(l2: GuestLevel, op: Op) -> str:
    """Run an operation that ends KVM_RUN and return the class of its exit."""
    try:
        seen = l2.start(op)
    except GuestStopped as e:
        return type(e.event).__name__
    raise ScenarioFailure(f"{op} did not stop the vCPU, L2 went on: {seen}")


_CR0_BITS = {"TS": False, "MP": False, "AM": True, "NW_CD": True, "WP": True, "NE": True}
"""Whether a change of the bit is an exit (APM vol. 2, appendix B: all but TS and MP)."""
_CR0_MASKS = {"NW_CD": Cr0.NW.mask | Cr0.CD.mask}


def _cr0_mask(name: str) -> int:
    return _CR0_MASKS.get(name) or Cr0.fields()[name].mask


@scenario(needs=[nested_svm], axes={"bit": tuple(_CR0_BITS)}, levels=2)
def test_selective_cr0_write_is_about_changes_but_of_ts_and_mp(context: Context, bit: str) -> None:
    """A selective CR0 intercept exits for MOV to CR0 that changes a bit other than TS and MP."""
    l2 = proxy_machine(context, timeout_s=HANG_S).l1.launch(vmcb={"intercept.selective_cr0": 1})
    changed = l2.read_cr(0) ^ _cr0_mask(bit)
    seen = l2.start(write_cr(0, changed))
    wanted = describe(ExitCode.SVM_EXIT_CR0_SEL_WRITE) if _CR0_BITS[bit] else "no exit"
    context.expect("exit", seen.name if isinstance(seen, VmExit) else "no exit", wanted, str)
    if isinstance(seen, VmExit):
        context.expect("CR0 unchanged", seen.vmcb["cr0"], changed ^ _cr0_mask(bit), hex)
    else:
        context.expect("CR0", l2.read_cr(0), changed, hex)


@scenario(needs=[nested_svm], levels=2)
def test_selective_cr0_write_ignores_the_same_value(context: Context) -> None:
    """A selective CR0 intercept does not exit for MOV to CR0 that changes nothing, nor for CLTS."""
    l2 = proxy_machine(context, timeout_s=HANG_S).l1.launch(vmcb={"intercept.selective_cr0": 1})
    value = l2.read_cr(0)
    for result in l2.run([write_cr(0, value), simple("CLTS")]):
        expect_no_fault(context, str(result.op), result.fault)


@scenario(needs=[nested_svm], levels=2)
def test_cr0_write_intercept_goes_before_the_selective_one(context: Context) -> None:
    """With both intercepts MOV to CR0 exits as a CR0 write."""
    intercepts = {"intercept.selective_cr0": 1, "intercept.cr0_write": 1}
    l2 = proxy_machine(context, timeout_s=HANG_S).l1.launch(vmcb=intercepts)
    exit_ = l2.run_to_exit(write_cr(0, l2.read_cr(0) ^ Cr0.AM.mask))
    expect_exit(context, exit_, ExitCode.SVM_EXIT_WRITE_CR0)


@scenario(needs=[nested_svm], axes={"intercept": ("selective_cr0", "cr0_write")}, levels=2)
def test_lmsw_is_a_cr0_write(context: Context, intercept: str) -> None:
    """LMSW that changes EM exits for either CR0 write intercept."""
    l2 = proxy_machine(context, timeout_s=HANG_S).l1.launch(vmcb={f"intercept.{intercept}": 1})
    exit_ = l2.run_to_exit(instruction("LMSW")(rax=l2.read_cr(0) ^ Cr0.EM.mask))
    wanted = {
        "selective_cr0": ExitCode.SVM_EXIT_CR0_SEL_WRITE,
        "cr0_write": ExitCode.SVM_EXIT_WRITE_CR0,
    }
    expect_exit(context, exit_, wanted[intercept])


@scenario(needs=[nested_svm], axes={"instruction": ("HLT", "INVD", "READ_CR0", "INVLPG", "STGI")})
def test_privilege_is_checked_before_the_intercept(context: Context, instruction: str) -> None:
    """At CPL 3 an intercepted privileged instruction raises #GP in L2 and does not exit."""
    names = {"READ_CR0": "cr0_read"}
    intercept = names.get(instruction, instruction.lower())
    l2 = proxy_machine(context, timeout_s=HANG_S).l1.launch(vmcb={f"intercept.{intercept}": 1})
    expect_fault(context, instruction, l2.fault_of(simple(instruction).user), 13, 0)
