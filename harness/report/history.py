"""Runs in time: what is new since the last one, what got fixed, what fails now and then.

A line is a host and a kernel series (6.1, 7.3): its runs are compared with one another, whichever
point release or build they ran on.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property

from harness.report.flaky import Rate, flaky_rate
from harness.report.run_record import (
    STATUS_UNFINISHED,
    CaseRecord,
    RunRecord,
    worst,
)
from harness.report.signature import first_line, signature
from harness.report.store import Store
from harness.report.verdict import Verdict

#: Runs of a line that a report looks back on.
MOST_RUNS = 30


class Kind(Enum):
    """What became of a case since it last ran, in words for people."""

    NEW = "new"
    DIFFERENT = "fails in another way"
    FIXED = "fixed"
    SKIPPED = "not run any more"


@dataclass(frozen=True)
class Change:
    """A case that ended otherwise than when it last ran on its line."""

    kind: Kind
    now: CaseRecord
    #: None: it never ran before.
    before: CaseRecord | None


@dataclass(frozen=True)
class Line:
    """The runs of one host with one kernel series, oldest first; one at least."""

    host: str
    series: str
    runs: Sequence[RunRecord]

    @property
    def latest(self) -> RunRecord:
        """The run that is reported on."""
        return self.runs[-1]

    @property
    def title(self) -> str:
        """The line's name."""
        return f"{self.host}, {self.series}"

    @cached_property
    def now(self) -> Mapping[str, CaseRecord]:
        """How each case ended in the latest run; the worst of its repeats."""
        return {case.case: case for case in worst(self.latest.cases)}

    @cached_property
    def before(self) -> Mapping[str, CaseRecord]:
        """How each case ended when it last ran before the latest run, which may be long ago."""
        found: dict[str, CaseRecord] = {}
        for run in self.runs[:-1]:
            # What did not run says nothing on how a case ended.
            found |= {c.case: c for c in worst(run.cases) if c.verdict is not Verdict.MISS}
        return found

    @cached_property
    def current(self) -> Mapping[str, CaseRecord]:
        """How each case ended when it last ran: a run of a few cases does not hide the others."""
        found: dict[str, CaseRecord] = {}
        for run in self.runs:
            if run.is_whole and run.finished:
                # What such a run does not have was renamed or removed.
                found = {}
            found |= {case.case: case for case in worst(run.cases)}
        return found

    @cached_property
    def changes(self) -> Sequence[Change]:
        """What is otherwise than before; nothing for a line's first run."""
        return list(self._changes()) if len(self.runs) > 1 else []

    def _changes(self) -> Iterator[Change]:
        for name, now in self.now.items():
            before = self.before.get(name)
            was_red = before is not None and before.is_red
            if now.is_red and not was_red:
                yield Change(Kind.NEW, now, before)
            elif now.is_red and before and signature(now) != signature(before):
                yield Change(Kind.DIFFERENT, now, before)
            elif before and now.verdict is Verdict.PASS and before.verdict not in _NOT_FAILED:
                yield Change(Kind.FIXED, now, before)
            elif before and now.verdict is Verdict.SKIP and before.verdict is not Verdict.SKIP:
                yield Change(Kind.SKIPPED, now, before)

    def of(self, kind: Kind) -> list[Change]:
        """Return the changes of one kind."""
        return [change for change in self.changes if change.kind is kind]

    @cached_property
    def flaky(self) -> Mapping[str, Rate]:
        """How often those cases fail that do not always end the same on the latest kernel."""
        runs = [run for run in self.runs if run.kernel == self.latest.kernel]
        attempts: dict[str, list[list[CaseRecord]]] = {}
        for run in runs:
            of_run: dict[str, list[CaseRecord]] = {}
            for case in run.cases:
                of_run.setdefault(case.case, []).append(case)
            for name, cases in of_run.items():
                attempts.setdefault(name, []).append(cases)
        rates = {name: flaky_rate(cases) for name, cases in attempts.items()}
        return {name: rate for name, rate in rates.items() if rate is not None}

    def why_red(self, max_age_s: float | None = None, now: float | None = None) -> list[str]:
        """Return what is wrong with the latest run, a line each; nothing if it is green.

        With `max_age_s`, a host that was not heard of for longer is not green either.
        """
        run = self.latest
        reasons = [*run.complaints]
        if run.status == STATUS_UNFINISHED:
            ended = sum(case.verdict is not Verdict.MISS for case in run.cases)
            reasons.append(f"the run has no end; {ended} of {len(run.cases)} cases have")
        for word in ("FAIL", "ERROR", "MISS"):
            if count := sum(case.word == word for case in self.now.values()):
                reasons.append(f"{count} {word}")
        earlier = [c for name, c in self.current.items() if name not in self.now and c.is_red]
        if earlier:
            reasons.append(f"of what did not run this time {len(earlier)} ended in red before")
        if not self.now:
            reasons.append("nothing ran")
        elif all(case.verdict is Verdict.SKIP for case in self.now.values()):
            reasons.append("all was skipped")
        age = (time.time() if now is None else now) - run.started
        if max_age_s is not None and age > max_age_s:
            reasons.append(f"no run for {age / 3600:.0f} hours")
        return reasons


_NOT_FAILED = (Verdict.PASS, Verdict.SKIP)


def series_of(kernel: str) -> str:
    """Return ``6.1`` for ``6.1.0-56-amd64``; what does not begin like that as it is."""
    match = re.match(r"\d+\.\d+", kernel)
    return match[0] if match else kernel


def lines_of(store: Store) -> list[Line]:
    """Return the lines of a store, by host and version, with their last MOST_RUNS runs."""
    found: dict[tuple[str, str], list[str]] = {}
    for run, host, kernel in store.heads():
        found.setdefault((host, series_of(kernel)), []).append(run)
    ordered = sorted(found, key=lambda key: (key[0], _version_key(key[1])))
    return [Line(*key, [store.load(run) for run in found[key][-MOST_RUNS:]]) for key in ordered]


def _version_key(series: str) -> tuple[list[int], str]:
    return [int(number) for number in re.findall(r"\d+", series)[:2]], series


def expectation(case: CaseRecord) -> str:
    """Return the first field that differs, or the first expectation that did not hold."""
    return first_line(case.reason)
