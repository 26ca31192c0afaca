"""Kernels with a bug put back, and what notices it: scenarios, and the cross-check.

A scenario notices a bug if its case FAILs with the variant and passes without it, on the same
archive kernel. The score says how far our checks can see; what nobody noticed is a hole in them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from harness.host.kernel_build import Variant
from harness.report.verdict import Outcome, Verdict
from harness.runner.hosts import HostPool
from harness.runner.lab import Lab
from harness.scenarios.case import Case


@dataclass(frozen=True)
class CrossChecked:
    """What a cross-check of one kernel came to."""

    findings: tuple[str, ...] = ()
    """Each in one line."""
    broke: str = ""
    """What kept it from its end."""


@dataclass(frozen=True)
class KernelRun:
    """All that was run on one kernel."""

    outcomes: Mapping[str, Outcome]
    """By the case's id."""
    crosscheck: CrossChecked | None
    """None: not asked for."""


@dataclass(frozen=True)
class Mutant:
    """One bug that was put back, and who noticed."""

    variant: Variant
    scenarios: Mapping[str, str]
    """Cases that FAIL with it and pass without, with the first line of the reason."""
    crosscheck: str
    """The cross-check's first finding that is none without the bug; empty if there is no such."""
    broken: tuple[str, ...] = field(default=())
    """Cases that ended as ERROR or MISS on either kernel: they could not notice."""

    @property
    def noticed(self) -> bool:
        """Whether anything saw it."""
        return bool(self.scenarios or self.crosscheck)

    def to_plain(self) -> dict[str, Any]:
        """Return this as JSON takes it."""
        return {
            "variant": self.variant.name,
            "area": self.variant.area,
            "noticed": self.noticed,
            "scenarios": dict(self.scenarios),
            "crosscheck": self.crosscheck,
            "broken": list(self.broken),
        }


def run_cases(
    pool: HostPool, lab: Lab, cases: Sequence[Case], told: Callable[[Case, Outcome], None]
) -> dict[str, Outcome]:
    """Run cases on one kernel, one after the other; `told` hears of each."""
    outcomes = {}
    for case in cases:
        outcomes[case.id] = lab.run(pool, case).outcome
        told(case, outcomes[case.id])
    return outcomes


def compare(variant: Variant, without: KernelRun, with_bug: KernelRun) -> Mutant:
    """Return who noticed the bug that a variant puts back."""
    noticed, broken = {}, []
    for case_id, outcome in with_bug.outcomes.items():
        before = without.outcomes[case_id]
        if {before.verdict, outcome.verdict} & {Verdict.ERROR, Verdict.MISS}:
            broken.append(case_id)
        elif before.verdict is Verdict.PASS and outcome.verdict is Verdict.FAIL:
            noticed[case_id] = outcome.reason.partition("\n")[0]
    return Mutant(variant, noticed, _found(without.crosscheck, with_bug.crosscheck), tuple(broken))


def _found(before: CrossChecked | None, after: CrossChecked | None) -> str:
    if before is None or after is None or before.broke:
        return ""
    return next((each for each in after.findings if each not in before.findings), "")


def score(mutants: Sequence[Mutant]) -> dict[str, tuple[int, int]]:
    """Return for each area how many of its bugs were noticed, and how many there are."""
    areas: dict[str, tuple[int, int]] = {}
    for mutant in mutants:
        noticed, of = areas.get(mutant.variant.area, (0, 0))
        areas[mutant.variant.area] = (noticed + mutant.noticed, of + 1)
    return dict(sorted(areas.items()))
