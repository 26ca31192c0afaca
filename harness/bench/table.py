"""Shows a report: as a table for people, as JSON for programs."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from harness.bench.ratios import Comparison
from harness.bench.suite import Report

FORMAT = 1
"""Of the JSON report; changes when a reader would have to."""


def as_json(report: Report, seconds: float) -> dict[str, Any]:
    """Return the report as plain data."""
    return {
        "format": FORMAT,
        "hosts": report.hosts,
        "benchmarks": [row.as_json() for row in report.rows],
        "skipped": report.skipped,
        "errors": report.errors,
        "seconds": round(seconds, 1),
    }


def share_text(value: float) -> str:
    """Return a share with the digits that mean something."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def time_text(microseconds: float) -> str:
    """Return a time in the unit that suits it."""
    if microseconds < 1000:
        return f"{microseconds:.2f} us"
    if microseconds < 1_000_000:
        return f"{microseconds / 1000:.2f} ms"
    return f"{microseconds / 1_000_000:.2f} s"


def rate_text(microseconds: float) -> str:
    """Return how often per second something happens that takes so long."""
    rate = 1e6 / microseconds
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def _spread_text(row: Comparison) -> str:
    low, high = row.spread
    return f"{share_text(low)}..{share_text(high)}"


def _new_table(title: str, columns: tuple[str, ...]) -> Table:
    name, share, spread, *times = columns
    found = Table(title=title, title_justify="left")
    found.add_column(name, no_wrap=True)
    found.add_column(share, justify="right", no_wrap=True)
    found.add_column(spread, justify="right", no_wrap=True)
    for column in times:
        found.add_column(column, justify="right", no_wrap=True, style="dim")
    return found


def speed_table(host: str, against: str, rows: list[Comparison]) -> Table:
    """Return a table of shares of a counterpart's speed; they and their spread are what counts."""
    title = f"{host} host: speed as a share of that of {against}"
    found = _new_table(title, ("benchmark", "share", "min..max", "harness", against))
    for row in rows:
        found.add_row(
            row.name,
            share_text(row.share),
            _spread_text(row),
            time_text(row.ours_us),
            time_text(row.theirs_us),
        )
    _add_notes(found, rows)
    return found


def rate_table(host: str, rows: list[Comparison]) -> Table:
    """Return a table of rows that each have a counterpart of their own, with rounds per second."""
    units = " and ".join(dict.fromkeys(row.unit for row in rows))
    title = f"{host} host: {units} per second, as a share of another rate"
    found = _new_table(title, ("benchmark", "share", "min..max", "per s", "against", "its per s"))
    for row in rows:
        found.add_row(
            row.name,
            share_text(row.share),
            _spread_text(row),
            rate_text(row.ours_us),
            row.against,
            rate_text(row.theirs_us),
        )
    _add_notes(found, rows)
    return found


def _add_notes(table: Table, rows: list[Comparison]) -> None:
    """Put the rows' notes below a table, each once."""
    names: dict[str, list[str]] = {}
    for row in rows:
        if row.note:
            names.setdefault(row.note, []).append(row.name)
    table.caption = "\n".join(f"{', '.join(found)}: {note}" for note, found in names.items())
    table.caption_justify = "left"


def parts_table(host: str, whole: str, rows: list[Comparison]) -> Table:
    """Return a table of where the time of a whole goes."""
    found = _new_table(f"{host} host: shares of {whole}", ("part", "share", "min..max", "time"))
    for row in rows:
        found.add_row(row.name, share_text(row.share), _spread_text(row), time_text(row.theirs_us))
    return found


def tables(rows: list[Comparison]) -> list[Table]:
    """Return a table for each host and counterpart, and one of rates, in the order of the rows."""
    groups: dict[tuple[str, str | None], list[Comparison]] = {}
    for row in rows:
        groups.setdefault((row.host, None if row.unit else row.against), []).append(row)
    return [_table(host, against, group) for (host, against), group in groups.items()]


def _table(host: str, against: str | None, rows: list[Comparison]) -> Table:
    if against is None:
        return rate_table(host, rows)
    return (parts_table if rows[0].is_part else speed_table)(host, against, rows)


def _skipped_lines(skipped: list[dict[str, str]]) -> list[str]:
    """Return a line for each host and reason."""
    names: dict[tuple[str, str], list[str]] = {}
    for one in skipped:
        names.setdefault((one["host"], one["reason"]), []).append(one["name"])
    return [
        f"skipped: {', '.join(found)} on {host}: {reason}"
        for (host, reason), found in names.items()
    ]


def show(report: Report, console: Console) -> None:
    """Print the report."""
    for host in report.hosts:
        line = f"{host['kind']}: kernel {host['kernel_release']}, {host['silicon']}"
        console.print(escape(line), soft_wrap=True)
    for found in tables(report.rows):
        console.print(found)
    for line in _skipped_lines(report.skipped):
        console.print(escape(line), soft_wrap=True)
    for error in report.errors:
        console.print(f"[red]error:[/red] {escape(error)}", soft_wrap=True)
