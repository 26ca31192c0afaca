"""Migration of L1 and of nested workloads: a machine that was moved ends as its twin that was not.

The claim is the sentence of the cover letter turned round: migration with a nested guest running
works. Kernel: svm_get_nested_state(), svm_set_nested_state(); what differs is in `known_issues`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from harness.facts import nested_svm
from harness.proxy.apic import Apic
from harness.proxy.machine import ProxyMachine
from harness.proxy.ops import instruction
from harness.proxy.paging import PAGE
from harness.proxy.program import (
    GP,
    NMI,
    atomic_add,
    cpuid,
    inb,
    load,
    loop,
    nop,
    rdmsr,
    read_cr,
    read_dr,
    simple,
    store,
    vmmcall,
    write_dr,
    wrmsr,
)
from harness.scenarios.case import scenario
from harness.scenarios.context import Context
from harness.scenarios.twins import Log, Trip, expect_twins, expect_twins_of_each_cut
from harness.svm.msrs import Cr4, Efer, Msr, VmCr

# L1


def _without_svm(machine: ProxyMachine, log: Log) -> Trip:
    l1 = machine.l1
    log("store", l1.run([store(l1.scratch, 7), rdmsr(Msr.MSR_EFER)]))
    yield
    log("load", l1.run([load(l1.scratch), rdmsr(Msr.MSR_EFER)]))


def _with_svme(machine: ProxyMachine, log: Log) -> Trip:
    machine.l1.enable_svm()
    yield
    log("MSRs", machine.l1.run([rdmsr(Msr.MSR_EFER), rdmsr(Msr.MSR_VM_HSAVE_PA)]))
    log("L2", machine.l1.launch().run(cpuid(0)))


def _with_svme_cleared_again(machine: ProxyMachine, log: Log) -> Trip:
    l1 = machine.l1
    log("L2", l1.launch().run(cpuid(0)))
    efer = Efer(l1.rdmsr(Msr.MSR_EFER))
    l1.wrmsr(Msr.MSR_EFER, efer.replace(SVME=0))
    yield
    l1.wrmsr(Msr.MSR_EFER, efer)
    log("L2 again", l1.guests[0].run(cpuid(0)))


def _with_gif_0(machine: ProxyMachine, log: Log) -> Trip:
    l1 = machine.l1
    l1.enable_svm()
    log("CLGI", l1.run(simple("CLGI")))
    yield
    machine.vcpus[0].vcpu.nmi()
    log("with GIF=0", [l1.ping(), l1.counted(NMI)])
    yield
    log("STGI", l1.run([simple("STGI"), simple("NOP1"), simple("NOP1")]))
    log("after STGI", l1.counted(NMI))


def _in_the_middle_of_a_program(machine: ProxyMachine, log: Log) -> Trip:
    l1 = machine.l1
    port = 0x99
    results = [nop(), store(l1.scratch, 1), instruction("OUTB")(rdx=port, rax=5)]
    l1.ping()
    l1.instance.send([*results, load(l1.scratch)])
    log("port", machine.vcpus[0].run(machine.timeout_s))
    yield
    log("the rest", l1.go_on())


_MTRRS: Final = {
    0x200: 0x4000_0006,
    0x201: 0xFF_C000_0800,
    0x250: 0x0606_0606_0606_0606,
    0x2FF: 0xC06,
}
"""MTRRphysBase0 and Mask0, MTRRfix64K, MTRRdefType (APM vol. 2, 7.7 Memory-Type Range)."""


def _with_mtrrs(machine: ProxyMachine, log: Log) -> Trip:
    log("WRMSR", machine.l1.run([wrmsr(index, value) for index, value in _MTRRS.items()]))
    yield
    log("RDMSR", machine.l1.run([rdmsr(index) for index in _MTRRS]))


_SYSCALL_MSRS: Final = (
    Msr.MSR_STAR, Msr.MSR_LSTAR, Msr.MSR_CSTAR, Msr.MSR_SYSCALL_MASK, Msr.MSR_KERNEL_GS_BASE,
    Msr.MSR_IA32_SYSENTER_CS, Msr.MSR_IA32_SYSENTER_ESP, Msr.MSR_IA32_SYSENTER_EIP,
    Msr.MSR_FS_BASE, Msr.MSR_TSC_AUX,
)  # fmt: skip


def _with_msrs(machine: ProxyMachine, log: Log) -> Trip:
    l1 = machine.l1
    hsave = machine.pages.take()
    writes = [wrmsr(index, 0x12_3450 + index % 16) for index in _SYSCALL_MSRS]
    writes += [wrmsr(Msr.MSR_IA32_CR_PAT, 0x0007_0406_0007_0405)]
    log("WRMSR", l1.run([*writes, wrmsr(Msr.MSR_VM_HSAVE_PA, hsave)]))
    yield
    reads = (*_SYSCALL_MSRS, Msr.MSR_IA32_CR_PAT, Msr.MSR_VM_HSAVE_PA)
    log("RDMSR", l1.run([rdmsr(index) for index in reads]))


def _with_vm_cr(machine: ProxyMachine, log: Log) -> Trip:
    l1 = machine.l1
    log("VM_CR", l1.run(wrmsr(Msr.MSR_VM_CR, VmCr.of(LOCK=1, SVMDIS=1))))
    yield
    svme = Efer(l1.rdmsr(Msr.MSR_EFER)).replace(SVME=1)
    log("VM_CR now", l1.run([rdmsr(Msr.MSR_VM_CR), wrmsr(Msr.MSR_EFER, svme)]))


def _with_debug_registers(machine: ProxyMachine, log: Log) -> Trip:
    l1 = machine.l1
    writes = [write_dr(number, l1.scratch + 8 * number) for number in range(4)]
    log("DR0 to DR7", l1.run([*writes, write_dr(6, 0xFFFF_0FF3), write_dr(7, 0x402)]))
    yield
    log("DR0 to DR7 now", l1.run([read_dr(number) for number in (0, 1, 2, 3, 6, 7)]))


# movd %eax, %xmm15; pshufd $0, %xmm15, %xmm15; fldpi
_SET_FPU = bytes.fromhex("66440f6ef8 66450f70ff00 d9eb")
# movd %xmm15, %eax; fstpl (%rbx); mov (%rbx), %rcx
_GET_FPU = bytes.fromhex("66440f7ef8 dd1b 488b0b")
_YMM = Cr4.of(OSXSAVE=1)


def _with_fpu(machine: ProxyMachine, log: Log) -> Trip:
    l1 = machine.l1
    l1.write_cr(4, l1.read_cr(4) | _YMM)
    log("XCR0", l1.run(instruction("XSETBV")(rax=7)))
    log("x87 and SSE", l1.run(l1.exec_op(_SET_FPU, rax=0x1234_5678)))
    # vinsertf128 $1, %xmm15, %ymm15, %ymm15
    log("AVX", l1.run(l1.exec_op(bytes.fromhex("c4430518ff01"))))
    yield
    log("XCR0 now", l1.run(instruction("XGETBV")()))
    log("x87 and SSE now", l1.run(l1.exec_op(_GET_FPU, rbx=l1.scratch)))
    # vextractf128 $1, %ymm15, %xmm0; movd %xmm0, %eax
    log("AVX now", l1.run(l1.exec_op(bytes.fromhex("c4637d19f801 660f7ec0"))))


_L1: Final[dict[str, Callable[[ProxyMachine, Log], Trip]]] = {
    "svme_0": _without_svm,
    "svme_1": _with_svme,
    "svme_1_0": _with_svme_cleared_again,
    "gif_0": _with_gif_0,
    "in_program": _in_the_middle_of_a_program,
    "mtrrs": _with_mtrrs,
    "msrs": _with_msrs,
    "vm_cr": _with_vm_cr,
    "debug_registers": _with_debug_registers,
    "fpu": _with_fpu,
}


@scenario(needs=[nested_svm], axes={"state": tuple(_L1)})
def test_migrate_l1(context: Context, state: str) -> None:
    """L1 without an L2 is migrated with its registers, EFER.SVME and GIF as they are."""
    expect_twins(context, _L1[state])


# Workloads that are moved at their exits


def _exits(machine: ProxyMachine, log: Log, level: int, npt: bool) -> Trip:
    guest = machine.level(level, npt=npt)
    guest.vmcb["intercept.cpuid"] = 1  # type: ignore[attr-defined]
    log("before", guest.run(loop(10, [atomic_add(guest.scratch, 3)])))
    yield
    exit_ = guest.run_to_exit([cpuid(0), load(guest.scratch)])
    log("exit", exit_)
    exit_.skip()
    yield
    log("after", guest.finish())  # type: ignore[attr-defined]
    log("L1", machine.l1.run(load(guest.scratch)))
    log("again", guest.run([atomic_add(guest.scratch, 5), simple("NOP1")]))


@scenario(needs=[nested_svm], axes={"npt": (True, False), "level": (2, 3)}, levels=3)
def test_migrate_everywhere(context: Context, npt: bool, level: int) -> None:
    """A nested workload that is moved at every one of its exits ends as its twin."""
    moves = expect_twins(
        context, lambda machine, log: _exits(machine, log, level, npt), everywhere=True
    )
    context.note("moves", count=moves)


def _faults(machine: ProxyMachine, log: Log) -> Trip:
    l2 = machine.l1.launch(vmcb={f"intercept.excp.{GP}": 1})
    missing = l2.scratch + PAGE
    l2.tables.unmap(missing)
    log("own #PF", l2.run([load(missing), read_cr(2)]))
    yield
    # Not #UD, which would have KVM emulate, see `migrate_emulates`.
    exit_ = l2.run_to_exit([instruction("MOV_DS")(rax=0xF8), store(l2.scratch, 1)])
    log("#GP", exit_)
    exit_.skip(2)
    log("and on", l2.finish())


def _nested_page_faults(machine: ProxyMachine, log: Log) -> Trip:
    l2 = machine.l1.launch(npt=True)
    page = l2.scratch + PAGE
    log("before", l2.run(store(page, 5)))
    machine.l1.ping()
    l2.nested_tables.unmap(page)
    l2.vmcb["tlb_ctl"] = 1
    exit_ = l2.run_to_exit([load(page), store(page, 6)])
    log("#NPF", exit_)
    yield
    l2.nested_tables.map(page, page)
    log("and on", l2.finish())


def _permission_maps(machine: ProxyMachine, log: Log) -> Trip:
    l2 = machine.l1.launch(msrpm=[Msr.MSR_STAR], iopm=[0x80])
    exit_ = l2.run_to_exit([rdmsr(Msr.MSR_STAR), rdmsr(Msr.MSR_LSTAR), inb(0x80)])
    log("MSR", exit_)
    exit_.skip()
    exit_ = l2.resume_to_exit()
    log("port", exit_)
    exit_.skip()
    yield
    log("and on", l2.finish())


def _interrupts(machine: ProxyMachine, log: Log) -> Trip:
    l1 = machine.l1
    Apic(l1).enable()
    l2 = l1.launch(vmcb={"intercept.intr": 1})
    l2.run(simple("STI"))
    machine.interrupt(0x42)
    exit_ = l2.run_to_exit(simple("CLI"))
    log("INTR", exit_)
    log("L1", l1.run(simple("STI_NOP_CLI")))
    log("counted", l1.counted(0x42))
    yield
    log("and on", l2.finish())


def _hypercalls_of_l3(machine: ProxyMachine, log: Log) -> Trip:
    l3 = machine.level(3)
    exit_ = l3.run_to_exit([vmmcall(7), store(l3.scratch, 1)])
    log("VMMCALL", exit_)
    exit_.skip()
    yield
    log("and on", l3.finish())  # type: ignore[attr-defined]


_WORKLOADS: Final[dict[str, Callable[[ProxyMachine, Log], Trip]]] = {
    "faults": _faults,
    "nested_page_faults": _nested_page_faults,
    "permission_maps": _permission_maps,
    "interrupts": _interrupts,
    "l3": _hypercalls_of_l3,
}


@scenario(needs=[nested_svm], axes={"workload": tuple(_WORKLOADS)}, levels=3)
def test_migrate_workload_everywhere(context: Context, workload: str) -> None:
    """A workload with faults, interrupts, #NPF, MSR and port exits is moved at all of them."""
    moves = expect_twins(
        context, _WORKLOADS[workload], everywhere=True, irqchip=workload == "interrupts"
    )
    context.note("moves", count=moves)


@scenario(needs=[nested_svm], axes={"workload": tuple(_WORKLOADS)}, levels=3)
def test_migrate_workload_at_each_cut(context: Context, workload: str) -> None:
    """A workload that is moved once, wherever that is, ends as its twin."""
    cuts = expect_twins_of_each_cut(context, _WORKLOADS[workload], irqchip=workload == "interrupts")
    context.note("cuts", count=cuts)
