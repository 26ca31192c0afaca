"""Which rows of the table of migrations (`matrix.py`) a known issue explains."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date

from harness.runner.known_issues import KnownIssue, find


@dataclass(frozen=True)
class End:
    """One end of a migration: its kernel, and what kind of host it is."""

    release: str
    kind: str


def known_row(
    issues: Sequence[KnownIssue], place: str, ends: Iterable[End], today: date | None = None
) -> KnownIssue | None:
    """Return the issue for which a machine differs that was at a place, if there is one.

    In an issue's `match`, a place is ``nsvm migrate: PLACE``. Its kernels are those of either end:
    what one kernel does not give, another one cannot take.
    """
    today = today or date.today()
    valid = [issue for issue in issues if not issue.has_expired(today)]
    found = (find(valid, f"nsvm migrate: {place}", end.release, end.kind) for end in ends)
    return next((issue for issue in found if issue is not None), None)
