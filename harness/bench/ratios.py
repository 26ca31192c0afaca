"""What a benchmark yields: ratios of pairs measured in one run, never absolute times."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Pair:
    """Two times of the same work, one right after the other, in seconds."""

    ours_s: float
    theirs_s: float

    @property
    def share(self) -> float:
        """Their time by ours: 1 is as fast as the other one, 0.5 is half as fast."""
        return self.theirs_s / self.ours_s


@dataclass
class Comparison:
    """One benchmark on one host: the harness against a counterpart, repeated."""

    name: str
    host: str
    against: str
    """What the share is of: ``C``, ``bare QEMU``, or a whole that this is a part of."""
    count: int = 1
    """Rounds in each of the times."""
    is_part: bool = False
    """The share is that of a part in its whole, and says nothing of speed."""
    unit: str = ""
    """What a round is, in the plural, where rounds per second say more than seconds."""
    note: str = ""
    """What a reader of the row must know."""
    pairs: list[Pair] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """The median of the repetitions' shares; ValueError if there was none."""
        return median(self.shares())

    @property
    def spread(self) -> tuple[float, float]:
        """The lowest and the highest share of a repetition; ValueError if there was none."""
        return min(self.shares()), max(self.shares())

    @property
    def share_of_least(self) -> float:
        """Their least time by our least: what is left where another load disturbs most of them."""
        if not self.pairs:
            raise ValueError(f"{self.name} on {self.host}: nothing was measured")
        return min(p.theirs_s for p in self.pairs) / min(p.ours_s for p in self.pairs)

    @property
    def ours_us(self) -> float:
        """The median of our times, in microseconds per round."""
        return median(pair.ours_s for pair in self.pairs) / self.count * 1e6

    @property
    def theirs_us(self) -> float:
        """The median of the counterpart's times, in microseconds per round."""
        return median(pair.theirs_s for pair in self.pairs) / self.count * 1e6

    def shares(self) -> list[float]:
        """Return every repetition's share, in order."""
        if not self.pairs:
            raise ValueError(f"{self.name} on {self.host}: nothing was measured")
        return [pair.share for pair in self.pairs]

    def as_json(self) -> dict[str, Any]:
        """Return it as the report has it."""
        low, high = self.spread
        return {
            "name": self.name,
            "host": self.host,
            "against": self.against,
            "is_part": self.is_part,
            "share": self.share,
            "share_min": low,
            "share_max": high,
            "share_of_least": self.share_of_least,
            "count": self.count,
            **({"unit": self.unit} if self.unit else {}),
            **({"note": self.note} if self.note else {}),
            "ours_s": [pair.ours_s for pair in self.pairs],
            "theirs_s": [pair.theirs_s for pair in self.pairs],
            **({"details": self.details} if self.details else {}),
        }


def parts_of_whole(host: str, whole: str, runs: Iterable[dict[str, float]]) -> list[Comparison]:
    """Return each part's share of the whole, where every run says its parts' seconds.

    The parts of a run add up to its whole; every run has the same parts.
    """
    found: dict[str, Comparison] = {}
    for run in runs:
        total = sum(run.values())
        for part, seconds in run.items():
            row = found.setdefault(part, Comparison(f"{whole}_{part}", host, whole, is_part=True))
            row.pairs.append(Pair(ours_s=total, theirs_s=seconds))
    return list(found.values())
