"""A race for one field from its first attempt to its verdict."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final

from harness.errors import ScenarioFailure
from harness.race.arena import Arena, By, unraced
from harness.race.attempt import Attempt, Plan
from harness.race.fields import RacedField
from harness.svm.exit_codes import describe
from kvm_ioctl.handles import Kvm

UNRACED: Final = 32
"""Attempts without a race, with either value."""

_TOLD_EVERY_S = 2.0

Tell = Callable[["Tally"], None]


class Finding(Enum):
    """What a race for a field came to."""

    WINDOW = "window"
    """At least one VMRUN saw two values."""
    NONE = "no window seen"
    UNCHECKED = "not checked by this kernel"
    """It takes the illegal value without a race: nothing can be concluded."""


@dataclass
class Tally:
    """What was counted for one field so far."""

    row: RacedField
    attempts: int = 0
    hits: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    first: dict[str, Any] | None = None
    seconds: float = 0.0
    unchecked: str = ""
    """How the kernel took the illegal value without a race."""

    @property
    def finding(self) -> Finding:
        """What it came to."""
        if self.unchecked:
            return Finding.UNCHECKED
        return Finding.WINDOW if self.hits else Finding.NONE

    def count(self, attempts: Iterable[Attempt]) -> None:
        """Count attempts of a race."""
        for attempt in attempts:
            self.attempts += 1
            proof = proof_of(self.row, attempt)
            self.outcomes["hit" if proof else outcome(attempt)] += 1
            if proof:
                self.hits += 1
                self.first = self.first or {"proof": proof, **attempt.to_json()}

    def to_json(self, release: str) -> dict[str, Any]:
        """Return it for JSON, with what the table says of this kernel."""
        return {
            "field": self.row.name,
            "finding": self.finding.value,
            "window_by_table": self.row.expects_window(release),
            "check_by_table": self.row.expects_check(release),
            "attempts": self.attempts,
            "hits": self.hits,
            "hits_per_1000": round(1000 * self.hits / self.attempts, 2) if self.attempts else None,
            "outcomes": dict(self.outcomes),
            "seconds": round(self.seconds, 1),
            "unchecked": self.unchecked,
            "first_evidence": self.first,
        }


def proof_of(row: RacedField, attempt: Attempt) -> str:
    """Return why an attempt is a hit; empty: it is none."""
    return next(filter(None, (proof(attempt) for proof in row.proofs)), "")


def outcome(attempt: Attempt) -> str:
    """Return how an attempt ended that is no hit."""
    if attempt.ran:
        return "ran"
    if attempt.gave_up:
        return "no writer"
    if attempt.refused_early:
        return "refused"
    return f"refused late or {describe(attempt.exit_code)}"


def race(
    kvm: Kvm,
    row: RacedField,
    by: By,
    seconds: float,
    *,
    first: bool,
    tell: Tell = lambda tally: None,
) -> Tally:
    """Race for a field until the time is over.

    Args:
        kvm: an open /dev/kvm.
        row: the field.
        by: who rewrites it.
        seconds: how long, after the attempts without a race.
        first: until the first hit, if that comes earlier.
        tell: called every few seconds.

    Raises ScenarioFailure: the machine stopped, or cannot do VMRUN even without a race.
    Raises HostError: the writer stands still, or tracefs is not there for a field that needs it.
    """
    tally = Tally(row)
    with Arena(kvm, row, by) as arena:
        tally.unchecked = _without_race(arena)
        if tally.unchecked:
            return tally
        started = told = time.monotonic()
        with arena.racing(arena.plan):
            while (now := time.monotonic()) < started + seconds:
                tally.count(arena.attempts(arena.plan))
                if first and tally.hits:
                    break
                if now > told + _TOLD_EVERY_S:
                    told = now
                    tell(tally)
        tally.seconds = time.monotonic() - started
    return tally


def _without_race(arena: Arena) -> str:
    """Try both values without a race; return how the illegal one was taken, empty if refused.

    Raises ScenarioFailure: L2 does not run with the legal one.
    """
    row, plan = arena.row, arena.plan
    if seen := _other_than("ran", arena, unraced(plan, plan.legal)):
        raise ScenarioFailure(f"{row.name}: the legal value without a race: {seen}")
    wanted = "ran" if row.checked is None else "refused"
    return _other_than(wanted, arena, unraced(plan, plan.illegal))


def _other_than(wanted: str, arena: Arena, plan: Plan) -> str:
    with arena.racing(plan):
        attempts = arena.attempts(plan, UNRACED)
    ended = (proof_of(arena.row, one) or outcome(one) for one in attempts if not one.gave_up)
    return next((how for how in ended if how != wanted), "")
