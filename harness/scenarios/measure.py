"""The measurement: bytes of nested state per vCPU with EFER.SVME off, on, and off again.

Runs inside a host. Each probe measures the same steps; the model says what to expect.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from harness.errors import ScenarioFailure, Unsupported
from harness.facts import HostView, nested_svm
from harness.machine.guest_abi import Command, Stage
from harness.machine.images import load_image
from harness.machine.machine import Machine
from harness.machine.svme_guest import SvmeGuest
from harness.machine.vcpu import MachineVcpu
from harness.model.allocation import Policy, delta_bytes, policy_of
from harness.probe.base import MemoryProbe
from harness.probe.functions import FunctionProbe
from harness.probe.memcg import MemcgProbe
from harness.probe.page_alloc import PageAllocProbe
from harness.svm.msrs import Efer, Msr
from kvm_ioctl.handles import Kvm

#: What running kernels do; 5.10 and later.
EXPECTED_POLICY = Policy.ON_DEMAND

STAGE_TIMEOUT_S = 30.0

#: Memory that KVM frees after an RCU grace period is waited for so long.
SETTLE_S = 10.0
_SETTLE_STEP_S = 0.1

MEMORY_PROBES: dict[str, Callable[[], MemoryProbe]] = {
    "page_alloc": PageAllocProbe,
    "functions": FunctionProbe,
    "memcg": MemcgProbe,
}


@dataclass(frozen=True)
class Reading:
    """One probe's answer."""

    off_bytes_per_vcpu: float
    on_bytes_per_vcpu: float
    delta_bytes_per_vcpu: float
    resolution_bytes: float
    """Of one figure per vCPU; what the probe may be off by."""

    def agrees_with(self, expected: float) -> bool:
        """Say whether on, and off again, are as `expected` within the resolution."""
        return (
            abs(self.delta_bytes_per_vcpu - expected) <= self.resolution_bytes
            and abs(self.off_bytes_per_vcpu) <= self.resolution_bytes
        )


class ToggleByMsrs:
    """EFER.SVME through KVM_SET_MSRS."""

    def __init__(self, machines: Sequence[Machine]) -> None:
        self._machines = machines

    def set(self, svme: bool) -> None:
        """Write the bit on every vCPU."""
        for machine in self._machines:
            for runner in machine.vcpus:
                efer = Efer(runner.vcpu.get_msrs([Msr.MSR_EFER])[Msr.MSR_EFER])
                efer = efer.replace(SVME=svme)
                if runner.vcpu.set_msrs({Msr.MSR_EFER: efer}) != 1:
                    raise ScenarioFailure(f"vCPU {runner.index}: KVM_SET_MSRS refused {efer!r}")


def sregs_svme(runner: MachineVcpu, svme: bool) -> None:
    """Write EFER.SVME through KVM_SET_SREGS and check it: KVM drops this path's errors."""
    sregs = runner.vcpu.get_sregs()
    sregs.efer = Efer(sregs.efer).replace(SVME=svme)
    runner.vcpu.set_sregs(sregs)
    seen = Efer(runner.vcpu.get_sregs().efer).SVME
    if seen != svme:
        raise ScenarioFailure(f"vCPU {runner.index}: KVM_SET_SREGS lost EFER.SVME={svme:d}")


class ToggleBySregs:
    """EFER.SVME through KVM_SET_SREGS."""

    def __init__(self, machines: Sequence[Machine]) -> None:
        self._machines = machines

    def set(self, svme: bool) -> None:
        """Write the bit on every vCPU."""
        for machine in self._machines:
            for runner in machine.vcpus:
                sregs_svme(runner, svme)


class ToggleByGuest:
    """EFER.SVME by the guest's own WRMSR."""

    def __init__(self, machines: Sequence[Machine]) -> None:
        self._guests = [SvmeGuest(machine) for machine in machines]

    def set(self, svme: bool) -> None:
        """Let every vCPU execute its WRMSR."""
        for guest in self._guests:
            for index in range(len(guest.machine.vcpus)):
                guest.command(index, Command.TOGGLE)
                stage = Stage.SVME_ON if svme else Stage.SVME_OFF
                guest.advance(index, to=stage, timeout_s=STAGE_TIMEOUT_S)


PATHS: dict[str, Callable[[Sequence[Machine]], ToggleByGuest | ToggleByMsrs | ToggleBySregs]] = {
    "wrmsr": ToggleByGuest,
    "msrs": ToggleByMsrs,
    "sregs": ToggleBySregs,
}


def ready_machine(kvm: Kvm, vcpus: int, *, stage: Stage = Stage.READY, **options: Any) -> Machine:
    """Return a machine with guest `svme`, all vCPUs run up to `stage`, all they touch mapped."""
    machine = Machine(kvm, image=load_image("svme"), vcpus=vcpus, **options)
    try:
        guest = SvmeGuest(machine)
        for index in range(vcpus):
            guest.advance(index, to=stage, timeout_s=STAGE_TIMEOUT_S)
    except BaseException:
        machine.close()
        raise
    return machine


def read_settled(probe: MemoryProbe) -> int:
    """Return the lowest of the probe's readings until it stops falling for a while."""
    lowest = probe.read_bytes()
    deadline = time.monotonic() + SETTLE_S
    quiet = 0
    while quiet < 5 and time.monotonic() < deadline:
        time.sleep(_SETTLE_STEP_S)
        held = probe.read_bytes()
        quiet = 0 if held < lowest else quiet + 1
        lowest = min(held, lowest)
    return lowest


def measure(
    probe: MemoryProbe,
    toggle: ToggleByGuest | ToggleByMsrs | ToggleBySregs,
    vcpus: int,
    rounds: int,
) -> Reading:
    """Return an armed probe's figures, medians over `rounds` of on and off.

    The median, because slab pages and this process's own pages come and go between two readings;
    and one round ahead of the others, in which what is touched for the first time is touched.
    """
    ons, offs = [], []
    before = 0
    for number in range(rounds + 1):
        toggle.set(True)
        on = probe.read_bytes()
        toggle.set(False)
        off = probe.read_bytes()
        if number:
            ons.append(on - before)
            offs.append(off - before)
        before = off
    on_delta, off_delta = median(ons) / vcpus, median(offs) / vcpus
    return Reading(
        off_bytes_per_vcpu=off_delta,
        on_bytes_per_vcpu=on_delta,
        delta_bytes_per_vcpu=on_delta - off_delta,
        resolution_bytes=probe.resolution_bytes() / vcpus,
    )


def call_sites_of(probe: PageAllocProbe, rounds: int) -> list[dict[str, Any]]:
    """Return who allocated, most blocks first; `count` is per round of setting SVME."""
    nested = [(site, count) for site, count in probe.sites.most_common() if site.is_nested]
    return [
        {
            "function": site.function,
            "order": site.order,
            "count": count // rounds,
            "via": list(site.via),
        }
        for site, count in nested
    ]


def measure_nested_memory(
    emit: Callable[..., None], vcpus: int, vms: int, path: str = "wrmsr", rounds: int = 3
) -> dict[str, Any]:
    """Measure `vms` VMs of `vcpus` vCPUs each; return what ``nsvm memory --json`` prints of it.

    Raises:
        Unsupported: the host has no nested SVM.
        ScenarioFailure: KVM did not do as it was told.
        HostError: a probe cannot be armed.
    """
    fact = nested_svm(HostView())
    if not fact.holds:
        raise Unsupported(f"nested_svm: {fact.evidence}")
    readings: dict[str, Reading] = {}
    with ExitStack() as stack:
        kvm = stack.enter_context(Kvm())
        machines = [stack.enter_context(ready_machine(kvm, vcpus)) for _ in range(vms)]
        emit("progress", what=f"{vms} VM(s) of {vcpus} vCPU(s) ready")
        toggle = PATHS[path](machines)
        # One after the other: 5.10 cannot unwind a stack through another probe's return hook, and
        # a probe armed alone owes nothing to the others.
        page_alloc, functions, memcg = PageAllocProbe(), FunctionProbe(), MemcgProbe()
        for probe in (page_alloc, functions, memcg):
            with probe:
                readings[probe.name] = measure(probe, toggle, vcpus * vms, rounds)
            emit("reading", probe=probe.name, **asdict(readings[probe.name]))
    sites = call_sites_of(page_alloc, rounds + 1)
    expected = delta_bytes(EXPECTED_POLICY)
    agreed = all(reading.agrees_with(expected) for reading in readings.values())
    fits = policy_of(round(readings["page_alloc"].delta_bytes_per_vcpu))
    return {
        "vcpus": vcpus,
        "vms": vms,
        "path": path,
        "rounds": rounds,
        "probes": {name: asdict(reading) for name, reading in readings.items()},
        "memcg_source": memcg.source,
        "call_sites": sites,
        "model": {
            "policy": EXPECTED_POLICY.value,
            "delta_bytes_per_vcpu": expected,
            "running_kernel_fits": fits.value if fits else None,
        },
        "verdict": "PASS" if agreed else "FAIL",
    }
