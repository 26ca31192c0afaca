"""What a kernel could not give or did not take: named, so that nothing is lost in silence."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Loss(Enum):
    """What happened to a piece of state."""

    NOT_GIVEN = "not given"
    """The kernel that the state was captured on has no way to read it."""
    NOT_TAKEN = "not taken"
    """The kernel that it was restored on has no way to write it, or refused."""
    CHANGED = "changed"
    """It was taken, and reads otherwise afterwards."""


@dataclass(frozen=True)
class Note:
    """One piece of state that did not come along."""

    loss: Loss
    what: str
    """The part, and what in it: `msrs.0xc0010114`."""
    why: str

    def __str__(self) -> str:
        return f"{self.what} {self.loss.value}: {self.why}"
