"""Kernels with a bug put back, and what notices it: scenarios, and the cross-check.

A scenario notices a bug if its case FAILs with the variant, twice, and passes without it, on the
same archive kernel. The score says how far our checks can see; what nobody noticed is a hole in
them.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from harness.errors import HarnessError
from harness.host.kernel_build import Variant
from harness.report.verdict import Outcome, Verdict
from harness.repro.peers import KERNEL_LOG, notice
from harness.runner.hosts import HostPool
from harness.runner.lab import Lab
from harness.scenarios.case import Case

Told = Callable[[Case, Outcome], None]


@dataclass(frozen=True)
class CrossChecked:
    """What a cross-check of one kernel came to."""

    findings: tuple[str, ...] = ()
    """Each in one line."""
    broke: str = ""
    """What kept it from its end."""

    def finding_beside(self, before: CrossChecked | None) -> str:
        """Return the first finding that was none without the bug; empty if there is no such."""
        if before is None or before.broke:
            return ""
        return next((each for each in self.findings if each not in before.findings), "")


@dataclass(frozen=True)
class KernelRun:
    """All that was run on one kernel."""

    outcomes: Mapping[str, Outcome]
    """By the case's id."""
    crosscheck: CrossChecked | None
    """None: not asked for."""
    unsteady: tuple[str, ...] = ()
    """Cases that failed once and then did not."""
    seconds: float = 0.0
    peers: Mapping[str, Outcome] | None = None
    """The kernel's own selftests, by name; None: not asked for."""
    window: str = ""
    """A race for vmcb12 that was won where kernels without the bug lose it."""

    def save(self, path: Path, kernel: str) -> None:
        """Write it to a file, for mutants of the same kernel.

        Raises HarnessError: it cannot be written.
        """
        plain = {
            "kernel": kernel,
            "cases": _plain(self.outcomes),
            "crosscheck": self.crosscheck and [self.crosscheck.findings, self.crosscheck.broke],
            "peers": None if self.peers is None else _plain(self.peers),
        }
        try:
            path.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
        except OSError as e:
            raise HarnessError(f"{path}: {e.strerror}") from e

    @classmethod
    def load(cls, path: Path, kernel: str) -> Self:
        """Read what `save` wrote.

        Raises HarnessError: there is no such thing in the file, or it is of another kernel.
        """
        try:
            plain = json.loads(path.read_text(encoding="utf-8"))
            of, crosscheck, peers = plain["kernel"], plain["crosscheck"], plain["peers"]
            outcomes = _outcomes(plain["cases"])
            checked = crosscheck and CrossChecked(tuple(crosscheck[0]), crosscheck[1])
            seen = None if peers is None else _outcomes(peers)
        except OSError as e:
            raise HarnessError(f"{path}: {e.strerror}") from e
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as e:
            raise HarnessError(
                f"{path}: not what a kernel without the bugs did: {type(e).__name__}: {e}"
            ) from e
        if of != kernel:
            raise HarnessError(f"{path}: is of {of}, not of {kernel}")
        return cls(outcomes, checked or None, peers=seen)


def _plain(outcomes: Mapping[str, Outcome]) -> dict[str, list[Any]]:
    return {
        name: [
            each.verdict.value,
            each.reason.partition("\n")[0],
            each.seconds,
            # Of a selftest: what the kernel complained of.
            each.evidence.get(KERNEL_LOG, ""),
        ]
        for name, each in outcomes.items()
    }


def _outcomes(plain: Mapping[str, Any]) -> dict[str, Outcome]:
    return {
        name: Outcome(Verdict(verdict), reason, seconds, {KERNEL_LOG: said} if said else {})
        for name, (verdict, reason, seconds, said) in plain.items()
    }


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
    ran: int = 0
    """Cases that ran with it."""
    unsteady: tuple[str, ...] = ()
    """Cases that failed once with it and then did not: they do not count."""
    seconds: float = 0.0
    peers: Mapping[str, str] | None = None
    """The kernel's own selftests that noticed, each with why; None: they were not run."""
    own: tuple[str, ...] = ()
    """The cases and races that its reproducers name."""
    window: str = ""
    """A race for vmcb12 that noticed; run if neither cases nor the cross-check did."""

    @property
    def noticed(self) -> bool:
        """Whether any check of ours saw it."""
        return bool(self.scenarios or self.crosscheck or self.window)

    def to_plain(self) -> dict[str, Any]:
        """Return this as JSON takes it."""
        return {
            "variant": self.variant.name,
            "area": self.variant.area,
            "noticed": self.noticed,
            "scenarios": dict(self.scenarios),
            "own": list(self.own),
            "crosscheck": self.crosscheck,
            "window": self.window,
            "peers": None if self.peers is None else dict(self.peers),
            "broken": list(self.broken),
            "unsteady": list(self.unsteady),
            "ran": self.ran,
            "seconds": round(self.seconds, 1),
        }


def run_cases(pool: HostPool, lab: Lab, cases: Sequence[Case], told: Told) -> dict[str, Outcome]:
    """Run cases on one kernel, one after the other; `told` hears of each."""
    outcomes = {}
    for case in cases:
        outcomes[case.id] = lab.run(pool, case).outcome
        told(case, outcomes[case.id])
    return outcomes


def able_to_notice(without: KernelRun, cases: Iterable[Case], own: Collection[str]) -> list[Case]:
    """Return the cases that pass without a bug: its `own` ones first, then the quickest.

    A reproducer's own cases tell soonest whether the bug is there at all.
    """

    def passed(case: Case) -> bool:
        outcome = without.outcomes.get(case.id)
        return outcome is not None and outcome.verdict is Verdict.PASS

    def rank(case: Case) -> tuple[bool, float]:
        return case.id not in own, without.outcomes[case.id].seconds

    return sorted(filter(passed, cases), key=rank)


@dataclass(frozen=True)
class Enough:
    """When a bug is noticed well enough; one that nobody noticed yet has everything run."""

    cases: int = 0
    """So many cases that failed; 0: never."""
    seconds: float = math.inf
    """So long, if it was noticed."""
    noticed: bool = False
    """Whether something noticed it before the cases ran."""

    def reached(self, failed: int, seconds: float) -> bool:
        """Say whether to stop."""
        if self.cases and failed >= self.cases:
            return True
        return (self.noticed or failed > 0) and seconds >= self.seconds


def run_until_noticed(
    pool: HostPool, lab: Lab, cases: Iterable[Case], told: Told, enough: Enough
) -> KernelRun:
    """Run cases on a kernel with a bug, until `enough` of them have failed.

    A FAIL counts if the case fails once more: this machine may be busy, the emulated CPU slow.
    """
    started = time.monotonic()
    outcomes: dict[str, Outcome] = {}
    unsteady: list[str] = []
    failed = 0
    for case in cases:
        outcome = lab.run(pool, case).outcome
        if outcome.verdict is Verdict.FAIL:
            outcome = lab.run(pool, case).outcome
            if outcome.verdict is Verdict.FAIL:
                failed += 1
            else:
                unsteady.append(case.id)
        outcomes[case.id] = outcome
        told(case, outcome)
        if enough.reached(failed, time.monotonic() - started):
            break
    return KernelRun(outcomes, None, tuple(unsteady))


def compare(
    variant: Variant, without: KernelRun, with_bug: KernelRun, own: Collection[str] = ()
) -> Mutant:
    """Return who noticed the bug that a variant puts back; `own`: its reproducers' cases."""
    failed, broken = {}, []
    for case_id, outcome in with_bug.outcomes.items():
        before = without.outcomes[case_id]
        if {before.verdict, outcome.verdict} & {Verdict.ERROR, Verdict.MISS}:
            broken.append(case_id)
        elif before.verdict is Verdict.PASS and outcome.verdict is Verdict.FAIL:
            failed[case_id] = outcome.reason.partition("\n")[0]
    peers = None
    if without.peers is not None and with_bug.peers is not None:
        peers = notice(without.peers, with_bug.peers)
    return Mutant(
        variant,
        failed,
        with_bug.crosscheck.finding_beside(without.crosscheck) if with_bug.crosscheck else "",
        tuple(broken),
        len(with_bug.outcomes),
        with_bug.unsteady,
        with_bug.seconds,
        peers,
        tuple(sorted(own)),
        with_bug.window,
    )


def noticed(mutant: Mutant) -> bool:
    """Say whether any check of ours saw the bug."""
    return mutant.noticed


def elsewhere(mutant: Mutant) -> bool:
    """Say whether a check saw it that its reproducers do not name."""
    race = {mutant.window.partition(":")[0]} if mutant.window else set()
    return bool(mutant.crosscheck or (race | set(mutant.scenarios)) - set(mutant.own))


def by_peers(mutant: Mutant) -> bool:
    """Say whether one of the kernel's own selftests saw it."""
    return bool(mutant.peers)


def score(
    mutants: Sequence[Mutant], columns: Iterable[Callable[[Mutant], bool]]
) -> dict[str, tuple[int, ...]]:
    """Return for each area how many of its bugs each column holds for, and how many there are."""
    asked = tuple(columns)
    areas = sorted({mutant.variant.area for mutant in mutants})
    found = {area: [each for each in mutants if each.variant.area == area] for area in areas}
    return {
        area: (*(sum(map(column, bugs)) for column in asked), len(bugs))
        for area, bugs in found.items()
    }
