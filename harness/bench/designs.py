"""What a design of nested state costs: memory per vCPU at each stage, and time. Runs inside a host.

Standard library only.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic_ns
from typing import Any, Final

from harness.bench.proxy_loops import opened_bench, vmrun
from harness.errors import Unsupported
from harness.facts import HostView, nested_svm
from harness.probe.page_alloc import PageAllocProbe
from harness.scenarios.measure import ToggleByMsrs, ready_machine
from kvm_ioctl.handles import Kvm

_ROUNDS: Final = 5
"""Of each time; the shortest counts, which other work on the machine disturbed least."""


def measure_design(
    emit: Callable[..., None], *, vcpus: int, toggles: int, vmruns: int
) -> dict[str, Any]:
    """Return bytes per vCPU that were never, are, and no longer are with EFER.SVME, and times.

    Args:
        emit: the agent's.
        vcpus: of the one VM that is measured.
        toggles: of EFER.SVME on each vCPU, for the time of one.
        vmruns: programs of VMRUNs, for the time of one.

    Raises:
        Unsupported: the host has no nested SVM.

    """
    if not (fact := nested_svm(HostView())).holds:
        raise Unsupported(f"nested_svm: {fact.evidence}")
    with Kvm() as kvm:
        memory = _memory(kvm, vcpus)
        emit("memory", **memory)
        return {
            "vcpus": vcpus,
            "bytes_per_vcpu": memory,
            "toggle_us": round(_toggle_us(kvm, vcpus, toggles), 2),
            "vmrun_us": round(_vmrun_us(kvm, vmruns), 2),
        }


def _memory(kvm: Kvm, vcpus: int) -> dict[str, float]:
    # Armed before the vCPUs are made: an eager design pays then.
    with PageAllocProbe() as probe, ready_machine(kvm, vcpus) as machine:
        toggle = ToggleByMsrs([machine])
        held = {"never nested": _nested_bytes(probe)}
        toggle.set(True)
        held["EFER.SVME set"] = _nested_bytes(probe)
        toggle.set(False)
        held["cleared again"] = _nested_bytes(probe)
    return {stage: held_bytes / vcpus for stage, held_bytes in held.items()}


def _nested_bytes(probe: PageAllocProbe) -> int:
    sites = probe.held_sites()
    return sum(site.size_bytes * count for site, count in sites.items() if site.is_nested)


def _toggle_us(kvm: Kvm, vcpus: int, toggles: int) -> float:
    """Return the time of EFER.SVME set and cleared by KVM_SET_MSRS on one vCPU, in us."""
    with ready_machine(kvm, vcpus) as machine:
        toggle = ToggleByMsrs([machine])

        def once() -> float:
            start = monotonic_ns()
            for _ in range(toggles):
                toggle.set(True)
                toggle.set(False)
            return (monotonic_ns() - start) / 1e3 / toggles / vcpus

        return min(once() for _ in range(_ROUNDS))


def _vmrun_us(kvm: Kvm, vmruns: int) -> float:
    """Return the time from VMRUN to #VMEXIT and back, by the guest's time stamp counter, in us."""
    with opened_bench(kvm) as bench:
        works = [vmrun(1, bench, vmruns) for _ in range(_ROUNDS)]
        return min(work.seconds * 1e6 / work.done for work in works)
