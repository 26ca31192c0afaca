"""What changed from one kernel to another, in the words of the knobs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from harness.identify.report import Report
from harness.model.knobs import KNOBS, Knob


@dataclass(frozen=True)
class Change:
    """A behaviour that is not the same on both."""

    knob: Knob
    before: Any
    after: Any
    seen: bool
    """On both kernels; else the table of settings says so for at least one of them."""

    def __str__(self) -> str:
        """Return the change in words, in one line."""
        before, after = self.knob.in_words(self.before), self.knob.in_words(self.after)
        return f"{self.knob.what}: {before} -> {after}"

    def to_plain(self) -> dict[str, Any]:
        """Return this as JSON takes it."""
        key_of = self.knob.key_of
        return {
            "knob": self.knob.name,
            "before": key_of(self.before),
            "after": key_of(self.after),
            "seen": self.seen,
            "text": str(self),
        }


def changes(before: Report, after: Report) -> list[Change]:
    """Return what changed; a knob not seen is taken from the setting that fits best."""
    one, other = before.knobs(), after.knobs()
    return [
        Change(
            knob, getattr(one, name), getattr(other, name), name in before.seen.keys() & after.seen
        )
        for name, knob in KNOBS.items()
        if getattr(one, name) != getattr(other, name)
    ]
