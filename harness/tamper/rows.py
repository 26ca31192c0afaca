"""What a cell came to, beside what was predicted: plain data on both sides of the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Self

LOST: Final = "host lost"
"""The host died of it, or fell silent."""
NOT_PREDICTED: Final = "not predicted"
"""The model does not hold what it depends on."""


@dataclass(frozen=True)
class Step:
    """One operation: what it answered, and what it was to answer."""

    operation: str
    """In words."""
    result: str
    predicted: str
    """NOT_PREDICTED where the model cannot tell."""
    seen: Mapping[str, Any] = field(default_factory=dict)
    """What was seen after it: where the vCPU is, and what RSM has loaded."""


@dataclass(frozen=True)
class Row:
    """One cell."""

    name: str
    group: str
    outcome: str
    """Where RSM led: `L2`, `L1`, `shutdown`, `internal error`, ..., or LOST."""
    predicted: str
    """The outcome that the model says."""
    differences: Sequence[str] = ()
    """What else was not as predicted."""
    known: Sequence[str] = ()
    """Differences that are a named deviation of the silicon."""
    log: Sequence[str] = ()
    """Complaints in the kernel's log during the cell."""
    steps: Sequence[Step] = ()

    @property
    def differs(self) -> bool:
        """Tell whether the model says otherwise, or the kernel complained."""
        return bool(self.differences or self.log or self.outcome == LOST)

    def how(self) -> list[str]:
        """Return what differs, in words."""
        lost = [LOST] if self.outcome == LOST else []
        return [*lost, *self.differences, *(f"kernel log: {line}" for line in self.log)]

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Return what `to_json` gave."""
        steps = tuple(Step(**step) for step in data["steps"])
        lists = {name: tuple(data[name]) for name in ("differences", "known", "log")}
        return cls(**{**data, **lists, "steps": steps})


def lost(name: str, group: str, why: str) -> Row:
    """Return the row of a cell that took the host with it."""
    return Row(name, group, LOST, "no loss of the host", differences=(why,))


Signature = Mapping[str, Any]
"""What is compared between kernels: the outcome, each step's result, what RSM has loaded."""

LOADED: Final = "after."
"""What the names of registers that RSM has loaded begin with."""
STATE: Final = ("guest_mode", "gif", "run_pending", "efer", "cr0", "cr3", "cr4", "rip")
"""Seen behind RSM, and compared."""


def signature_of(row: Row) -> Signature:
    """Return what is compared of a row."""
    return signature(row.outcome, row.steps)


def signature(outcome: str, steps: Sequence[Step]) -> Signature:
    """Return what is compared between kernels, by names; what is not predicted is not in it."""
    found: dict[str, Any] = {}
    if outcome != NOT_PREDICTED:
        found["outcome"] = outcome
    for number, step in enumerate(steps):
        if step.result == NOT_PREDICTED:
            break
        found[f"step {number}: {step.operation}"] = step.result
        loaded = {name: v for name, v in step.seen.items() if name.startswith(LOADED)}
        found |= {f"{name} after RSM": value for name, value in loaded.items()}
        if loaded:
            found |= {f"{n} after RSM": step.seen[n] for n in STATE if n in step.seen}
    return found
