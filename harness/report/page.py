"""The report as one HTML page that needs nothing else, from a file and from an e-mail.

What hosts, kernels and scenarios said is escaped wherever it stands, by the template's rules; the
page's own policy forbids scripts and anything from elsewhere, too.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from harness.report.bugs import Bugs
from harness.report.history import Change, Kind, Line, expectation
from harness.report.page_environment import environment_of
from harness.report.plot import Series, colour, plot, point
from harness.report.reproduce import command, run_command
from harness.report.run_record import METRICS, CaseRecord, Metric, severity
from harness.report.signature import splat
from harness.report.store import Store
from harness.runner.known_issues import KnownIssue

_HERE = Path(__file__).parent

WORDS = {
    "FAIL": "KVM did what it must not",
    "ERROR": "the harness or the lab broke",
    "MISS": "was to run and never did",
    "KNOWN": "failed as a known issue says",
    "XPASS": "passed though an issue is known",
    "PASS": "KVM did what the scenario claims",
    "SKIP": "not applicable",
}

#: Failures shown with all that backs them. All that there are stand in the matrix.
_MOST_FAILURES = 100

Row = dict[str, Any]


def render(
    store: Store,
    lines: Sequence[Line],
    issues: Sequence[KnownIssue] = (),
    *,
    max_age_s: float | None = None,
    bugs: Bugs | None = None,
) -> str:
    """Return the page, of one line at least; `bugs` are those that were put back into a kernel."""
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined
    )
    red = [line for line in lines if line.why_red(max_age_s)]
    failures = list(_failures(store, lines))
    return environment.get_template("report.html.j2").render(
        # Ours, and no markup in it.
        css=Markup((_HERE / "report.css").read_text(encoding="utf-8")),
        made=_when(time.time()),
        run_count=sum(len(line.runs) for line in lines),
        state="red" if red else "green",
        headline=f"{len(red)} of {len(lines)} red" if red else f"All {len(lines)} green",
        words=list(WORDS),
        meanings=WORDS,
        lines=[_line(line, max_age_s) for line in lines],
        new=_changes(lines, Kind.NEW),
        different=_changes(lines, Kind.DIFFERENT),
        fixed=_changes(lines, Kind.FIXED),
        skipped=_changes(lines, Kind.SKIPPED),
        flaky=list(_flaky(lines)),
        failures=failures[:_MOST_FAILURES],
        left_out=max(0, len(failures) - _MOST_FAILURES),
        matrix=list(_matrix(lines)),
        plots=list(_plots(lines)),
        known=list(_known(lines, issues)),
        bugs=bugs,
    )


def _when(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(at)) if at else "not recorded"


def _line(line: Line, max_age_s: float | None) -> Row:
    run = line.latest
    return {
        "host": line.host,
        "kernel": run.kernel,
        "started": _when(run.started),
        "why": line.why_red(max_age_s),
        "counts": Counter(case.word for case in line.current.values()),
        "new": len(line.of(Kind.NEW)),
        "fixed": len(line.of(Kind.FIXED)),
        "harness": f"{run.version} {run.revision}".strip() or "not recorded",
        "command": run_command(run.argv),
        "environment": environment_of(run),
    }


def _changes(lines: Sequence[Line], kind: Kind) -> list[Row]:
    return [_change(line, change) for line in lines for change in line.of(kind)]


def _change(line: Line, change: Change) -> Row:
    # What got fixed says what it was; all else what it is.
    told = change.before if change.kind is Kind.FIXED and change.before else change.now
    return {
        "line": line.title,
        "case": change.now.case,
        "before": change.before.word if change.before else "",
        "now": change.now.word,
        "said": expectation(told),
        "flaky": str(line.flaky.get(change.now.case, "")),
    }


def _flaky(lines: Sequence[Line]) -> Iterator[Row]:
    for line in lines:
        for case, rate in line.flaky.items():
            low, high = rate.interval
            yield {
                "line": line.title,
                "case": case,
                "failed": rate.failed,
                "attempts": rate.attempts,
                "rate": f"{rate.failed / rate.attempts:.0%}",
                "interval": f"{low:.0%} to {high:.0%}",
            }


def _failures(store: Store, lines: Sequence[Line]) -> Iterator[Row]:
    for line in lines:
        new = {change.now.case for change in line.of(Kind.NEW)}
        red = [case for case in line.now.values() if case.is_red]
        # What is new goes first.
        for case in sorted(red, key=lambda c: (c.case not in new, severity(c.word))):
            yield _failure(line, case, store.evidence_of(line.latest.id, case))


def _failure(line: Line, case: CaseRecord, evidence: Mapping[str, str]) -> Row:
    more = {} if case.reason == expectation(case) else {"reason": case.reason}
    return {
        "line": line.title,
        "case": case.case,
        "word": case.word,
        "claim": case.claim,
        "said": expectation(case),
        "reproduce": command(line.latest.argv, case.case),
        "splat": splat(case, evidence.get("kernel log", "")),
        "evidence": [*more.items(), *evidence.items()],
    }


def _matrix(lines: Sequence[Line]) -> Iterator[Row]:
    """Yield a row for each scenario; its cases are told apart only where not all passed."""
    scenarios: dict[str, dict[str, None]] = {}
    for line in lines:
        for name in line.current:
            scenarios.setdefault(name.partition("[")[0], {})[name] = None
    for scenario, cases in scenarios.items():
        rows = [
            {"name": case, "words": [_word(line, case) for line in lines]}
            for case in cases
            if {_word(line, case) for line in lines} - {"PASS", ""}
        ]
        yield {
            "scenario": scenario,
            "cells": [_cell([_word(line, case) for case in cases]) for line in lines],
            "cases": rows,
        }


def _word(line: Line, case: str) -> str:
    return line.current[case].word if case in line.current else ""


def _cell(words: Sequence[str]) -> Row | None:
    there = [word for word in words if word]
    if not there:
        return None
    worst = min(there, key=severity)
    if worst == "SKIP" or len(there) == 1:
        return {"word": worst, "text": worst}
    # How many of them are like that; of a scenario that passed, how many did.
    return {"word": worst, "text": f"{there.count(worst)}/{len(there)} {worst}"}


def _plots(lines: Sequence[Line]) -> Iterator[Row]:
    for metric in METRICS:
        series = [one for one in (_series(line, metric) for line in lines) if one.points]
        if not series:
            continue
        shown = _SHOWN[metric.unit]
        yield {
            "title": metric.name,
            # Made of numbers, and of texts that plot() escapes.
            "svg": Markup(plot(series, shown)),
            "legend": [
                {"title": s.title, "colour": colour(n), "last": shown(s.points[-1].middle)}
                for n, s in enumerate(series)
            ],
        }


def _series(line: Line, metric: Metric) -> Series:
    values = [
        (run.started, [m.value for m in run.measured if m.metric == metric.name])
        for run in line.runs
    ]
    return Series(line.title, [point(at, found) for at, found in values if found])


#: How figures are written, by unit.
_SHOWN: Mapping[str, Callable[[float], str]] = {
    "bytes": lambda value: f"{value:,.0f} B",
    "s": lambda value: f"{value * 1000:,.0f} ms",
}


def _known(lines: Sequence[Line], issues: Sequence[KnownIssue]) -> Iterator[Row]:
    described = {issue.id: issue for issue in issues}
    shown: Counter[str] = Counter()
    passed: Counter[str] = Counter()
    for line in lines:
        for case in line.current.values():
            (shown if case.word == "KNOWN" else passed).update([case.known] if case.known else [])
    for known in sorted(shown | passed):
        issue = described.get(known)
        yield {
            "id": known,
            "behaviour": issue.behaviour if issue else "not in this harness's list",
            "reason": issue.reason if issue else "",
            "kernels": ", ".join(issue.kernels) or "any" if issue else "",
            "host": (issue.host or "any") if issue else "",
            "expires": str((issue and issue.expires) or ""),
            "shown": shown[known],
            "passed": passed[known],
        }
