"""What a level does once all deeper ones are done: its own work, and a proxy's if it has one."""

from __future__ import annotations

import os
import platform
import select
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from harness.nest.plan import PROXY_LAUNCHED, ROUND, Inner, Plan
from harness.nest.workloads import Workloads, entry_sums

PROXY_LEVELS: Final = 2
"""Of the proxy machine: its L1 launches an L2, which for the host are some levels deeper."""

_BUSY: Final = 500_000
"""Operations of the proxy, some tenths of a second where SVM is emulated."""


def work(emit: Callable[..., None], level: int, plan: Plan) -> dict[str, Any]:
    """Return what the level saw; the transcripts as sums of their entries.

    Raises ScenarioFailure: something in it was not as it must be.
    """
    entries = own_work(
        plan, lambda n: emit("stage", level=level, what=f"{ROUND} {n}", seconds=None)
    )
    report: dict[str, Any] = {
        "release": platform.release(),
        "cpus": os.cpu_count(),
        "rounds": entry_sums(entries),
    }
    if plan.inner is Inner.PROXY and level == plan.linux_levels:
        report["proxy"] = entry_sums(proxy_work(emit, level, plan))
    return report


def own_work(plan: Plan, on_round: Callable[[int], None] = lambda number: None) -> list[str]:
    """Do the rounds of `workloads`; return their entries, tell of each."""
    entries = []
    with tempfile.TemporaryDirectory(prefix="nsvm-work-") as scratch:
        for entry in Workloads(Path(scratch), plan.vcpus).rounds(plan.rounds):
            entries.append(entry)
            on_round(len(entries))
    return entries


def proxy_work(emit: Callable[..., None], level: int, plan: Plan) -> list[str]:
    """Run the storm's workload in a proxy machine; return its transcript."""
    # Imported where it is needed: an import costs seconds where Python itself is nested.
    from harness.proxy.machine import ProxyMachine
    from harness.proxy.program import loop, nop
    from harness.storm.workload import MEMORY_MIB, TIMEOUT_S, Kind, Workload
    from kvm_ioctl.handles import Kvm

    timeout_s = TIMEOUT_S * plan.patience * (level + 1)
    with Kvm() as kvm, ProxyMachine(kvm, memory_mib=MEMORY_MIB, timeout_s=timeout_s) as machine:
        workload = Workload.begin(machine, Kind(PROXY_LEVELS))
        emit("stage", level=level + PROXY_LEVELS, what=PROXY_LAUNCHED, seconds=None)
        until_told = plan.works_until_told(level)
        while workload.steps_done < plan.steps or (until_told and not _was_told()):
            workload.step()
            if until_told:
                # What is done to L1 shall find it running its guest, not Python.
                workload.level.run(loop(_BUSY, [nop()]))
        return workload.transcript


def _was_told() -> bool:
    """Tell whether something came on standard input."""
    return bool(select.select([sys.stdin], [], [], 0)[0])


def expected(
    emit: Callable[..., None], *, plan: dict[str, Any], reports: dict[str, Any]
) -> dict[str, Any]:
    """Return the entries that every level's report must agree with, made without any Linux guest.

    To be called in the host: its KVM runs the proxies one level, or more, further out. They do as
    many steps as were reported.
    """
    steps = max((len(report.get("proxy", ())) for report in reports.values()), default=0)
    wanted = replace(Plan.from_json(plan), steps=steps, moves=0, smis=0)
    found: dict[str, Any] = {"rounds": own_work(wanted)}
    if wanted.inner is Inner.PROXY:
        found["proxy"] = proxy_work(lambda kind, **data: None, 0, wanted)
    return found
