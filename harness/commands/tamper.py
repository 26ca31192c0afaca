"""`nsvm tamper`: the SMRAM state save area, changed cell by cell before RSM."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from harness.commands.options import host_choice, host_options
from harness.commands.output import (
    deliver,
    json_option,
    log,
    print_host,
    progress_bar,
    require_writable,
)
from harness.crosscheck.settings import Setting, chosen
from harness.errors import HostLost
from harness.host.session import CallResult, Event, Host
from harness.model.facts import CpuFacts
from harness.report.verdict import Verdict, exit_status
from harness.runner.hosts import make_host
from harness.runner.known_issues import KnownIssue, find
from harness.runner.known_issues import load as load_known_issues
from harness.tamper.across import Difference, compare
from harness.tamper.cells import Cell
from harness.tamper.rows import Row, lost
from harness.tamper.table import GROUPS, matching

_CELL_S: Final = 20.0
_SHOWN: Final = 60
"""Differing cells on the terminal; the JSON has all."""
_EMULATED: Final = "emulated"


@click.command("tamper")
@click.option("-k", "expression", metavar="TEXT", help="Cells with this in their names.")
@click.option("--kernels", metavar="A,B,...", help="Several, oldest first: where they differ.")
@click.option("--knobs", "words", multiple=True, metavar="SETTING|KNOB=VALUE",
              help="What the model is like; by default by the kernel's release.")  # fmt: skip
@json_option
@host_options
def command(
    expression: str | None,
    kernels: str | None,
    words: tuple[str, ...],
    json_file: Path | None,
    host: str,
    kernel: str | None,
    modules: Path | None,
) -> None:
    """Change the save area, vmcb12 or the host save page in SMM, execute RSM, and see.

    Each cell has a VM of its own, and is compared with what the model of this kernel says. With
    --kernels, what differs between them is told too, with the knob that explains it.

    Exit status: 0 every cell is as the model says or has a known issue, 1 one is not, or the
    kernel's log complains; 2 a host broke that no cell is to blame for.
    """
    require_writable(json_file)
    if kernels and kernel:
        raise click.UsageError("--kernel or --kernels, not both")
    cells = matching(expression)
    wanted = [each.strip() for each in kernels.split(",")] if kernels else [kernel]
    tried = []
    for each in wanted:
        with make_host(host_choice(host, each, modules), log=log) as where:
            tried.append(Tried(where, cells, words))
            tried[-1].run()
    across = [
        (one.release, other.release, _compare(cells, one, other)) for one, other in pairwise(tried)
    ]
    deliver(json_file, _plain(tried, across), lambda: _print(tried, across))
    sys.exit(exit_status([each.verdict for each in tried]))


@dataclass
class Tried:
    """The cells on one kernel, on one host after the other if one dies."""

    host: Host
    cells: Sequence[Cell]
    words: Sequence[str] = ()
    rows: dict[str, Row] = field(default_factory=dict)
    facts: CpuFacts = field(default_factory=CpuFacts)
    described: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    _begun: str = ""

    @property
    def release(self) -> str:
        """The kernel's release."""
        return str(self.described["kernel_release"])

    @property
    def setting(self) -> Setting:
        """The model's knobs."""
        return chosen(self.words, self.release)

    @property
    def differing(self) -> list[Row]:
        """The rows that are not as the model says."""
        return [row for row in self.rows.values() if row.differs]

    @property
    def issues(self) -> dict[str, KnownIssue]:
        """The known issues of differing rows, by the rows' names."""
        issues = load_known_issues()
        ids = {row.name: f"nsvm tamper: {row.name}" for row in self.differing}
        found = {name: find(issues, id_, self.release, self.host.kind) for name, id_ in ids.items()}
        return {name: issue for name, issue in found.items() if issue is not None}

    @property
    def verdict(self) -> Verdict:
        """FAIL for any difference that is no known issue."""
        known = self.issues
        return Verdict.FAIL if any(r.name not in known for r in self.differing) else Verdict.PASS

    def run(self) -> None:
        """Run all cells; one that takes the host with it is noted, and the next ones are run."""
        started = time.monotonic()
        with progress_bar() as progress:
            task = progress.add_task("cells", total=len(self.cells))
            while waiting := [cell for cell in self.cells if cell.name not in self.rows]:
                self._call(waiting)
                progress.update(task, completed=len(self.rows))
        self.seconds = time.monotonic() - started

    def _call(self, waiting: Sequence[Cell]) -> None:
        session = self.host.start()
        self._begun = ""
        try:
            self.described = self.host.describe()
            facts = session.call("harness.tamper.calls:facts", timeout_s=60.0)
            self.facts = CpuFacts(**facts.unwrap("reading the CPU's features"))
            setting = self.setting
            result = session.call(
                "harness.tamper.calls:run_cells",
                timeout_s=60.0 + _CELL_S * len(waiting),
                on_event=self._on_event,
                names=[cell.name for cell in waiting],
                setting=setting.name,
                turned=dict(setting.turned),
                emulated=self.host.kind == _EMULATED,
            )
        except HostLost as e:
            self._lost(str(e))
            return
        self._ended(result)

    def _on_event(self, event: Event) -> None:
        if event["event"] != "emit":
            return
        if event["kind"] == "begins":
            self._begun = event["data"]["name"]
        elif event["kind"] == "row":
            row = Row.from_json(event["data"])
            self.rows[row.name] = row

    def _ended(self, result: CallResult) -> None:
        if result.outcome in ("stuck", "timeout") and self._is_at_cell():
            self._lost(f"the process was {result.outcome}")
        else:
            result.unwrap("tampering")

    def _is_at_cell(self) -> bool:
        return bool(self._begun) and self._begun not in self.rows

    def _lost(self, why: str) -> None:
        if not self._is_at_cell():
            raise HostLost(f"the host was lost between cells: {why}")
        cell = next(cell for cell in self.cells if cell.name == self._begun)
        self.rows[cell.name] = lost(cell.name, cell.group, why)


def _compare(cells: Sequence[Cell], one: Tried, other: Tried) -> list[Difference]:
    by_name = {cell.name: cell for cell in cells}
    knobs = (one.setting.knobs(), other.setting.knobs())
    return compare(by_name, one.rows, other.rows, knobs, (one.facts, other.facts))


Across = Sequence[tuple[str, str, list[Difference]]]


def _plain(tried: Sequence[Tried], across: Across) -> dict[str, Any]:
    return {
        "kernels": [
            {
                "host": each.described,
                "setting": str(each.setting),
                "cpu": vars(each.facts),
                "verdict": each.verdict.value,
                "seconds": round(each.seconds, 1),
                "known": {name: issue.id for name, issue in each.issues.items()},
                "rows": [row.to_json() for row in each.rows.values()],
            }
            for each in tried
        ],
        "across": [
            {"from": one, "to": other, "cells": [each.to_json() for each in found]}
            for one, other, found in across
        ],
    }


def _print(tried: Sequence[Tried], across: Across) -> None:
    console = Console(highlight=False, soft_wrap=True)
    for each in tried:
        _print_one(console, each)
    for one, other, found in across:
        _print_across(console, one, other, found)


def _print_one(console: Console, tried: Tried) -> None:
    print_host(console, tried.described, 11)
    console.print(f"model      {tried.setting}")
    console.print(_table(list(tried.rows.values())))
    known = tried.issues
    unknown = [row for row in tried.differing if row.name not in known]
    for row in unknown[:_SHOWN]:
        console.print(f"DIFFERS    {row.name}: {row.outcome}, not {row.predicted}", markup=False)
        for how in row.how():
            console.print(f"           {how}", markup=False)
    if (more := len(unknown) - _SHOWN) > 0:
        console.print(f"           and {more} more")
    for name, issue in known.items():
        console.print(f"known      {name}: {issue.id}", markup=False)
    for issue in {issue.id: issue for issue in known.values()}.values():
        console.print(f"           {issue.id}: {issue.behaviour}", markup=False)
    counts = f"{len(tried.rows)}, {len(unknown)} differ, {len(known)} known"
    console.print(f"cells      {counts}, {tried.seconds:.0f} s")
    console.print(f"verdict    {tried.verdict.value}")


def _table(rows: Sequence[Row]) -> Table:
    outcomes = [word for word, _ in Counter(_column(row.outcome) for row in rows).most_common()]
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("group", no_wrap=True)
    for title in (*outcomes, "cells", "!model"):
        table.add_column(title, justify="right")
    for group in GROUPS:
        own = [row for row in rows if row.group == group]
        if own:
            counts = Counter(_column(row.outcome) for row in own)
            differing = sum(row.differs for row in own)
            numbers = (*(counts[word] for word in outcomes), len(own), differing)
            table.add_row(group, *(str(number) if number else "-" for number in numbers))
    return table


def _column(outcome: str) -> str:
    """Return an outcome as the table counts it: exceptions of L1 and L2 together."""
    where, _, how = outcome.partition(": ")
    return f"{where}: exception" if how.startswith("#") else outcome


def _print_across(console: Console, one: str, other: str, found: list[Difference]) -> None:
    console.print(f"\n{one} -> {other}: {len(found)} cells differ")
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for title in ("cell", one, other, "knob"):
        table.add_column(title)
    for each in found:
        where = "" if each.one != each.other else f"{', '.join(each.what[:2])}"
        knobs = "; ".join(each.knobs) or "NOT EXPLAINED"
        table.add_row(each.cell, each.one, f"{each.other} {where}".rstrip(), knobs)
    console.print(table)
