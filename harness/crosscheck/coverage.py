"""What a cross-check has been through: transitions, and the knobs that decided something."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from harness.crosscheck.checker import operation_kind, state_class
from harness.model.knobs import KNOBS, Knobs
from harness.model.operations import Operation, Outcome, Value

Transition = tuple[str, str, str]
"""Kind of operation, class of the state before, result."""


class KnobsAsked:
    """Knobs that remember which of them were read."""

    def __init__(self, knobs: Knobs, asked: set[str]) -> None:
        self._knobs, self._asked = knobs, asked

    def __getattr__(self, name: str) -> Any:
        self._asked.add(name)
        return getattr(self._knobs, name)


class Coverage:
    """Counts transitions of one sequence after the other."""

    def __init__(self) -> None:
        self.transitions: Counter[Transition] = Counter()
        self._before: Mapping[str, Value] = {}

    def begin(self) -> None:
        """Start with a fresh vCPU."""
        self._before = {"gif": True}

    def step(self, operation: Operation, outcome: Outcome) -> None:
        """Count one step."""
        self.transitions[operation_kind(operation), state_class(self._before), outcome.result] += 1
        self._before = outcome.seen

    def merge(self, rows: Iterable[Iterable[Any]]) -> None:
        """Add what `rows` of another one gave."""
        for kind, before, result, count in rows:
            self.transitions[str(kind), str(before), str(result)] += int(count)

    def rows(self) -> list[list[Any]]:
        """Return kind, state before, result and count of each transition, the frequent first."""
        return [[*transition, count] for transition, count in self.transitions.most_common()]


def not_asked(asked: Iterable[str]) -> list[str]:
    """Return the knobs that decided nothing."""
    known = set(asked)
    return [name for name in KNOBS if name not in known]
