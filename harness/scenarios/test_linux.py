"""Linux as the guest: a real kernel with its own kvm_amd as L1, with L2 and L3 inside.

Proxies find the precise bug, real kernels the one that nobody thought of. What runs in them checks
itself, and its transcript is compared with one made without any of these guests.
"""

from __future__ import annotations

from typing import Any

from harness.errors import HostLost, ScenarioFailure
from harness.facts import nested_svm, smm
from harness.nest.levels import descend
from harness.nest.plan import Inner, Plan, Vmm
from harness.nest.work import expected
from harness.nest.workloads import entry_sums
from harness.qemu_vmm.errors import VmmLost
from harness.qemu_vmm.over import Over
from harness.scenarios.case import scenario
from harness.scenarios.context import Context

TIMEOUT_S = 180.0
MOVES = 2
QEMU_MOVES_S = 300.0
"""QEMU takes about twice as long as the harness's own engine."""
SMIS = 40


@scenario(needs=[nested_svm], guest_linux=True, axes={"vcpus": (1, 2)}, timeout_s=TIMEOUT_S)
def test_linux_works_as_l1(context: Context, vcpus: int) -> None:
    """Linux boots as L1, finds all its CPUs, and its work comes out as it does without a VM."""
    reports = _run(context, Plan(inner=Inner.PROXY, vcpus=vcpus, steps=0))
    context.expect("L1's CPUs", reports["L1"]["cpus"], vcpus)


@scenario(needs=[nested_svm], guest_linux=True, timeout_s=TIMEOUT_S)
def test_kvm_in_linux_as_l1_runs_l2_and_l3(context: Context) -> None:
    """The kvm_amd of a Linux that is L1 itself runs L2 and L3, which do what they do elsewhere."""
    _run(context, Plan(rounds=1, steps=18))


@scenario(needs=[nested_svm], guest_linux=True, timeout_s=TIMEOUT_S)
def test_linux_goes_on_where_it_was_migrated(context: Context) -> None:
    """A Linux that moves between two processes while its KVM runs L2 and L3 notices nothing."""
    _run(context, Plan(rounds=2, steps=12, moves=MOVES))


@scenario(needs=[nested_svm, smm], guest_linux=True, timeout_s=TIMEOUT_S)
def test_smis_leave_linux_and_its_guests_alone(context: Context) -> None:
    """A storm of SMIs from outside changes nothing in Linux as L1, nor in the L2 and L3 it runs."""
    _run(context, Plan(rounds=2, steps=12, smis=SMIS))


@scenario(needs=[nested_svm], guest_qemu=True, timeout_s=TIMEOUT_S)
def test_kvm_in_linux_under_qemu_runs_l2_and_l3(context: Context) -> None:
    """A Linux that QEMU runs as L1 runs L2 and L3, which do what they do elsewhere."""
    _run(context, Plan(rounds=1, steps=18, vmm=Vmm.QEMU))


@scenario(
    needs=[nested_svm],
    guest_qemu=True,
    axes={"over": [over.value for over in Over]},
    timeout_s=QEMU_MOVES_S,
)
def test_linux_goes_on_in_the_qemu_that_it_was_migrated_to(context: Context, over: str) -> None:
    """A Linux that goes from QEMU to QEMU and on while its KVM runs L2 and L3 notices nothing."""
    plan = Plan(rounds=1, steps=12, moves=MOVES, vmm=Vmm.QEMU, move_over=Over(over))
    _run(context, plan)


def _run(context: Context, plan: Plan) -> dict[str, Any]:
    """Build the tower; compare what its levels say with what they must say."""
    seen: dict[str, list[dict[str, Any]]] = {"moved": [], "smi": []}

    def note(kind: str, **data: Any) -> None:
        seen.get(kind, []).append(data)
        context.note(kind, **{"stage" if name == "what" else name: v for name, v in data.items()})

    try:
        reports = descend(note, level=0, plan=plan.to_json())
    except VmmLost:
        raise
    except HostLost as e:
        raise ScenarioFailure(f"{e}\n{e.console}") from e
    wanted = expected(note, plan=plan.to_json(), reports=reports)
    for name, kind in plan.transcripts:
        context.expect(f"{name}'s {kind}", reports[name].get(kind), entry_sums(wanted[kind]))
    context.expect("moves", len(seen["moved"]), plan.moves)
    context.expect("SMIs", len(seen["smi"]), plan.smis)
    if plan.smis and not any(smi["left_guest"] for smi in seen["smi"]):
        raise ScenarioFailure(f"none of {plan.smis} SMIs came while L1 ran a guest")
    return reports
