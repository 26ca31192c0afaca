"""L3: L1 emulates SVM for L2 (`harness.proxy.nesting`), and what L2 asks for reaches L2.

What is tested is KVM below a hypervisor that nests: VMCBs merged of two, exits handed on.
APM vol. 2, 15.5 VMRUN Instruction, 15.9 Instruction Intercepts, 15.17 Global Interrupt Flag, STGI
and CLGI Instructions, 15.25 Nested Paging.
"""

from __future__ import annotations

from typing import Final

from harness.facts import nested_svm
from harness.machine.addresses import Gpa
from harness.proxy.apic import Apic
from harness.proxy.failure import ProxyError
from harness.proxy.guest_level import GuestLevel
from harness.proxy.layout import Eoi
from harness.proxy.level import ENTER_DEFAULT, Level
from harness.proxy.machine import ProxyMachine
from harness.proxy.ops import EnterFlag, instruction
from harness.proxy.paging import PAGE
from harness.proxy.program import (
    GP,
    NMI,
    PF,
    UD,
    cpuid,
    fill,
    inb,
    load,
    loop,
    nop,
    rdmsr,
    rdtsc,
    simple,
    store,
    triple_fault,
)
from harness.proxy.vmexit import VmExit
from harness.scenarios.case import LIFECYCLES, scenario
from harness.scenarios.context import Context
from harness.scenarios.intercept_rows import BY_NAME, address_of, set_intercept
from harness.scenarios.l2 import expect_exit, expect_fault, expect_no_fault, proxy_machine
from harness.svm.exit_codes import ExitCode
from harness.svm.msrs import Msr

TIMEOUT_S = 15.0
PAGING: Final = ("npt,npt", "npt,shadow", "shadow,npt", "shadow,shadow")
"""How L1 maps L2, and how L2 maps L3."""
IO_PORT: Final = 0x80


def _levels(
    context: Context, paging: str = PAGING[0]
) -> tuple[ProxyMachine, GuestLevel, GuestLevel]:
    machine = proxy_machine(context, timeout_s=TIMEOUT_S)
    outer, inner = (name == "npt" for name in paging.split(","))
    l2 = machine.l1.launch(npt=outer)
    return machine, l2, l2.launch(npt=inner)


def _expect_host(context: Context, exit_: VmExit, host: GuestLevel, code: int) -> None:
    context.expect("host of the exit", exit_.host.name, host.name, str)
    expect_exit(context, exit_, code)


_INSTRUCTIONS = ("cpuid", "rdtsc", "read_cr0", "write_cr4", "read_dr7", "sidt", "invlpg", "int80")


@scenario(needs=[nested_svm], axes={"instruction": _INSTRUCTIONS}, levels=3)
def test_instruction_of_l3_exits_to_l2(context: Context, instruction: str) -> None:
    """An instruction of L3 that L2 intercepts exits to L2, RIP at it; L1 sees nothing of it."""
    row = BY_NAME[instruction]
    _, l2, l3 = _levels(context)
    op = row.op(l3)
    expect_no_fault(context, "the instruction, not intercepted", l3.do(op).fault)
    set_intercept(l3, row.intercept)
    exit_ = l3.run_to_exit(op)
    _expect_host(context, exit_, l2, row.exit_code)
    context.expect("RIP", exit_.vmcb["rip"], address_of(op) + row.offset, hex)
    exit_.skip(row.length)
    expect_no_fault(context, "what follows", l3.finish()[0].fault)


_FAULTS = {"UD": (UD, simple("UD2")), "GP": (GP, instruction("MOV_DS")(rax=0xF8))}


@scenario(needs=[nested_svm], axes={"exception": tuple(_FAULTS)}, levels=3)
def test_exception_of_l3_is_l3s_unless_l2_intercepts_it(context: Context, exception: str) -> None:
    """An exception of L3 is handled by L3, or exits to L2 if L2 intercepts it."""
    vector, op = _FAULTS[exception]
    _, l2, l3 = _levels(context)
    expect_fault(context, "in L3", l3.fault_of(op), vector)
    l3.configure({f"intercept.excp.{vector}": 1})
    _expect_host(context, l3.run_to_exit(op), l2, ExitCode.SVM_EXIT_EXCP_BASE + vector)


@scenario(needs=[nested_svm], axes={"paging": PAGING}, levels=3, lifecycle=LIFECYCLES)
def test_l3_computes_and_faults(context: Context, paging: str) -> None:
    """L3 computes in memory of its own, and its page faults are its own."""
    machine, _, l3 = _levels(context, paging)
    at, missing = l3.scratch + PAGE, l3.scratch + 2 * PAGE
    l3.tables.unmap(missing)
    results = l3.run(
        [
            fill(at, 0x5A, 256),
            loop(16, [load(at + 248)]),
            load(missing),
            l3.exec_op(bytes.fromhex("4801d8"), user=False, rax=3, rbx=4),
        ]
    )
    context.expect("bytes", machine.memory.read(Gpa(at), 256), b"\x5a" * 256)
    context.expect("what L3 read back", results[2].value, 0x5A5A_5A5A_5A5A_5A5A, hex)
    expect_fault(context, "a missing page", results[3].fault, PF, 0)
    context.expect("3 + 4", results[4].value, 7)


@scenario(needs=[nested_svm], axes={"paging": PAGING}, levels=3)
def test_page_fault_of_l3_exits_to_l2(context: Context, paging: str) -> None:
    """A #PF of L3 that L2 intercepts exits to L2 with code and address; mended, L3 goes on."""
    _, l2, l3 = _levels(context, paging)
    gva = l3.scratch + PAGE
    whole = l3.tables.entry(gva)
    l3.tables.unmap(gva)
    l3.vmcb[f"intercept.excp.{PF}"] = 1
    exit_ = l3.run_to_exit(store(gva, 1))
    _expect_host(context, exit_, l2, ExitCode.SVM_EXIT_EXCP_BASE + PF)
    context.expect("EXITINFO1", exit_.exit_info_1, 2, hex)
    context.expect("EXITINFO2", exit_.exit_info_2, gva, hex)
    l3.tables.set_entry(gva, whole)
    expect_no_fault(context, "the store", l3.finish()[0].fault)


@scenario(needs=[nested_svm], axes={"outer": ("npt", "shadow")}, levels=3)
def test_nested_fault_of_l3_exits_to_l2(context: Context, outer: str) -> None:
    """A nested page fault of L3 in L2's tables exits to L2 with the address; mended, L3 goes on."""
    _, l2, l3 = _levels(context, f"{outer},npt")
    gpa = l3.scratch + PAGE
    assert l3.npt is not None
    whole = l3.npt.entry(gpa)
    l3.npt.unmap(gpa)
    exit_ = l3.run_to_exit(store(gpa, 1))
    _expect_host(context, exit_, l2, ExitCode.SVM_EXIT_NPF)
    context.expect("EXITINFO1, low word", exit_.exit_info_1 & 0xFFFF_FFFF, 6, hex)
    context.expect("EXITINFO2", exit_.exit_info_2, gpa, hex)
    l3.npt.set_entry(gpa, whole)
    expect_no_fault(context, "the store", l3.finish()[0].fault)


@scenario(needs=[nested_svm], axes={"asker": ("l1", "l2")}, levels=3)
def test_exit_of_l3_goes_to_who_asked(context: Context, asker: str) -> None:
    """An instruction of L3 that only L1 intercepts exits to L1, one that L2 intercepts to L2."""
    machine, l2, l3 = _levels(context)
    (l2 if asker == "l1" else l3).vmcb["intercept.cpuid"] = 1
    exit_ = l3.run_to_exit(cpuid(0))
    wanted = machine.l1 if asker == "l1" else l2
    context.expect("host of the exit", exit_.host.name, wanted.name, str)
    expect_exit(context, exit_, ExitCode.SVM_EXIT_CPUID)


@scenario(needs=[nested_svm], axes={"write": (False, True)}, levels=3)
def test_msr_map_of_l2_counts_for_l3(context: Context, write: bool) -> None:
    """An MSR that L2 intercepts exits to L2, another one does not."""
    _, l2, l3 = _levels(context)
    l3.intercept_msr(Msr.MSR_LSTAR, read=not write, write=write)
    expect_no_fault(context, "RDMSR STAR", l3.do(rdmsr(Msr.MSR_STAR)).fault)
    op = instruction("WRMSR" if write else "RDMSR")(rcx=Msr.MSR_LSTAR)
    exit_ = l3.run_to_exit(op)
    _expect_host(context, exit_, l2, ExitCode.SVM_EXIT_MSR)
    context.expect("EXITINFO1", exit_.exit_info_1, int(write))


@scenario(needs=[nested_svm], levels=3)
def test_io_map_of_l2_counts_for_l3(context: Context) -> None:
    """A port that L2 intercepts exits to L2, another one does not."""
    _, l2, l3 = _levels(context)
    l3.intercept_port(IO_PORT)
    expect_no_fault(context, "IN of another port", l3.do(inb(IO_PORT + 1)).fault)
    exit_ = l3.run_to_exit(inb(IO_PORT))
    _expect_host(context, exit_, l2, ExitCode.SVM_EXIT_IOIO)
    context.expect("port", exit_.exit_info_1 >> 16, IO_PORT, hex)


@scenario(needs=[nested_svm], levels=3)
def test_tsc_offsets_of_l1_and_l2_add_up(context: Context) -> None:
    """L3's TSC is L1's plus both offsets."""
    machine, l2, l3 = _levels(context)
    first, second = 1 << 45, 1 << 44
    l2.vmcb["tsc_offset"] = first
    l3.vmcb["tsc_offset"] = second
    before = machine.l1.do(rdtsc()).value
    seen = l3.do(rdtsc()).value
    after = machine.l1.do(rdtsc()).value
    context.expect("within", before <= seen - first - second <= after, True)


@scenario(needs=[nested_svm], levels=3)
def test_shutdown_of_l3_exits_to_l2(context: Context) -> None:
    """A triple fault of L3 that L2 intercepts exits to L2, and L2 and L1 live on."""
    machine, l2, l3 = _levels(context)
    l3.vmcb["intercept.shutdown"] = 1
    _expect_host(context, l3.run_to_exit(triple_fault()), l2, ExitCode.SVM_EXIT_SHUTDOWN)
    context.expect("L2 and L1", (l2.ping(), machine.l1.ping()), (True, True))


# L2's GIF


VECTOR: Final = 0x61
NO_STGI: Final = ENTER_DEFAULT & ~EnterFlag.STGI


def _expect_taken(context: Context, when: str, level: Level, vector: int, count: int) -> None:
    context.expect(f"taken by {level.name} {when}", level.counted(vector), count)


@scenario(needs=[nested_svm], axes={"count": (1, 2)}, levels=3)
def test_gif_of_l2_holds_nmis(context: Context, count: int) -> None:
    """An NMI that comes after L2's CLGI is taken by L2 after its STGI, and not twice."""
    machine, l2, _ = _levels(context)
    l2.run(simple("CLGI"))
    for _ in range(count):
        machine.vcpus[0].vcpu.nmi()
        context.expect("L2 answers", l2.ping(), True)
    _expect_taken(context, "with GIF=0", l2, NMI, 0)
    l2.run([simple("STGI"), simple("NOP1")])
    _expect_taken(context, "after STGI", l2, NMI, 1)
    machine.vcpus[0].vcpu.nmi()
    context.expect("L2 answers", l2.ping(), True)
    _expect_taken(context, "with GIF=1", l2, NMI, 2)


@scenario(needs=[nested_svm], levels=3)
def test_gif_of_l2_holds_interrupts(context: Context) -> None:
    """An interrupt that comes after L2's CLGI is taken by L2 after its STGI."""
    machine = proxy_machine(context, timeout_s=TIMEOUT_S, irqchip=True)
    Apic(machine.l1).enable()
    l2 = machine.l1.launch()
    l2.enable_svm()
    l2.instance.set_eoi(Eoi.XAPIC)
    l2.run([simple("CLGI"), simple("STI_NOP")])
    machine.interrupt(VECTOR)
    context.expect("L2 answers", l2.ping(), True)
    _expect_taken(context, "with GIF=0", l2, VECTOR, 0)
    l2.run([simple("STGI"), simple("NOP1"), simple("CLI")])
    _expect_taken(context, "after STGI", l2, VECTOR, 1)


@scenario(needs=[nested_svm], levels=3)
def test_nmi_that_ends_l3_is_taken_by_l2_after_stgi(context: Context) -> None:
    """An NMI while L3 runs exits to L2 that intercepts it, and L2 takes it after STGI."""
    machine = proxy_machine(context, timeout_s=TIMEOUT_S)
    l2 = machine.l1.launch()
    l3 = l2.launch(vmcb={"intercept.nmi": 1}, enter_flags=NO_STGI)
    context.expect("L3 answers", l3.ping(), True)
    machine.vcpus[0].vcpu.nmi()
    _expect_host(context, l3.run_to_exit(nop()), l2, ExitCode.SVM_EXIT_NMI)
    context.expect("L2 answers", l2.ping(), True)
    _expect_taken(context, "with GIF=0", l2, NMI, 0)
    l2.run([simple("STGI"), simple("NOP1")])
    _expect_taken(context, "after STGI", l2, NMI, 1)
    expect_no_fault(context, "what L3 was at", l3.finish()[0].fault)


@scenario(needs=[nested_svm], axes={"intercepted": (False, True)}, levels=3)
def test_nmi_that_waits_for_gif_of_l2_meets_l3(context: Context, intercepted: bool) -> None:
    """VMRUN of L2 lets an NMI in that GIF=0 held: it exits at once if intercepted, else is L3's."""
    machine = proxy_machine(context, timeout_s=TIMEOUT_S)
    l2 = machine.l1.launch()
    l3 = l2.launch(enter_flags=NO_STGI)
    context.expect("L3 answers", l3.ping(), True)
    l2.run(simple("CLGI"))
    machine.vcpus[0].vcpu.nmi()
    context.expect("L2 answers", l2.ping(), True)
    l3.configure({"intercept.nmi": int(intercepted)})
    if not intercepted:
        context.expect("L3 answers", l3.ping(), True)
        _expect_taken(context, "at its entry", l3, NMI, 1)
        return
    _expect_host(context, l3.enter(), l2, ExitCode.SVM_EXIT_NMI)
    l2.run([simple("STGI"), simple("NOP1")])
    _expect_taken(context, "after STGI", l2, NMI, 1)


# Levels in the middle of a program


def _expect_busy(context: Context, level: Level) -> None:
    try:
        level.ping()
    except ProxyError:
        return
    context.expect(f"{level.name} in the middle of a program takes another one", True, False)


@scenario(needs=[nested_svm], axes={"asker": ("l1", "l2")}, levels=3)
def test_level_with_an_exit_takes_no_program_until_it_is_resumed(
    context: Context, asker: str
) -> None:
    """A level whose exit was not answered, or inside VMRUN for such a one, takes no program."""
    _, l2, l3 = _levels(context)
    (l2 if asker == "l1" else l3).vmcb["intercept.cpuid"] = 1
    exit_ = l3.run_to_exit(cpuid(0))
    _expect_busy(context, l3)
    if asker == "l1":
        _expect_busy(context, l2)
    exit_.skip()
    expect_no_fault(context, "CPUID", l3.finish()[0].fault)
    context.expect("L3 and L2", (l3.ping(), l2.ping()), (True, True))


@scenario(needs=[nested_svm], axes={"level": (2, 3)}, levels=3)
def test_reset_abandons_a_program(context: Context, level: int) -> None:
    """A level that was reset takes programs again, and L3 runs whichever it was."""
    machine, l2, l3 = _levels(context)
    context.expect("L3 answers", l3.ping(), True)
    target = l2 if level == 2 else l3
    hsave = l2.rdmsr(Msr.MSR_VM_HSAVE_PA)
    target.configure({"intercept.cpuid": 1})
    target.run_to_exit(cpuid(0))
    target.reset()
    expect_no_fault(context, "CPUID, not intercepted any more", target.do(cpuid(0)).fault)
    context.expect("VM_HSAVE_PA of L2", l2.rdmsr(Msr.MSR_VM_HSAVE_PA), hsave, hex)
    target.write_cr(2, 0x1234)
    target.reset()
    context.expect("CR2 after a reset without an exit", target.read_cr(2), 0, hex)
    context.expect("all levels", [x.ping() for x in (l3, l2, machine.l1)], [True] * 3)
