"""One sequence of operations on the model and on a machine: where the first difference is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Final, Protocol

from harness.crosscheck.deviations import Deviation, recognise
from harness.crosscheck.notation import in_words
from harness.model.operations import Operation, Outcome, Value

UNKNOWN: Final = "unknown"
"""The model's result where what comes next depends on what it does not hold."""
NOT_DONE: Final = "not done"
"""A machine's result where an operation was too dangerous for its host."""
RESULT: Final = "result"
"""The name under which the results themselves are compared."""

_ENDS: Final = ("shutdown", "hang")
_FIRST: Final = ("guest_mode", "gif", "smm", "run_pending", "smi_pending", "efer")
"""A difference in these is told before others of the same step: it explains them."""


class Machine(Protocol):
    """What operations are done on: a `BareBench`, or a model in its place."""

    def apply(self, operation: Operation, /) -> Outcome: ...  # noqa: D102


class Model(Machine, Protocol):
    """What predicts."""

    @property
    def over(self) -> str:
        """Why nothing more can be said of this vCPU; empty while there is."""
        ...


@dataclass(frozen=True)
class Difference:
    """The first thing that is not as predicted."""

    step: int
    """Index of the operation."""
    operation: Operation
    name: str
    """What is seen (`Outcome.seen`), or `result`."""
    expected: Value
    """The model's."""
    seen: Value
    """The machine's."""

    @property
    def kind(self) -> tuple[str, str]:
        """What makes two differences the same while a sequence is made smaller."""
        return operation_kind(self.operation), self.name

    @property
    def signature(self) -> str:
        """What two findings that are told once have in common."""
        return ", ".join((*self.kind, shown(self.expected), shown(self.seen)))

    def __str__(self) -> str:
        return (
            f"step {self.step}, {in_words(self.operation)}: {self.name}:"
            f" the model says {shown(self.expected)}, the machine {shown(self.seen)}"
        )


@dataclass
class Checked:
    """How a sequence went."""

    difference: Difference | None = None
    known: list[tuple[Deviation, Difference]] = field(default_factory=list)
    """Differences that have a name, which do not count as such."""
    predicted: list[Outcome] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    """The machine's, one for each step that was done on both."""
    not_done: bool = False
    """The machine did not do the operation at which it ended."""
    model_s: float = 0.0

    @property
    def steps(self) -> int:
        """How many operations were compared."""
        return len(self.outcomes)


def operation_kind(operation: Operation) -> str:
    """Return `SetMsr`, or an instruction's name."""
    instruction = getattr(operation, "instruction", None)
    return type(operation).__name__ if instruction is None else str(instruction.name)


def shown(value: Value) -> str:
    """Return a value in words; numbers in hexadecimal."""
    return hex(value) if type(value) is int else str(value)


def differing(expected: Outcome, seen: Outcome) -> Iterator[tuple[str, Value, Value]]:
    """Yield name, expected and seen of all that both know and that is not the same."""
    if expected.result != seen.result:
        yield RESULT, expected.result, seen.result
    for name in (*_FIRST, *(name for name in expected.seen if name not in _FIRST)):
        if name in expected.seen and name in seen.seen:
            one, other = expected.seen[name], seen.seen[name]
            if one != other:
                yield name, one, other


def check(
    operations: Iterable[Operation],
    model: Model,
    machine: Machine,
    *,
    deviations: Sequence[Deviation] = (),
    on_step: Callable[[int, Operation, Outcome], None] | None = None,
) -> Checked:
    """Do operations on both until the first difference without a name, or the end of one.

    Args:
        operations: what to do.
        model: predicts; it is asked first, and where it does not know the sequence ends.
        machine: what it is compared with.
        deviations: differences that have a name.
        on_step: told of every step that was predicted, before it is done on the machine.

    """
    done = Checked()
    excused: set[str] = set()
    for step, operation in enumerate(operations):
        started = perf_counter()
        expected = model.apply(operation)
        done.model_s += perf_counter() - started
        if expected.result == UNKNOWN:
            break
        if on_step is not None:
            on_step(step, operation, expected)
        seen = machine.apply(operation)
        if seen.result == NOT_DONE:
            done.not_done = True
            break
        done.predicted.append(expected)
        done.outcomes.append(seen)
        ends = _compare(done, step, operation, deviations, excused)
        if done.difference is not None or ends or model.over or is_end(seen.result):
            break
    return done


def is_end(result: str) -> bool:
    """Tell whether a vCPU is of no more use after this result."""
    return result in _ENDS or result.startswith("run: ")


def _compare(
    done: Checked,
    step: int,
    operation: Operation,
    deviations: Sequence[Deviation],
    excused: set[str],
) -> bool:
    """Compare the last step; return whether a known difference ends the sequence."""
    ends = False
    for name, expected, seen in differing(done.predicted[-1], done.outcomes[-1]):
        if name in excused:
            continue
        found = Difference(step, operation, name, expected, seen)
        result, predicted = done.outcomes[-1].result, done.predicted[-1].seen
        deviation = recognise(deviations, found.kind, expected, seen, result, predicted)
        if deviation is None:
            done.difference = found
            return True
        done.known.append((deviation, found))
        excused.add(name)
        ends = ends or deviation.ends
        if ends:
            break
    return ends


class Recorded:
    """A machine that gives back what another one gave, step by step."""

    def __init__(self, outcomes: Sequence[Outcome]) -> None:
        self._outcomes = iter(outcomes)

    def apply(self, operation: Operation, /) -> Outcome:
        """Return the next outcome, whatever the operation."""
        return next(self._outcomes)


def state_class(seen: Mapping[str, Value]) -> str:
    """Return where a vCPU is, as `svme gm gif`: what is set of these and smm, rp."""
    names = [name for name, key in _CLASS.items() if seen.get(key)]
    efer = seen.get("efer")
    if isinstance(efer, int) and efer >> 12 & 1:
        names.insert(0, "svme")
    return " ".join(names) or "plain"


_CLASS: Final = {
    "gm": "guest_mode",
    "smm": "smm",
    "gif": "gif",
    "rp": "run_pending",
}
