"""Places at which a machine is saved on one kernel and goes on on another.

A place is two functions: one brings a machine there, the other lives on from there and returns what
it saw, as text. The first runs on the kernel that saves; the second on both, so that they can be
compared. Between them there is nothing but the machine and Python's knowledge of its levels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from harness.proxy.machine import ProxyMachine
from harness.proxy.ops import Policy
from harness.proxy.program import NMI, atomic_add, load, loop, rdmsr, simple, store
from harness.storm.workload import MEMORY_MIB, Cut, Kind, Workload
from harness.svm.msrs import Msr
from kvm_ioctl.asm_kvm import NestedStateFlags

STEPS: Final = 12
"""How many steps a workload goes on for."""

_FROM = 4


@dataclass(frozen=True)
class Place:
    """One place."""

    name: str
    what: str
    """In words, for tables."""
    arrive: Callable[[ProxyMachine], Any]
    """Brings the machine there; what it returns travels too, and must be JSON."""
    live_on: Callable[[ProxyMachine, Any], list[str]]
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the machine, see `ProxyMachine`."""

    @property
    def machine_options(self) -> dict[str, Any]:
        """All options of the machine."""
        return {"memory_mib": MEMORY_MIB, **self.options}


# At work


def _work(machine: ProxyMachine, kind: Kind) -> dict[str, Any]:
    """Stop in the midst of a step that exits."""
    workload = Workload.begin(machine, kind)
    while workload.steps_done < _FROM:
        workload.step()
    workload.cut_after(2)
    try:
        for _ in range(STEPS):
            workload.step()
    except Cut:
        return workload.state
    for cpu in machine.cpus:
        cpu.before_run = None
    return workload.state


def _work_on(machine: ProxyMachine, state: Any) -> list[str]:
    workload = Workload.resume(machine, state)
    return [workload.step() for _ in range(STEPS)]


def _at_work(levels: int, npt: bool) -> Place:
    paging = "nested paging" if npt else "shadow paging"
    kind = Kind(levels, npt)
    return Place(
        f"l{levels}-{'npt' if npt else 'shadow'}",
        f"L{levels} at work" + (f", {paging}" if levels > 1 else ""),
        partial(_work, kind=kind),
        _work_on,
    )


# L1 alone


def _svme_on(machine: ProxyMachine) -> None:
    machine.l1.enable_svm()


def _svme_used(machine: ProxyMachine, _: Any) -> list[str]:
    hsave = machine.l1.rdmsr(Msr.MSR_VM_HSAVE_PA)
    return [f"VM_HSAVE_PA {hsave:#x}", f"L2 answers {machine.l1.launch().ping()}"]


def _gif_0(machine: ProxyMachine) -> None:
    machine.l1.enable_svm()
    machine.l1.do(simple("CLGI"))


def _nmi_held(machine: ProxyMachine, _: Any) -> list[str]:
    l1 = machine.l1
    machine.vcpus[0].vcpu.nmi()
    l1.ping()
    held = l1.counted(NMI)
    l1.run([simple("STGI"), simple("NOP1"), simple("NOP1")])
    return [f"NMIs with GIF=0: {held}", f"after STGI: {l1.counted(NMI)}"]


# L2 with something pending


def _run_pending(machine: ProxyMachine) -> None:
    """Let L1 execute VMRUN, and stop before L2 is entered: single steps end between the two."""
    l1 = machine.l1
    l2 = l1.launch()
    l2.ping()
    l1.ping()
    runner = machine.vcpus[0]
    l1.submit_entry(l2)
    runner.vcpu.set_guest_debug(_ENABLE | _SINGLESTEP)
    for _ in range(_MOST_SINGLE_STEPS):
        runner.step()
        if runner.vcpu.get_nested_state().flags & NestedStateFlags.KVM_STATE_NESTED_RUN_PENDING:
            break
    runner.vcpu.set_guest_debug(0)


_ENABLE, _SINGLESTEP = 1, 2
_MOST_SINGLE_STEPS = 2000


def _entered(machine: ProxyMachine, _: Any) -> list[str]:
    l2 = machine.l1.guests[0]
    l2.go_on()
    return [f"L2 answers {l2.ping()}", f"L1 answers {machine.l1.ping()}"]


def _nmi_pending(machine: ProxyMachine) -> None:
    l2 = machine.l1.launch()
    l2.set_policy(NMI, Policy.COUNT)
    l2.ping()
    machine.vcpus[0].vcpu.nmi()


def _nmi_taken(machine: ProxyMachine, _: Any) -> list[str]:
    l2 = machine.l1.guests[0]
    return [f"L2 answers {l2.ping()}", f"NMIs {l2.counted(NMI)}"]


# SMM


def _smm_from(machine: ProxyMachine, level: int) -> None:
    guest = machine.level(level)
    guest.run(loop(5, [atomic_add(guest.scratch, 1)]))
    machine.inject_smi()
    machine.smm.run(store(machine.smm.scratch, level))


def _rsm(machine: ProxyMachine, _: Any) -> list[str]:
    smm = machine.smm
    interrupted = smm.interrupted
    seen = [f"SMM has {smm.read(smm.scratch):#x}", f"RSM to {smm.rsm().name}"]
    if interrupted is not None:
        results = interrupted.run([atomic_add(interrupted.scratch, 1), load(interrupted.scratch)])
        seen.append(f"{interrupted.name} {results[1].value:#x}")
    seen.append(f"L1 {machine.l1.run(rdmsr(Msr.MSR_EFER))[0].value:#x}")
    return seen


def _smm(level: int) -> Place:
    options = {"smm": True}
    return Place(
        f"smm-from-l{level}", f"SMM entered from L{level}", partial(_smm_from, level=level), _rsm,
        options,
    )  # fmt: skip


PLACES: Final = {
    place.name: place
    for place in (
        _at_work(1, True),
        Place("l1-svme", "L1 with EFER.SVME=1", _svme_on, _svme_used),
        Place("l1-gif-0", "L1 with GIF=0", _gif_0, _nmi_held),
        _at_work(2, True),
        _at_work(2, False),
        Place("l2-run-pending", "VMRUN done, L2 not entered", _run_pending, _entered),
        Place("l2-nmi-pending", "L2 with an NMI pending", _nmi_pending, _nmi_taken),
        _at_work(3, True),
        _at_work(3, False),
        _smm(1),
        _smm(2),
        _smm(3),
    )
}
"""By name, in the order of tables."""
