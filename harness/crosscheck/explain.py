"""Which knob, turned, would make the model say what the machine did."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from harness.crosscheck.checker import Model, Recorded, check
from harness.crosscheck.deviations import Deviation
from harness.model.errors import ModelBug
from harness.model.knobs import KNOBS, Knobs
from harness.model.operations import Operation, Outcome

MakeModel = Callable[[Knobs], Model]


@dataclass(frozen=True)
class Turn:
    """One knob at another value."""

    knob: str
    value: object

    @property
    def key(self) -> str:
        """The value as text."""
        return KNOBS[self.knob].key_of(self.value)

    def __str__(self) -> str:
        knob = KNOBS[self.knob]
        return f"{self.knob}={self.key}: {knob.what}: {knob.in_words(self.value)}"


def turns(knobs: Knobs) -> Iterator[Turn]:
    """Yield every knob at every value that it has not."""
    for name, knob in KNOBS.items():
        for value in knob.values:
            if value != getattr(knobs, name):
                yield Turn(name, value)


def explained_by(
    operations: Sequence[Operation],
    outcomes: Sequence[Outcome],
    knobs: Knobs,
    make_model: MakeModel,
    deviations: Sequence[Deviation] = (),
) -> list[Turn]:
    """Return the turns with which the model agrees with all that a machine answered.

    Args:
        operations: those that were done.
        outcomes: the machine's.
        knobs: with which the model did not agree.
        make_model: makes one of other knobs.
        deviations: differences that have a name.

    """
    done = operations[: len(outcomes)]
    return [
        turn
        for turn in turns(knobs)
        if _agrees(done, outcomes, make_model(knobs.but(**{turn.knob: turn.value})), deviations)
    ]


def _agrees(
    operations: Sequence[Operation],
    outcomes: Sequence[Outcome],
    model: Model,
    deviations: Sequence[Deviation],
) -> bool:
    try:
        checked = check(operations, model, Recorded(outcomes), deviations=deviations)
    except ModelBug:
        # Knobs of kernels that never were can contradict each other.
        return False
    return checked.difference is None and checked.steps == len(outcomes)
