"""The proxies themselves: every operation at every level, exits, SMM, interrupts, failures.

Claims are the APM's; what fails here is KVM's or the proxy's, not a scenario's.
"""

from __future__ import annotations

from collections.abc import Callable

from harness.errors import ScenarioFailure
from harness.facts import kvm_device, nested_svm
from harness.proxy.apic import Apic, Delivery
from harness.proxy.cpu import ProxyTimeout
from harness.proxy.failure import GuestStopped, ProxyFailure
from harness.proxy.layout import GDT_TSS, Eoi
from harness.proxy.level import Level
from harness.proxy.machine import DEFAULT_TIMEOUT_S, ProxyMachine
from harness.proxy.ops import Op, instruction
from harness.proxy.paging import Pte
from harness.proxy.program import (
    BP,
    DB,
    DE,
    GP,
    NMI,
    PF,
    UD,
    atomic_add,
    copy,
    cpuid,
    fill,
    inb,
    load,
    loop,
    nop,
    outb,
    rdmsr,
    rdtsc,
    read_cr,
    read_dr,
    simple,
    spin_until,
    store,
    triple_fault,
    vector_name,
    vmrun,
    wait_interrupt,
    write_cr,
    write_dr,
    wrmsr,
)
from harness.proxy.vmexit import VmExit
from harness.scenarios.case import scenario
from harness.scenarios.context import Context
from harness.scenarios.l2 import proxy_machine
from harness.svm.exit_codes import VMEXIT_INVALID, ExitCode
from harness.svm.msrs import Efer, Msr

LEVELS = (1, 2, 3)
NON_CANONICAL = 1 << 47
UNMAPPED = 0x80_0000_0000
NO_MSR = 0x1234_5678
SINGLE_STEP = bytes.fromhex("9c66810c2400019d90")
"""PUSHF; OR WORD [RSP], TF; POPF; NOP."""


def _legal(scratch: int) -> list[Op]:
    return [
        *(read_cr(n) for n in (0, 2, 3, 4, 8)),
        write_cr(2, 0x1234),
        write_cr(8, 0),
        *(read_dr(n) for n in range(8)),
        write_dr(0, scratch),
        write_dr(7, 0x400),
        *(simple(name) for name in ("CLTS", "SMSW", "SLDT", "STR", "PUSHF", "CLI", "STI_NOP_CLI")),
        *(simple(name) for name in ("PAUSE", "WBINVD", "SWAPGS", "SWAPGS", "NOP1", "RDTSC")),
        *(store(scratch, 0x1122_3344_5566_7788, width) for width in (8, 4, 2, 1)),
        *(load(scratch, width) for width in (1, 2, 4, 8)),
        fill(scratch, 0xAB, 64),
        copy(scratch, scratch + 64, 64),
        load(scratch + 120),
        atomic_add(scratch, 1),
        cpuid(0),
        rdmsr(Msr.MSR_EFER),
        wrmsr(Msr.MSR_KERNEL_GS_BASE, 0x1234),
        inb(0x80),
        outb(0x80, 1),
    ]


def _faulting(scratch: int) -> list[tuple[Op, int, int]]:
    """Return operations, with the vector and error code that each raises at CPL 0.

    Not among them: ICEBP and reserved bits of CR0, which emulated silicon does not know.
    """
    return [
        (rdmsr(NO_MSR), GP, 0),
        (wrmsr(Msr.MSR_EFER, 1 << 63), GP, 0),
        (simple("UD2"), UD, 0),
        (simple("RSM"), UD, 0),
        (simple("INT3"), BP, 0),
        (simple("DIV"), DE, 0),
        (load(UNMAPPED), PF, 0),
        (store(UNMAPPED, 1), PF, 2),
        (load(NON_CANONICAL), GP, 0),
        (write_cr(4, 1 << 63), GP, 0),
        (write_cr(8, 0x10), GP, 0),
        (write_dr(7, 1 << 32), GP, 0),
        (instruction("LLDT")(rax=0x08), GP, 0x08),
        (instruction("LTR")(rax=GDT_TSS), GP, GDT_TSS),
        (instruction("MOV_DS")(rax=0xFF8), GP, 0xFF8),
        (instruction("MOVAPS_LOAD")(rbx=scratch + 1), GP, 0),
    ]


PRIVILEGED = (
    *("CLI", "HLT", "CLTS", "WBINVD", "INVD", "RDMSR", "WRMSR", "READ_CR0", "WRITE_CR3"),
    *("READ_DR0", "WRITE_DR7", "LGDT", "LIDT", "LLDT", "LTR", "INVLPG", "SWAPGS", "INB", "OUTB"),
)
SVM_INSTRUCTIONS = ("VMRUN", "VMLOAD", "VMSAVE", "STGI", "CLGI", "INVLPGA")


def _machine(context: Context, **options: bool | int) -> ProxyMachine:
    return proxy_machine(context, timeout_s=DEFAULT_TIMEOUT_S, **options)


def _expect_fault(context: Context, level: Level, op: Op, vector: int, error: int) -> None:
    fault = level.fault_of(op)
    seen = None if fault is None else fault.vector
    context.expect(f"{level.name}: {op} raises", seen, vector, _vector)
    context.expect(f"{level.name}: error code of {op}", fault and fault.error_code, error)


def _vector(vector: int | None) -> str:
    return "nothing" if vector is None else vector_name(vector)


def _expect_exit(context: Context, exit_: VmExit, host: Level, code: int) -> None:
    context.expect("exit code", exit_.exit_code, code, hex)
    context.expect("the host that got the exit", exit_.host.name, host.name)


# Operations


@scenario(needs=[nested_svm], axes={"level": LEVELS, "npt": (True, False)}, levels=3)
def test_every_legal_operation_succeeds(context: Context, level: int, npt: bool) -> None:
    """Instructions that are legal at CPL 0 run at L1, L2 and L3 without an exception or exit."""
    target = _machine(context).level(level, npt=npt)
    results = target.run(_legal(target.scratch))
    for result in results:
        context.expect(f"{result.op}", result.vector, None, _vector)
    values = {result.op.name: result.value for result in results if result.op.value}
    context.expect("LOAD8 after FILL and COPY", values["LOAD8"], 0xABAB_ABAB_ABAB_ABAB, hex)
    context.expect("LOAD1", values["LOAD1"], 0x88, hex)


@scenario(needs=[nested_svm], axes={"level": LEVELS, "npt": (True, False)}, levels=3)
def test_every_exception_is_reported(context: Context, level: int, npt: bool) -> None:
    """Each illegal operation raises its exception at the level that executes it."""
    target = _machine(context).level(level, npt=npt)
    target.ping()
    for op, vector, error in _faulting(target.scratch):
        _expect_fault(context, target, op, vector, error)
    _expect_fault(context, target, target.exec_op(SINGLE_STEP), DB, 0)
    fault = target.fault_of(load(UNMAPPED))
    context.expect("CR2", fault and fault.cr2, UNMAPPED)


@scenario(needs=[nested_svm], axes={"level": LEVELS}, levels=3)
def test_privileged_instructions_raise_gp_at_cpl_3(context: Context, level: int) -> None:
    """Privileged instructions raise #GP(0) at CPL 3, at every level."""
    target = _machine(context).level(level)
    for name in PRIVILEGED:
        _expect_fault(context, target, simple(name).user, GP, 0)
    context.expect("a load at CPL 3", target.do(load(target.scratch).user).vector, None)


@scenario(needs=[nested_svm], axes={"level": LEVELS}, levels=3)
def test_svm_instructions_at_cpl_0_and_3(context: Context, level: int) -> None:
    """With EFER.SVME set, SVM instructions raise #GP at CPL 3; at CPL 0 STGI and CLGI succeed."""
    target = _machine(context).level(level)
    target.enable_svm()
    results = target.run([simple("CLGI"), simple("STGI")])
    context.expect("CLGI, STGI", [result.vector for result in results], [None, None])
    for name in SVM_INSTRUCTIONS:
        _expect_fault(context, target, simple(name).user, GP, 0)
    _expect_fault(context, target, vmrun(1 << 51), GP, 0)
    # STGI and CLGI are left out: with a virtual GIF, KVM does not see them.
    target.wrmsr(Msr.MSR_EFER, Efer(target.rdmsr(Msr.MSR_EFER)).replace(SVME=0))
    for name in ("VMRUN", "VMLOAD", "VMSAVE"):
        _expect_fault(context, target, simple(name), UD, 0)


@scenario(needs=[kvm_device])
def test_a_loop_costs_one_crossing(context: Context) -> None:
    """A program with loops runs inside the guest and comes back once."""
    l1 = _machine(context).l1
    results = l1.run([loop(10, [loop(20, [atomic_add(l1.scratch, 1)])]), load(l1.scratch)])
    context.expect("iterations of the outer loop", results[0].value, 10)
    context.expect("the counter", results[-1].value, 200)


@scenario(needs=[nested_svm], axes={"depth": (4, 5)}, levels=5)
def test_levels_beyond_l3_run(context: Context, depth: int) -> None:
    """L4 and L5 run, and see what they should of EFER and of exceptions."""
    target = _machine(context).level(depth)
    context.expect("EFER.SVME", Efer(target.rdmsr(Msr.MSR_EFER)).SVME, 1)
    _expect_fault(context, target, simple("UD2"), UD, 0)


# Exits of L2


@scenario(needs=[nested_svm], axes={"npt": (True, False)}, levels=2, quick=True)
def test_intercepted_cpuid_reaches_l1(context: Context, npt: bool) -> None:
    """L1 answers an intercepted CPUID of L2, and L2 sees L1's answer."""
    l2 = _machine(context).l1.launch(vmcb={"intercept.cpuid": 1}, npt=npt)
    exit_ = l2.run_to_exit(cpuid(0x8000_0000, 7))
    _expect_exit(context, exit_, l2.host, ExitCode.SVM_EXIT_CPUID)
    context.expect("L2's RAX", exit_.vmcb["rax"], 0x8000_0000, hex)
    context.expect("L2's RCX", exit_.gprs.rcx, 7)
    exit_.vmcb["rax"] = 0x1111
    l2.set_gprs(rbx=0x2222)
    exit_.skip()
    regs = l2.finish()[0].regs
    context.expect("RAX", regs["rax"], 0x1111, hex)
    context.expect("RBX", regs["rbx"], 0x2222, hex)


@scenario(needs=[nested_svm], axes={"write": (False, True)}, levels=2)
def test_msr_permission_map_decides(context: Context, write: bool) -> None:
    """An MSR exits for reading and writing as its two bits in the permission map say."""
    l2 = _machine(context).l1.launch()
    l2.intercept_msr(Msr.MSR_KERNEL_GS_BASE, read=not write, write=write)
    hit = wrmsr(Msr.MSR_KERNEL_GS_BASE, 1) if write else rdmsr(Msr.MSR_KERNEL_GS_BASE)
    miss = rdmsr(Msr.MSR_KERNEL_GS_BASE) if write else wrmsr(Msr.MSR_KERNEL_GS_BASE, 1)
    context.expect("not intercepted", l2.do(miss).vector, None)
    exit_ = l2.run_to_exit(hit)
    _expect_exit(context, exit_, l2.host, ExitCode.SVM_EXIT_MSR)
    context.expect("exit_info_1", exit_.exit_info_1, int(write))


@scenario(needs=[nested_svm], levels=2)
def test_io_permission_map_decides(context: Context) -> None:
    """A port access exits if one of its bytes has its bit in the permission map set."""
    l2 = _machine(context).l1.launch(iopm=[0x83])
    context.expect("OUT to 0x80", l2.do(outb(0x80, 1, 2)).vector, None)
    exit_ = l2.run_to_exit(outb(0x80, 1, 4))
    _expect_exit(context, exit_, l2.host, ExitCode.SVM_EXIT_IOIO)
    context.expect("port", exit_.exit_info_1 >> 16, 0x80, hex)
    exit_.skip()
    context.expect("L2 goes on", l2.finish()[0].vector, None)


@scenario(needs=[nested_svm], levels=2)
def test_unmapped_nested_page_faults_to_l1(context: Context) -> None:
    """A page that L1's nested tables do not map is SVM_EXIT_NPF with its address, until mapped."""
    machine = _machine(context)
    l2 = machine.l1.launch(npt=True)
    page = machine.pages.take()
    l2.nested_tables.unmap(page)
    exit_ = l2.run_to_exit(store(page + 8, 5))
    _expect_exit(context, exit_, l2.host, ExitCode.SVM_EXIT_NPF)
    context.expect("exit_info_2", exit_.exit_info_2 & -0x1000, page, hex)
    context.expect("write, user", exit_.exit_info_1 & 0x7, 0x6, hex)
    l2.nested_tables.map(page, page)
    context.expect("the store goes on", l2.finish()[0].vector, None)
    context.expect("memory", machine.memory.read_int(page, 8), 0)
    context.expect("memory at the store", l2.read(page + 8), 5)


@scenario(needs=[nested_svm], levels=2)
def test_read_only_nested_page(context: Context) -> None:
    """A page that L1's nested tables make read-only can be read, and a write is SVM_EXIT_NPF."""
    machine = _machine(context)
    l2 = machine.l1.launch(npt=True)
    page = machine.pages.take()
    l2.nested_tables.protect(page, clear=Pte.W)
    context.expect("a load", l2.read(page), 0)
    exit_ = l2.run_to_exit(store(page, 5))
    _expect_exit(context, exit_, l2.host, ExitCode.SVM_EXIT_NPF)
    context.expect("present, write, user", exit_.exit_info_1 & 0x7, 0x7, hex)


@scenario(needs=[nested_svm], axes={"field": ("asid", "intercept.vmrun")}, levels=2)
def test_vmrun_refuses_an_inconsistent_vmcb(context: Context, field: str) -> None:
    """VMRUN with ASID 0, or without the VMRUN intercept, ends at once with VMEXIT_INVALID."""
    l2 = _machine(context).l1.launch(vmcb={field: 0})
    exit_ = l2.enter()
    context.expect("exit code", exit_.exit_code & 0xFFFF_FFFF, VMEXIT_INVALID & 0xFFFF_FFFF, hex)
    l2.reset()
    context.expect("L2 with a good VMCB", l2.ping(), True)


@scenario(needs=[nested_svm], levels=2)
def test_intercepted_exception_reaches_l1(context: Context) -> None:
    """An exception of L2 that L1 intercepts is an exit; one that L1 does not is L2's own."""
    l2 = _machine(context).l1.launch(vmcb={f"intercept.excp.{UD}": 1})
    _expect_fault(context, l2, rdmsr(NO_MSR), GP, 0)
    exit_ = l2.run_to_exit(simple("UD2"))
    _expect_exit(context, exit_, l2.host, ExitCode.SVM_EXIT_EXCP_BASE + UD)
    exit_.skip(2)
    context.expect("after skipping UD2", l2.finish()[0].vector, None)


# L3


@scenario(
    needs=[nested_svm], axes={"npt2": (True, False), "npt3": (True, False)}, levels=3, quick=True
)
def test_l3_exits_reach_the_level_that_asked(context: Context, npt2: bool, npt3: bool) -> None:
    """L2 gets the exits of L3 that it intercepts; L1 gets those that only it intercepts."""
    l2 = _machine(context).l1.launch(npt=npt2)
    l3 = l2.launch(npt=npt3, vmcb={"intercept.cpuid": 1})
    exit_ = l3.run_to_exit(cpuid(0))
    _expect_exit(context, exit_, l2, ExitCode.SVM_EXIT_CPUID)
    exit_.vmcb["rax"] = 0x77
    exit_.skip()
    context.expect("L3's RAX", l3.finish()[0].regs["rax"], 0x77)
    l2.configure({"intercept.rdtsc": 1})
    exit_ = l3.run_to_exit(rdtsc())
    _expect_exit(context, exit_, l2.host, ExitCode.SVM_EXIT_RDTSC)
    exit_.vmcb["rax"] = 0x55
    exit_.skip()
    context.expect("L3's TSC", l3.finish()[0].values[0], 0x55)
    context.expect("all levels live", [l3.ping(), l2.ping(), l2.host.ping()], [True] * 3)


@scenario(needs=[nested_svm], levels=3)
def test_l2_cannot_tell_that_its_svm_is_emulated(context: Context) -> None:
    """EFER.SVME, VM_HSAVE_PA and VM_CR of L2 read back as written and are not L1's."""
    machine = _machine(context)
    l1 = machine.l1
    l2 = l1.launch()
    l2.launch()
    hsave = l1.rdmsr(Msr.MSR_VM_HSAVE_PA)
    context.expect("VM_HSAVE_PA is L2's own", l2.rdmsr(Msr.MSR_VM_HSAVE_PA) != hsave, True)
    page = machine.pages.take()
    l2.wrmsr(Msr.MSR_VM_HSAVE_PA, page)
    context.expect("VM_HSAVE_PA of L2", l2.rdmsr(Msr.MSR_VM_HSAVE_PA), page, hex)
    context.expect("VM_HSAVE_PA of L1", l1.rdmsr(Msr.MSR_VM_HSAVE_PA), hsave, hex)
    _expect_fault(context, l2, wrmsr(Msr.MSR_VM_HSAVE_PA, 1), GP, 0)
    efer = Efer(l2.rdmsr(Msr.MSR_EFER))
    l2.wrmsr(Msr.MSR_EFER, efer.replace(SVME=0))
    context.expect("EFER.SVME cleared", Efer(l2.rdmsr(Msr.MSR_EFER)).SVME, 0)
    _expect_fault(context, l2, simple("VMLOAD"), UD, 0)
    l2.wrmsr(Msr.MSR_EFER, efer)
    _expect_fault(context, l2, vmrun(1), GP, 0)


@scenario(needs=[nested_svm], axes={"npt2": (True, False)}, levels=3)
def test_l3_nested_page_fault_goes_to_the_tables_owner(context: Context, npt2: bool) -> None:
    """A page missing from L2's nested tables faults to L2, one missing from L1's to L1."""
    machine = _machine(context)
    l2 = machine.l1.launch(npt=npt2)
    l3 = l2.launch(npt=True)
    l3.ping()
    ours, theirs = machine.pages.take(), machine.pages.take()
    l2.make_current()
    l3.nested_tables.unmap(theirs)
    exit_ = l3.run_to_exit(load(theirs))
    _expect_exit(context, exit_, l2, ExitCode.SVM_EXIT_NPF)
    context.expect("exit_info_2", exit_.exit_info_2, theirs, hex)
    l3.nested_tables.map(theirs, theirs)
    context.expect("the load goes on", l3.finish()[0].value, 0)
    if l2.npt is not None:
        l2.make_current()
        l2.host.make_current()
        l2.nested_tables.unmap(ours)
        exit_ = l3.run_to_exit(load(ours))
        _expect_exit(context, exit_, l2.host, ExitCode.SVM_EXIT_NPF)


@scenario(needs=[nested_svm], levels=3)
def test_refused_vmrun_of_l2_is_seen_by_l2(context: Context) -> None:
    """VMRUN of L2 with an inconsistent VMCB gives L2, not L1, VMEXIT_INVALID."""
    l2 = _machine(context).l1.launch()
    l3 = l2.launch()
    for values in ({"asid": 0}, {"intercept.vmrun": 0}, {"cr0": 1 << 32}, {"efer": 0x500}):
        l3.reset()
        l3.vmcb.update(values)
        exit_ = l3.enter()
        context.expect(f"{values}: host", exit_.host.name, "L2")
        context.expect(f"{values}: exit code", exit_.exit_code & 0xFFFF_FFFF, 0xFFFF_FFFF, hex)
    l3.reset()
    context.expect("L3 with a good VMCB", l3.ping(), True)


# SMM


@scenario(needs=[nested_svm], axes={"level": LEVELS, "npt": (True, False)}, levels=3)
def test_smi_and_rsm_come_back_to_the_level(context: Context, level: int, npt: bool) -> None:
    """An SMI interrupts any level, its save area says whether a guest; RSM goes on there."""
    machine = _machine(context, smm=True)
    target = machine.level(level, npt=npt)
    target.ping()
    smm = machine.inject_smi()
    context.expect("revision of the save area", smm.is_64_bit, True)
    context.expect("SVM guest flag", smm.save_area.svm_guest_flag, int(level > 1))
    context.expect("EFER in SMM", Efer(smm.rdmsr(Msr.MSR_EFER)).SVME, 0)
    _expect_fault(context, smm, simple("VMRUN"), UD, 0)
    smm.write(smm.scratch, 0x1234)
    context.expect("SMRAM is not memory", machine.memory.read_int(smm.instance.gpa, 8), 0)
    context.expect("RSM goes on at", smm.rsm().name, target.name)
    context.expect("it lives", target.ping(), True)
    context.expect("L1 lives", machine.l1.ping(), True)


@scenario(needs=[nested_svm], levels=2)
def test_smi_handler_changes_a_register_through_the_save_area(context: Context) -> None:
    """What the handler writes into the save area is what RSM loads."""
    machine = _machine(context, smm=True)
    l1 = machine.l1
    l1.write_cr(2, 0)
    smm = machine.inject_smi()
    state = smm.save_area
    state.dr6 |= 1
    smm.write_save_area(state)
    smm.rsm()
    context.expect("DR6[0]", l1.do(read_dr(6)).value & 1, 1)


@scenario(needs=[nested_svm], axes={"level": LEVELS}, levels=3)
def test_smi_by_port_during_a_program(context: Context, level: int) -> None:
    """An SMI that a program raises through port B2h is handled, and the program goes on."""
    machine = _machine(context, smm=True)
    seen: list[str] = []
    machine.smm.handler = lambda smm: seen.append(smm.name)
    results = machine.level(level).run([outb(0xB2, 1), cpuid(0), outb(0xB2, 2), nop()])
    context.expect("operations that succeeded", [r.ok for r in results], [True] * 4)
    context.expect("SMIs handled", len(seen), 2)


# Interrupts and several vCPUs


@scenario(needs=[nested_svm], axes={"x2apic": (False, True)}, levels=2)
def test_interrupts_reach_l1_and_l2(context: Context, x2apic: bool) -> None:
    """An interrupt is L2's own unless L1 intercepts INTR; then it is an exit and L1's."""
    machine = _machine(context, irqchip=True)
    l1 = machine.l1
    Apic(l1, x2apic=x2apic).enable()
    machine.interrupt(0x40)
    context.expect("counted before STI", l1.counted(0x40), 0)
    l1.run(simple("STI_NOP_CLI"))
    context.expect("counted in L1", l1.counted(0x40), 1)
    l2 = l1.launch()
    l2.instance.set_eoi(Eoi.X2APIC if x2apic else Eoi.XAPIC)
    l2.ping()
    machine.interrupt(0x41)
    l2.run(simple("STI_NOP_CLI"))
    context.expect("counted in L2", l2.counted(0x41), 1)
    l2.configure({"intercept.intr": 1})
    l2.run(simple("STI"))
    machine.interrupt(0x42)
    exit_ = l2.run_to_exit(simple("CLI"))
    _expect_exit(context, exit_, l1, ExitCode.SVM_EXIT_INTR)
    l1.run(simple("STI_NOP_CLI"))
    context.expect("counted in L1", l1.counted(0x42), 1)
    context.expect("L2 goes on", l2.finish()[0].vector, None)


@scenario(needs=[nested_svm], levels=2)
def test_pending_interrupt_waits_for_if_of_l2(context: Context) -> None:
    """L2 runs on with IF=0 while an interrupt that L1 intercepts is pending; STI makes it exit."""
    machine = _machine(context, irqchip=True)
    Apic(machine.l1).enable()
    l2 = machine.l1.launch(vmcb={"intercept.intr": 1})
    l2.ping()
    machine.interrupt(0x42)
    context.expect("L2 with IF=0", l2.do(nop(), timeout_s=5.0).ok, True)
    exit_ = l2.run_to_exit(simple("STI_NOP_CLI"))
    _expect_exit(context, exit_, machine.l1, ExitCode.SVM_EXIT_INTR)


@scenario(needs=[nested_svm], levels=3)
def test_l3_is_interrupted(context: Context) -> None:
    """An interrupt while L3 runs is an exit to L2 if L2 intercepts INTR, else L3's own."""
    machine = _machine(context, irqchip=True)
    l1 = machine.l1
    Apic(l1).enable()
    l2 = l1.launch()
    l3 = l2.launch()
    for level in (l2, l3):
        level.instance.set_eoi(Eoi.XAPIC)
    l3.ping()
    machine.interrupt(0x40)
    l3.run(simple("STI_NOP_CLI"))
    context.expect("counted in L3", l3.counted(0x40), 1)
    l3.configure({"intercept.intr": 1})
    l3.run(simple("STI"))
    machine.interrupt(0x41)
    exit_ = l3.run_to_exit(simple("CLI"))
    _expect_exit(context, exit_, l2, ExitCode.SVM_EXIT_INTR)
    l2.run(simple("STI_NOP_CLI"))
    context.expect("counted in L2", l2.counted(0x41), 1)


@scenario(needs=[nested_svm])
def test_ipis_and_nmis_between_vcpus(context: Context) -> None:
    """An IPI wakes a halted vCPU, and an NMI gets through with interrupts off."""
    machine = _machine(context, irqchip=True, vcpus=2)
    first, second = (cpu.l1 for cpu in machine.cpus)
    apic = Apic(first)
    apic.enable()
    Apic(second).enable()
    waiting = machine.in_thread(second, lambda level: level.run(wait_interrupt(0x50, hlt=True)))
    first.run(apic.ipi(1, 0x50))
    context.expect("the wait", waiting.join(machine.timeout_s)[0].ok, True)
    first.run(apic.ipi(1, 0, Delivery.NMI))
    second.ping()
    context.expect("NMIs counted", second.counted(NMI), 1)


@scenario(needs=[nested_svm], levels=2)
def test_one_vcpu_writes_while_another_loops_vmrun(context: Context) -> None:
    """A vCPU that writes memory all the time does not disturb VMRUN in a loop on another one."""
    machine = _machine(context, vcpus=2)
    first, second = (cpu.l1 for cpu in machine.cpus)
    l2 = first.launch()
    l2.vmcb["rip"] = first.instance.put_code(bytes.fromhex("0f01d9"))  # VMMCALL
    stop = first.scratch
    writer = machine.in_thread(
        second,
        lambda level: level.run(
            loop(1 << 40, [atomic_add(stop + 8, 1)], until_gva=stop, until_value=1)
        ),
    )
    runs = first.run([spin_until(stop + 16, 0), loop(100, [l2.entry_op()]), store(stop, 1)])
    context.expect("VMRUNs", runs[1].values[:2], (100, 0))
    context.expect("exit code", runs[2].values[0], ExitCode.SVM_EXIT_VMMCALL, hex)
    context.expect("writes", writer.join(machine.timeout_s)[0].value > 0, True)


# What goes wrong is a FAIL that says where


def _run_for_ever(level: Level) -> list[Op]:
    return [level.exec_op(bytes.fromhex("ebfe"))]


def _scribble(level: Level) -> list[Op]:
    return [fill(level.instance.gpa, 0, 64)]


def _end(level: Level) -> list[Op]:
    return [triple_fault()]


_MISDEEDS: dict[str, tuple[Callable[[Level], list[Op]], type[ScenarioFailure]]] = {
    "loop": (_run_for_ever, ProxyTimeout),
    "scribble": (_scribble, ProxyFailure),
    "triple_fault": (_end, GuestStopped),
}


@scenario(
    needs=[nested_svm], axes={"misdeed": tuple(_MISDEEDS), "level": LEVELS}, levels=3, timeout_s=60
)
def test_a_misbehaving_guest_is_a_failure_that_says_where(
    context: Context, misdeed: str, level: int
) -> None:
    """A guest that hangs, dies or scribbles over its mailbox is a failure with level and place."""
    target = _machine(context).level(level)
    target.ping()
    program, kind = _MISDEEDS[misdeed]
    try:
        seen = target.run(program(target), timeout_s=5.0)
    except kind as e:
        text = str(e)
    else:
        raise ScenarioFailure(f"{misdeed} at {target.name} went unnoticed: {seen}")
    context.note(text)
    context.expect("the level is named", target.name in text, True)
