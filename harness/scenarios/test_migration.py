"""Migration at every point there is: a machine that was moved ends as its twin that was not.

The claim is the sentence of the cover letter turned round: migration with a nested guest running
works. Kernel: svm_get_nested_state(), svm_set_nested_state(); what differs is in `known_issues`.
"""

from __future__ import annotations

from collections.abc import Iterator

from harness.facts import nested_svm
from harness.proxy.machine import ProxyMachine
from harness.proxy.program import atomic_add, cpuid, load, loop, rdmsr, simple, store
from harness.scenarios.case import scenario
from harness.scenarios.context import Context
from harness.scenarios.twins import Log, expect_twins
from harness.svm.msrs import Msr


def _l1_without_svm(machine: ProxyMachine, log: Log) -> Iterator[None]:
    l1 = machine.l1
    log("store", l1.run([store(l1.scratch, 7), rdmsr(Msr.MSR_EFER)]))
    yield
    log("load", l1.run([load(l1.scratch), rdmsr(Msr.MSR_EFER)]))


def _l1_with_svme(machine: ProxyMachine, log: Log) -> Iterator[None]:
    machine.l1.enable_svm()
    yield
    log("MSRs", machine.l1.run([rdmsr(Msr.MSR_EFER), rdmsr(Msr.MSR_VM_HSAVE_PA)]))
    log("L2", machine.l1.launch().run(cpuid(0)))


def _l1_with_gif_0(machine: ProxyMachine, log: Log) -> Iterator[None]:
    l1 = machine.l1
    l1.enable_svm()
    log("CLGI", l1.run(simple("CLGI")))
    yield
    machine.vcpus[0].vcpu.nmi()
    log("with GIF=0", [l1.ping(), l1.counted(2)])
    log("STGI", l1.run([simple("STGI"), simple("NOP1"), simple("NOP1")]))
    log("after STGI", l1.counted(2))


_L1 = {"svme_0": _l1_without_svm, "svme_1": _l1_with_svme, "gif_0": _l1_with_gif_0}


@scenario(needs=[nested_svm], axes={"state": tuple(_L1)})
def test_migrate_l1(context: Context, state: str) -> None:
    """L1 without an L2 is migrated with EFER.SVME, GIF and VM_HSAVE_PA as they are."""
    expect_twins(context, _L1[state])


@scenario(needs=[nested_svm], axes={"npt": (True, False), "level": (2, 3)}, levels=3)
def test_migrate_everywhere(context: Context, npt: bool, level: int) -> None:
    """A nested workload that is moved at every one of its exits ends as its twin."""

    def work(machine: ProxyMachine, log: Log) -> Iterator[None]:
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

    moves = expect_twins(context, work, everywhere=True)
    context.note("moves", count=moves)
