"""What an experiment found out about a knob, and the table of experiments."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from harness.model.knobs import KNOBS
from kvm_ioctl.handles import Kvm

DEADLINE_S: Final = 20.0
"""For one experiment, in a process of its own; a KVM_RUN in it has less."""


@dataclass(frozen=True)
class Finding:
    """One knob of the running kernel."""

    knob: str
    value: Any
    """One of the knob's values; None: not seen."""
    evidence: str
    """What was done and what was seen, or why it could not be."""

    @property
    def seen(self) -> bool:
        """Whether the value is known."""
        return self.value is not None

    def in_words(self) -> str:
        """Return what the value means."""
        return KNOBS[self.knob].in_words(self.value) if self.seen else "not seen"

    def to_plain(self) -> dict[str, Any]:
        """Return this as JSON takes it; `from_plain` is the way back."""
        value = KNOBS[self.knob].key_of(self.value) if self.seen else None
        return {"knob": self.knob, "value": value, "evidence": self.evidence}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Finding:
        """Return what `to_plain` was called on."""
        key = plain["value"]
        value = None if key is None else KNOBS[plain["knob"]].value_of(key)
        return cls(plain["knob"], value, plain["evidence"])


Findings = Iterator[Finding]


def unseen(knob: str, why: str) -> Finding:
    """Return the finding that nothing is known."""
    return Finding(knob, None, why)


def either(knob: str, seen: str, answers: dict[str, Any], done: str) -> Finding:
    """Return the value that stands for what was seen; anything else is not known.

    Args:
        knob: of which.
        seen: what happened.
        answers: the knob's value for each thing that may happen.
        done: what was done, for the evidence.

    """
    evidence = f"{done}: {seen}"
    if seen in answers:
        return Finding(knob, answers[seen], evidence)
    return unseen(knob, f"{evidence}, which no value of the knob explains")


@dataclass(frozen=True)
class Experiment:
    """One function that finds out about some knobs."""

    name: str
    knobs: tuple[str, ...]
    function: Callable[[Kvm], Findings]
    deadline_s: float = DEADLINE_S


EXPERIMENTS: Final[dict[str, Experiment]] = {}
"""By name; filled by `experiment`, in the order in which they run."""


def experiment(
    *knobs: str, deadline_s: float = DEADLINE_S
) -> Callable[[Callable[[Kvm], Findings]], Callable[[Kvm], Findings]]:
    """Declare a function as the experiment for these knobs."""

    def declare(function: Callable[[Kvm], Findings]) -> Callable[[Kvm], Findings]:
        name = function.__name__
        EXPERIMENTS[name] = Experiment(name, knobs, function, deadline_s)
        return function

    return declare
