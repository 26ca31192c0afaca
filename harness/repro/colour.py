"""Red or green: from what was seen, whether a bug showed, for its stated reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from harness.identify.finding import Finding
from harness.report.verdict import Outcome, Verdict
from harness.repro.races import race_name
from harness.repro.table import Reproducer

#: What of a FAIL tells of the kernel; a traceback has lines of the scenario's source in it.
_TOLD_BY_KERNEL = ("kernel log", "console", "kernel stacks")

_LINES = 3
"""Of what was seen, so many are kept."""
_COLUMNS = 240


class Colour(Enum):
    """How running a reproducer ended."""

    #: The bug showed, with its own symptom.
    RED = "red"
    #: It did not.
    GREEN = "green"
    #: Something failed otherwise: no word on this bug.
    OTHER = "other"
    #: This host cannot show it; the reason is the evidence.
    SKIP = "skip"
    #: The harness or the host broke.
    BROKE = "broke"


@dataclass(frozen=True)
class Sight:
    """What one case or experiment showed."""

    what: str
    """The case's id, or the experiment with its knob."""
    colour: Colour
    saw: str
    """The first lines of it."""

    def to_plain(self) -> dict[str, Any]:
        """Return this as JSON takes it."""
        return {**asdict(self), "colour": self.colour.value}


def of_outcome(one: Reproducer, case_id: str, outcome: Outcome) -> Sight:
    """Return what a case's outcome says of a bug."""
    if outcome.verdict is Verdict.PASS:
        return Sight(case_id, Colour.GREEN, "PASS")
    if outcome.verdict is Verdict.SKIP:
        return Sight(case_id, Colour.SKIP, _first(outcome.reason))
    if outcome.verdict is not Verdict.FAIL:
        return Sight(case_id, Colour.BROKE, _first(f"{outcome.verdict.value}: {outcome.reason}"))
    told = [outcome.reason, *(outcome.evidence.get(title, "") for title in _TOLD_BY_KERNEL)]
    saw, symptom = _first(f"FAIL: {outcome.reason}"), one.symptom_in("\n".join(told))
    if symptom is None:
        return Sight(case_id, Colour.OTHER, saw)
    return Sight(case_id, Colour.RED, saw if one.symptom_in(saw) else f"{saw}\n{symptom}")


def of_findings(one: Reproducer, findings: Sequence[Finding]) -> Sight:
    """Return what an experiment's findings say of a bug."""
    what = f"{one.experiment.name}: {one.knob}"
    found = next((finding for finding in findings if finding.knob == one.knob), None)
    if found is None or not found.seen:
        return Sight(what, Colour.BROKE, _first(found.evidence if found else "no finding"))
    value = found.to_plain()["value"]
    colour = Colour.RED if value in one.bad else Colour.GREEN
    return Sight(what, colour, _first(f"{value}: {found.evidence}"))


def of_race(row: Mapping[str, Any]) -> Sight:
    """Return what a race for a field, as `harness.race.race.Tally` tells it, says of a bug."""
    what = race_name(row["field"])
    if row["unchecked"]:
        return Sight(what, Colour.OTHER, _first(f"not checked at all: {row['unchecked']}"))
    counted = f"{row['attempts']} attempts, {row['hits']} hits"
    first = row["first_evidence"]
    if not first:
        return Sight(what, Colour.GREEN, counted)
    return Sight(what, Colour.RED, _first(f"{counted}\n{first['proof']}"))


def whole(sights: Sequence[Sight]) -> Colour:
    """Return the colour of a reproducer from those of its parts: the first of this order."""
    seen = {sight.colour for sight in sights}
    # What broke or failed otherwise hides a colour, so green needs all parts to be green or
    # skipped; one red part is the bug, whatever the others are.
    for colour in (Colour.RED, Colour.BROKE, Colour.OTHER, Colour.GREEN, Colour.SKIP):
        if colour in seen:
            return colour
    return Colour.SKIP


def _first(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines()[:_LINES]]
    return "\n".join(line[:_COLUMNS] for line in lines)
