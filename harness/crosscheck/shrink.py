"""Making a sequence of operations small while it goes on to show the same difference.

Delta debugging (Zeller, Hildebrandt 2002) over the operations, then over what each of them changes,
then over its numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from time import monotonic
from typing import Any

from harness.model.operations import Execute, Operation, SetNestedState

Operations = tuple[Operation, ...]
Shows = Callable[[Operations], bool]


class Budget:
    """How often, and for how many seconds, a sequence may be tried."""

    def __init__(self, tries: int, seconds: float) -> None:
        self.tries = tries
        self._until = monotonic() + seconds

    def take(self) -> bool:
        """Take one try, if there is one left."""
        self.tries -= 1
        return self.tries >= 0 and monotonic() < self._until


def shrink(operations: Sequence[Operation], shows: Shows, budget: Budget) -> Operations:
    """Return a sequence in which nothing can be left out, or the best that the budget allowed.

    Args:
        operations: shows the difference; what comes after it must be cut off already.
        shows: tells whether a sequence shows the same difference.
        budget: how many sequences may be tried.

    """

    def tried(candidate: Operations) -> bool:
        return budget.take() and shows(candidate)

    best = tuple(operations)
    while True:
        smaller = _simpler_numbers(_fewer_changes(_fewer(best, tried), tried), tried)
        if smaller == best:
            return best
        best = smaller


def _fewer(operations: Operations, shows: Shows) -> Operations:
    """Leave out runs of operations, long ones first."""
    size = max(1, len(operations) // 2)
    while True:
        start = 0
        while start < len(operations):
            candidate = operations[:start] + operations[start + size :]
            if candidate and shows(candidate):
                operations = candidate
            else:
                start += size
        if size == 1:
            return operations
        size = max(1, size // 2)


def _fewer_changes(operations: Operations, shows: Shows) -> Operations:
    """Leave out fields that operations change."""
    for index in range(len(operations)):
        # Any: which kinds have changes, mypy need not know.
        operation: Any = operations[index]
        for name in getattr(operation, "changes", ()):
            operation = operations[index]
            left = {key: value for key, value in operation.changes.items() if key != name}
            operations = _kept(operations, index, replace(operation, changes=left), shows)
    return operations


def _simpler_numbers(operations: Operations, shows: Shows) -> Operations:
    for index in range(len(operations)):
        for simpler in _simpler(operations[index]):
            operations = _kept(operations, index, simpler, shows)
    return operations


def _simpler(operation: Operation) -> Iterator[Operation]:
    """Yield an operation with one number as by default."""
    if isinstance(operation, Execute | SetNestedState):
        for each in fields(operation):
            value, default = getattr(operation, each.name), each.default
            if isinstance(value, int) and isinstance(default, int) and value != default:
                simpler: Any = {each.name: default}
                yield replace(operation, **simpler)


def _kept(operations: Operations, index: int, operation: Operation, shows: Shows) -> Operations:
    """Return the operations with one replaced, if they still show it."""
    if operation == operations[index]:
        return operations
    candidate = (*operations[:index], operation, *operations[index + 1 :])
    return candidate if shows(candidate) else operations
