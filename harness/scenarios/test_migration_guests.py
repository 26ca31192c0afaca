"""Migration of L2 and L3 in every mode and paging, of what VMRUN cached, and while vCPUs run.

APM vol. 2, 15.5 VMRUN Instruction, 15.10 MSR Intercepts, 15.11 IOIO Intercepts, 15.15 VMCB State
Caching, 15.25 Nested Paging. Kernel: nested_svm_vmrun_msrpm(), nested_svm_load_cr3().
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Final

from harness.facts import nested_svm, smm
from harness.machine.addresses import Gpa
from harness.proxy.apic import APIC_BASE, Apic
from harness.proxy.guest_level import GuestLevel
from harness.proxy.level import Level
from harness.proxy.machine import ProxyMachine
from harness.proxy.ops import Op, instruction
from harness.proxy.paging import LARGE_PAGE, PAGE, Pte
from harness.proxy.program import (
    PF,
    atomic_add,
    cpuid,
    fill,
    inb,
    load,
    loop,
    nop,
    outb,
    rdmsr,
    simple,
    store,
    vmmcall,
    wait_interrupt,
    wrmsr,
)
from harness.scenarios.case import scenario
from harness.scenarios.context import Context
from harness.scenarios.migration_stops import STOP_PORT, outcome, run_to_port, wait_halted
from harness.scenarios.modes import ALIAS, MODES, Mode, table
from harness.scenarios.twins import Log, Stops, Trip, expect_twins
from harness.svm.msrs import Msr

NPT: Final = (True, False)
PAGING: Final = ("npt,npt", "npt,shadow", "shadow,npt", "shadow,shadow")
"""How L1 maps L2, and how L2 maps L3."""
VECTOR: Final = 0x50

_OUT: Final = bytes((0xE6, STOP_PORT))
_VMMCALL: Final = instruction("VMMCALL").code

# Modes


def _enter_mode(l2: GuestLevel, how: Mode, code: bytes, state: Mapping[str, int]) -> None:
    """Let L1 enter L2 with code in place of the proxy; nothing runs yet."""
    at = l2.instance.put_code(code)
    l2.vmcb.update(state)
    l2.vmcb.update({"cs.base": at, "rip": 0} if how.real else {"rip": at})
    l2.host.make_current()
    l2.host.submit_entry(l2)


@scenario(needs=[nested_svm], axes={"mode": tuple(MODES), "npt": NPT}, levels=2)
def test_migrate_l2_in_every_mode(context: Context, mode: str, npt: bool) -> None:
    """L2 goes on in the mode that it was in, with its paging."""
    how = MODES[mode]

    def journey(machine: ProxyMachine, log: Log) -> Trip:
        l2 = machine.l1.launch(npt=npt, vmcb={"rax": 0})
        first = 0x10 if how.real else l2.scratch + 0x10
        second = first + 0x20 + (ALIAS if how.paging else 0)
        code = how.store(first) + _OUT + how.store(second) + _VMMCALL
        _enter_mode(l2, how, code, how.state(l2))
        log("stopped at", run_to_port(machine))
        yield
        log("exit", machine.cpus[0].advance(machine.timeout_s))
        log("L1", machine.l1.ping())

    expect_twins(context, journey)


def _other_directory(l2: Level) -> int:
    """Return a page directory in which all lies one page lower than in the first."""
    large = int(Pte.P | Pte.W | Pte.U | Pte.A | Pte.D | Pte.PS)
    entries = {number: (number + 1) * LARGE_PAGE | large for number in range(4)}
    return table(l2, "Q", entries) | int(Pte.P)


def _absent(_: Level) -> int:
    return 0


def _reserved_bits(_: Level) -> int:
    return int(Pte.P) | 1 << 5


_PDPES: Final = {"other": _other_directory, "absent": _absent, "reserved": _reserved_bits}


@scenario(needs=[nested_svm], axes={"pdpe": tuple(_PDPES), "npt": NPT}, levels=2)
def test_migrate_pae_l2_whose_pdpes_changed(context: Context, pdpe: str, npt: bool) -> None:
    """A PDPE changed in memory since CR3 was loaded counts for L2 as it does without a move."""
    how = MODES["pae_paging"]

    def journey(machine: ProxyMachine, log: Log) -> Trip:
        l2 = machine.l1.launch(npt=npt, vmcb={"rax": 0, f"intercept.excp.{PF}": 1})
        # Nothing was seen through this entry before it changes, so that no TLB has it.
        code = how.store(l2.scratch) + _OUT + how.store(l2.scratch + 0x20 + ALIAS) + _VMMCALL
        state = how.state(l2)
        _enter_mode(l2, how, code, state)
        log("stopped at", run_to_port(machine))
        entry = Gpa(int(state["cr3"]) + 8 * (ALIAS >> 30))
        machine.memory.write(entry, struct.pack("<Q", _PDPES[pdpe](l2)))
        yield
        log("exit", machine.cpus[0].advance(machine.timeout_s))
        log("L1", machine.l1.ping())

    expect_twins(context, journey)


# What L1 asked for at VMRUN


@scenario(needs=[nested_svm], axes={"npt": NPT}, levels=2)
def test_migrate_l2_with_permission_maps(context: Context, npt: bool) -> None:
    """L1's MSR and I/O permission maps count after the move, before any other VMRUN."""

    def journey(machine: ProxyMachine, log: Log) -> Trip:
        l2 = machine.l1.launch(npt=npt, msrpm=[Msr.MSR_STAR, Msr.MSR_FS_BASE], iopm=[0x80])
        log("before", l2.run([rdmsr(Msr.MSR_LSTAR)]))
        yield
        exit_ = l2.run_to_exit([rdmsr(Msr.MSR_LSTAR), rdmsr(Msr.MSR_STAR), inb(0x80)])
        log("MSR", exit_)
        exit_.skip()
        exit_ = l2.resume_to_exit()
        log("port", exit_)
        exit_.skip()
        log("and on", l2.finish())
        yield
        log("another", l2.run_to_exit(wrmsr(Msr.MSR_FS_BASE, 0x1000)))

    expect_twins(context, journey)


@scenario(needs=[nested_svm], axes={"level": (2, 3)}, levels=3)
def test_migrate_with_vmcb12_changed_in_memory(context: Context, level: int) -> None:
    """A VMCB that changed in memory since VMRUN counts from the next VMRUN on, moved or not."""

    def journey(machine: ProxyMachine, log: Log) -> Trip:
        guest = machine.level(level)
        assert isinstance(guest, GuestLevel)
        guest.run(nop())
        guest.vmcb["intercept.pushf"] = 1
        yield
        log("not yet", outcome(guest, simple("PUSHF")))
        yield
        machine.l1.ping()
        log("now", outcome(guest, simple("PUSHF")))

    expect_twins(context, journey)


_CLEAN_DT: Final = 1 << 7
_SGDT: Final = instruction("SGDT")


@scenario(needs=[nested_svm], axes={"moved": ("in_l1", "in_l2")}, levels=2)
def test_migrate_between_vmruns_with_clean_bits(context: Context, moved: str) -> None:
    """A VMCB clean bit that lies is honoured or not: both are right, and nothing else changes.

    Clean bits are hints (APM vol. 2, 15.15.2 VMCB Clean Field: the CPU may reload what is marked
    clean). KVM honours them for the VMCB of the last VMRUN (last_vmcb12_gpa), which
    KVM_GET_NESTED_STATE does not tell. What each twin saw is noted.
    """
    limits: list[int] = []

    def journey(machine: ProxyMachine, log: Log) -> Trip:
        l2 = machine.l1.launch()
        log("before", l2.run(nop()))
        if moved == "in_l1":
            machine.l1.ping()
        yield
        machine.l1.ping()
        old = l2.vmcb["gdtr.limit"]
        l2.vmcb.update({"gdtr.limit": old - 0x10, "clean": _CLEAN_DT})
        l2.run(_SGDT(rbx=l2.scratch))
        limits.append(old - machine.memory.read_int(Gpa(l2.scratch), 2))
        machine.l1.ping()
        # Alike again for the comparison at the end.
        l2.vmcb.update({"gdtr.limit": old, "clean": 0})
        l2.run([fill(l2.scratch, 0, 16)])
        log("and on", l2.run(nop()))

    expect_twins(context, journey)
    context.note("GDTR.limit by a lying clean bit", honoured=[change == 0 for change in limits])
    context.expect("limits are the old or the new one", set(limits) <= {0, 0x10}, True)


# L3


@scenario(needs=[nested_svm], axes={"paging": PAGING}, levels=3)
def test_migrate_l3_in_every_paging(context: Context, paging: str) -> None:
    """L3 goes on after the move, faults in its own tables, and exits to L2 and to L1."""
    outer, inner = (name == "npt" for name in paging.split(","))

    def journey(machine: ProxyMachine, log: Log) -> Trip:
        l2 = machine.l1.launch(npt=outer)
        l3 = l2.launch(npt=inner, vmcb={"intercept.rdtsc": 1})
        missing = l3.scratch + PAGE
        l3.tables.unmap(missing)
        log("L3", l3.run([store(l3.scratch, 3)]))
        yield
        log("goes on", l3.run([load(l3.scratch), load(missing), atomic_add(l3.scratch, 1)]))
        l2.configure({"intercept.cpuid": 1})
        log("again", l3.run(nop()))
        yield
        exit_ = l3.run_to_exit([cpuid(0), vmmcall(1), store(l3.scratch, 4)])
        log("to L1", (exit_.host.name, exit_))
        exit_.skip()
        yield
        exit_ = l3.resume_to_exit()
        log("to L2", (exit_.host.name, exit_))
        exit_.skip()
        log("and on", l3.finish())

    expect_twins(context, journey)


# Cut wherever they are


_LONG: Final = 10_000
_BUSY: Final = 200


def _work(guest: Level, at: int) -> list[tuple[Op, ...]]:
    """Return a program with page faults, port exits, and much that does not exit at all."""
    missing = guest.scratch + PAGE
    return [
        loop(_LONG, [atomic_add(at, 1)]),
        loop(_BUSY, [atomic_add(at, 1), outb(STOP_PORT, 1), load(missing)], stop_on_fault=False),
        loop(_LONG, [atomic_add(at, 1), load(at)]),
    ]


@scenario(needs=[nested_svm], axes={"level": (1, 2, 3), "npt": NPT}, levels=3, timeout_s=300)
def test_migrate_running(context: Context, level: int, npt: bool) -> None:
    """A guest that runs all the while is moved again and again, wherever it is."""

    def journey(machine: ProxyMachine, log: Log) -> Stops:
        guest = machine.level(level, npt=npt)
        guest.tables.unmap(guest.scratch + PAGE)
        guest.ping()
        thread = machine.in_thread(guest, lambda it: it.run(_work(it, it.scratch), timeout_s=60))
        yield thread
        log("program", thread.join(machine.timeout_s))
        log("again", guest.run(load(guest.scratch)))
        log("L1", machine.l1.ping())

    context.note("moves", count=expect_twins(context, journey))


# add $1, %rax; vmmcall; jmp back to the start
_CALL_ON: Final = bytes.fromhex("4883c001 0f01d9 ebf7")
_VMRUNS: Final = 800


@scenario(needs=[nested_svm], axes={"npt": NPT}, levels=2, timeout_s=300)
def test_migrate_while_vmrun_loops(context: Context, npt: bool) -> None:
    """L1 executes VMRUN in a loop; wherever between two #VMEXITs it is moved, it counts all."""

    def journey(machine: ProxyMachine, log: Log) -> Stops:
        l1 = machine.l1
        l2 = l1.launch(npt=npt, vmcb={"rax": 0})
        l1.ping()
        l2.vmcb["rip"] = l2.instance.put_code(_CALL_ON)
        body = loop(_VMRUNS, [l2.entry_op(rip_advance=3)])
        thread = machine.in_thread(l1, lambda it: it.run(body, timeout_s=60))
        yield thread
        log("loop", thread.join(machine.timeout_s))
        log("RAX of L2", l2.vmcb["rax"])

    context.note("moves", count=expect_twins(context, journey))


@scenario(needs=[nested_svm], levels=2, timeout_s=300)
def test_migrate_two_running_vcpus(context: Context) -> None:
    """Two vCPUs that both run L2 are moved together, wherever each is."""

    def journey(machine: ProxyMachine, log: Log) -> Stops:
        guests = [machine.level(2, vcpu=number) for number in range(2)]
        for guest in guests:
            guest.tables.unmap(guest.scratch + PAGE)
            guest.ping()
        threads = [
            machine.in_thread(guest, lambda it: it.run(_work(it, it.scratch), timeout_s=60))
            for guest in guests
        ]
        yield from threads
        for thread in threads:
            log("program", thread.join(machine.timeout_s))

    context.note("moves", count=expect_twins(context, journey, vcpus=2))


@scenario(needs=[nested_svm, smm], levels=2)
def test_migrate_vcpus_in_different_states(context: Context) -> None:
    """One vCPU in L2, one halted, one in SMM: all go on, and an IPI wakes the halted one."""

    def journey(machine: ProxyMachine, log: Log) -> Trip:
        first, second, third = (cpu.l1 for cpu in machine.cpus)
        apic = Apic(first)
        for l1 in (first, second, third):
            Apic(l1).enable()
        l2 = first.launch()
        log("L2", l2.run(store(l2.scratch, 1)))
        third.ping()
        handler = machine.inject_smi(vcpu=2)
        log("SMM", handler.ping())
        halted = machine.in_thread(second, lambda it: it.run(wait_interrupt(VECTOR, hlt=True)))
        wait_halted(machine, vcpu=1)
        yield
        log("L2 goes on", l2.run(load(l2.scratch)))
        log("RSM", handler.rsm().name)
        log("third", third.ping())
        log("IPI", first.run(apic.ipi(1, VECTOR)))
        log("woken", halted.join(machine.timeout_s)[0].ok)
        log("taken", second.counted(VECTOR))

    expect_twins(context, journey, vcpus=3, irqchip=True, smm=True)


# Instructions that KVM emulates


_EMULATED: Final = {"ud": simple("UD2"), "mmio": load(APIC_BASE + 0x30, 4)}
"""#UD, for which KVM looks at the instruction, and a read of the local APIC's version."""


@scenario(
    needs=[nested_svm],
    axes={"instruction": tuple(_EMULATED), "npt": NPT, "level": (2, 3)},
    levels=3,
    unsafe=True,
)
def test_migrate_emulates(context: Context, instruction: str, npt: bool, level: int) -> None:
    """KVM emulates an instruction of L2 after the move, before any other VMRUN."""

    def journey(machine: ProxyMachine, log: Log) -> Trip:
        Apic(machine.l1).enable()
        guest = machine.level(level, npt=npt)
        log("before", guest.run(nop()))
        yield
        log("emulated", guest.run(_EMULATED[instruction]))
        log("L1", machine.l1.ping())

    expect_twins(context, journey, irqchip=True)
