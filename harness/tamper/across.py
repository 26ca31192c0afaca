"""Cells on which kernels differ, and the knob that explains each: found by turning it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Final

from harness.crosscheck.coverage import KnobsAsked
from harness.model.facts import CpuFacts
from harness.model.knobs import KNOBS, Knobs, differing
from harness.tamper.cells import Cell
from harness.tamper.rows import Row, Signature, signature_of
from harness.tamper.trial import predicted

_MOST_TURNED: Final = 3


@dataclass(frozen=True)
class Difference:
    """One cell that two kernels answer otherwise."""

    cell: str
    one: str
    """The older kernel's outcome."""
    other: str
    """The newer one's."""
    what: tuple[str, ...]
    """What differs: `outcome`, `step 5`, `after.ds.limit`."""
    knobs: tuple[str, ...]
    """`name: old -> new` of those that, turned together, make the model say what the newer one
    did; none: nothing explains it."""

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return vars(self) | {"what": list(self.what), "knobs": list(self.knobs)}


def compare(
    cells: Mapping[str, Cell],
    one: Mapping[str, Row],
    other: Mapping[str, Row],
    knobs: tuple[Knobs, Knobs],
    facts: tuple[CpuFacts, CpuFacts],
) -> list[Difference]:
    """Return the cells that two kernels answer otherwise, in the order of `cells`.

    Args:
        cells: by name.
        one: rows of the older kernel, by name.
        other: of the newer one.
        knobs: of both.
        facts: of both.

    """
    found = []
    for name, cell in cells.items():
        if name not in one or name not in other:
            continue
        before, after = signature_of(one[name]), signature_of(other[name])
        said = [predicted(cell, each, cpu) for each, cpu in zip(knobs, facts, strict=True)]
        what = _differing(before, after, said)
        if what:
            turned = explaining(cell, what, before, after, knobs, facts)
            found.append(Difference(name, one[name].outcome, other[name].outcome, what, turned))
    return found


def _differing(one: Signature, other: Signature, said: Sequence[Signature]) -> tuple[str, ...]:
    """Return the names of what differs and means something.

    A register that neither model predicts does not: a failed RSM leaves them as it happens to.
    """
    names = [name for name in one if name in other and one[name] != other[name]]
    return tuple(n for n in names if n == "outcome" or n.startswith("step") or _in_any(n, said))


def _in_any(name: str, said: Sequence[Signature]) -> bool:
    return any(name in each for each in said)


def explaining(
    cell: Cell,
    what: Sequence[str],
    before: Signature,
    after: Signature,
    knobs: tuple[Knobs, Knobs],
    facts: tuple[CpuFacts, CpuFacts],
) -> tuple[str, ...]:
    """Return the fewest knobs that lead from what one kernel did to what the other one does.

    With the first kernel's knobs the model must say what that did; with these turned, what the
    other one did, in all that the model predicts of it, and in some of what differs. None: no such
    knobs, or the model predicts nothing of what differs.
    """
    plain = predicted(cell, knobs[0], facts[0])
    if not _fits(plain, before):
        return ()
    if facts[0] != facts[1] and _explains(predicted(cell, knobs[0], facts[1]), what, plain, after):
        return ("the CPU's features",)
    names = _asked(cell, knobs, facts)
    for count in range(1, _MOST_TURNED + 1):
        for chosen in combinations(names, count):
            turned = knobs[0].but(**{name: getattr(knobs[1], name) for name in chosen})
            if _explains(predicted(cell, turned, facts[1]), what, plain, after):
                return tuple(_in_words(name, knobs) for name in chosen)
    return ()


def _explains(said: Signature, what: Sequence[str], plain: Signature, after: Signature) -> bool:
    """Tell whether a prediction is what was seen, and another one than `plain` where it counts."""
    return _fits(said, after) and any(said.get(name) != plain.get(name) for name in what)


def _asked(cell: Cell, knobs: tuple[Knobs, Knobs], facts: tuple[CpuFacts, CpuFacts]) -> list[str]:
    """Return the knobs of which the kernels have different ones and the model asks."""
    asked: set[str] = set()
    for each, cpu in zip(knobs, facts, strict=True):
        # What asks for an attribute gets it; that is all that a model does with its knobs.
        listening: Any = KnobsAsked(each, asked)
        predicted(cell, listening, cpu)
    return [knob.name for knob in differing(*knobs) if knob.name in asked]


def _fits(said: Signature, seen: Signature) -> bool:
    """Tell whether all that was predicted was seen."""
    return all(said[name] == seen[name] for name in said if name in seen)


def _in_words(name: str, knobs: tuple[Knobs, Knobs]) -> str:
    knob = KNOBS[name]
    values = [knob.key_of(getattr(each, name)) for each in knobs]
    return f"{name}: {values[0]} -> {values[1]}"
