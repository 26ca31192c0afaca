"""How often a case that does not always end the same fails, and how sure that is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from harness.report.run_record import CaseRecord
from harness.report.verdict import Verdict

#: Quantile of the normal distribution for a confidence of 95 %.
_Z = 1.959964


@dataclass(frozen=True)
class Rate:
    """Failures among attempts."""

    failed: int
    attempts: int

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's score interval of the failure rate, 95 %; (0, 1) without any attempt."""
        if not self.attempts:
            return 0.0, 1.0
        n, p, z = self.attempts, self.failed / self.attempts, _Z
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        # Of none, or all, failed, an end of the interval is exactly 0, or 1, but for rounding.
        low = 0.0 if self.failed == 0 else max(0.0, middle - half)
        high = 1.0 if self.failed == n else min(1.0, middle + half)
        return low, high

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.failed} of {self.attempts} ({low:.0%} to {high:.0%})"


def flaky_rate(runs: Sequence[Sequence[CaseRecord]]) -> Rate | None:
    """Return how often a case failed if it is flaky, None if it is not.

    Given are its attempts, by run, oldest first. It is flaky if it ended both ways within one run,
    or changed at least twice: a case that failed before, and passes ever since, was mended.
    Attempts that say nothing about KVM (SKIP, ERROR, MISS) do not count.
    """
    told = [[a.verdict is Verdict.FAIL for a in run if _tells(a)] for run in runs]
    attempts = [failed for run in told for failed in run]
    within_one = any(len(set(run)) > 1 for run in told)
    changes = sum(a != b for a, b in itertools.pairwise(attempts))
    if not within_one and changes < 2:
        return None
    return Rate(sum(attempts), len(attempts))


def _tells(attempt: CaseRecord) -> bool:
    return attempt.verdict in (Verdict.PASS, Verdict.FAIL)
