"""Finding where an ordered list of kernels turns from good to bad."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from harness.errors import HarnessError


class Answer(Enum):
    """What is known of one kernel; the values are the exit statuses of a bisection's test."""

    GOOD = 0
    BAD = 1
    CANNOT_TELL = 125


class BisectError(HarnessError):
    """The bisection cannot be done; one line says why."""


@dataclass(frozen=True)
class Turn:
    """Where it turned."""

    last_good: str
    first_bad: str
    #: Between the two, in order, and none of them could be told.
    untold: tuple[str, ...]
    tried: int


def bisect(names: Sequence[str], test: Callable[[str], Answer]) -> Turn:
    """Return where `names`, of which the first is good and the last is bad, turn.

    Both ends are tested first. What cannot be told is gone around, to the nearest on either side.

    Raises:
        BisectError: fewer than two, or an end is not as it was said to be.
    """
    if len(names) < 2:
        raise BisectError("no two kernels to bisect between")
    known: dict[int, Answer] = {}

    def ask(number: int) -> Answer:
        known[number] = test(names[number])
        return known[number]

    for number, wanted in ((0, Answer.GOOD), (len(names) - 1, Answer.BAD)):
        if (answer := ask(number)) is not wanted:
            said = answer.name.lower().replace("_", " ")
            raise BisectError(f"{names[number]} is to be {wanted.name.lower()}, and is: {said}")
    good, bad = 0, len(names) - 1
    while (middle := _nearest_untried(good, bad, known)) is not None:
        answer = ask(middle)
        if answer is Answer.GOOD:
            good = middle
        elif answer is Answer.BAD:
            bad = middle
    return Turn(names[good], names[bad], tuple(names[good + 1 : bad]), len(known))


def _nearest_untried(good: int, bad: int, known: dict[int, Answer]) -> int | None:
    middle = (good + bad) / 2
    left = [number for number in range(good + 1, bad) if number not in known]
    return min(left, key=lambda number: abs(number - middle), default=None)
