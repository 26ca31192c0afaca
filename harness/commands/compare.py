"""`nsvm compare`: which cases ended differently in several runs, on several kernels for example."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from harness.commands.options import expression_option
from harness.commands.output import wide_console
from harness.report.comparison import Cell, Comparison, Row, RunResults, compare, read_run, titles
from harness.report.verdict import Verdict
from harness.runner.expression import matcher
from harness.runner.known_issues import load as load_known_issues


@click.command("compare")
@click.argument("directories", nargs=-1, type=click.Path(path_type=Path), metavar="RESULTS_DIR...")
@expression_option()
def command(directories: tuple[Path, ...], expression: str) -> None:
    """Compare the results of two runs or more: the cases that ended differently, and why.

    That is another verdict, or a failure of another signature: another first line of its reason,
    without what changes every time (CPU, PID, line numbers, offsets, pointers, durations).

    RESULTS_DIR is what `nsvm run --results` was given. A star marks a FAIL that is a known issue.

    Exit status: 0 whatever differs, 2 a directory without results.
    """
    if len(directories) < 2:
        raise click.UsageError("two directories at least, please")
    wanted = matcher(expression)
    runs = [read_run(directory) for directory in directories]
    found = compare(runs, wanted)
    console = wide_console()
    if found.rows:
        console.print(_table(found, titles(runs)))
        _print_reasons(console, found.rows, titles(runs))
    _print_counts(console, found, runs, wanted)


def _table(found: Comparison, names: Sequence[str]) -> Table:
    table = Table("case", *names)
    for row in found.rows:
        table.add_row(Text(row.case), *("-" if cell is None else str(cell) for cell in row.cells))
    return table


def _print_reasons(console: Console, rows: Sequence[Row], names: Sequence[str]) -> None:
    """Print every known issue once, with what it is about, and each other reason by itself."""
    issues = {issue.id: issue for issue in load_known_issues()}
    told: set[str] = set()
    for row in rows:
        for name, cell in zip(names, row.cells, strict=True):
            if cell is None or cell.verdict is Verdict.PASS:
                continue
            if cell.known in issues and cell.verdict is Verdict.FAIL:
                if cell.known not in told:
                    told.add(cell.known)
                    issue = issues[cell.known]
                    _say(console, f"* {issue.id}: {issue.behaviour}. {issue.reason}.")
            else:
                _say(console, f"{row.case} on {name}: {_shown(cell)}")


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)


def _shown(cell: Cell) -> str:
    known = f" (known: {cell.known})" if cell.known else ""
    return f"{cell.verdict.value}{known}: {cell.reason.partition(chr(10))[0]}"


def _print_counts(
    console: Console, found: Comparison, runs: Sequence[RunResults], wanted: Callable[[str], bool]
) -> None:
    for name, run in zip(titles(runs), runs, strict=True):
        cells = [cell for case, cell in run.cells.items() if wanted(case)]
        counts = {verdict: sum(cell.verdict is verdict for cell in cells) for verdict in Verdict}
        known = sum(cell.verdict is Verdict.FAIL and bool(cell.known) for cell in cells)
        shown = [f"{count} {verdict.value}" for verdict, count in counts.items() if count]
        if known:
            shown.append(f"{known} of the FAILs known")
        _say(console, f"{name}: {', '.join(shown) or 'no case'}")
    partly = f", {found.partial} not in all runs" if found.partial else ""
    alike = f" ({found.same_failures} of them the same failure)" if found.same_failures else ""
    _say(console, f"{len(found.rows)} cases differ, {found.same} are the same{alike}{partly}")
