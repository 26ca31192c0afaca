"""`nsvm fields`: vmcb12 field by field, what VMRUN and KVM_SET_NESTED_STATE take of it."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import click
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
from harness.fields.known import issue_of
from harness.fields.rows import LOST, Predicted, Row
from harness.fields.table import Line, departures, fields_named, lines
from harness.host.session import Event, Host
from harness.probe.kmsg import splats
from harness.report.verdict import Verdict, exit_status
from harness.runner.hosts import make_host

_TIMEOUT_S: Final = 1800.0
_CELL_TIMEOUT_S: Final = 60.0
_SHOWN: Final = 60
"""Differing cells on the terminal; the JSON has all."""


@click.command("fields")
@click.option("--field", "names", multiple=True, metavar="NAME", help="As save.cr0, cs, control.")
@click.option("--knobs", "words", multiple=True, metavar="SETTING|KNOB=VALUE",
              help="What the model is like; by default by the kernel's release.")  # fmt: skip
@click.option("--all-fields", is_flag=True, help="Show fields too that are always taken.")
@json_option
@host_options
def command(
    names: tuple[str, ...],
    words: tuple[str, ...],
    all_fields: bool,
    json_file: Path | None,
    host: str,
    kernel: str | None,
    modules: Path | None,
) -> None:
    """Try every field of vmcb12: single bits, boundaries, and combinations that mean something.

    Each value is given to VMRUN and to KVM_SET_NESTED_STATE, and compared with what the model of
    this kernel says, and with the manual. Exit status: 0 the kernel does what the model says, 1 it
    does not, or its log has a new warning; 2 the host broke.
    """
    require_writable(json_file)
    wanted = fields_named(names)
    with make_host(host_choice(host, kernel, modules), log=log) as where:
        tried = _Tried(where, words)
        tried.run(wanted)
        report = _report(tried, where)
    deliver(
        json_file,
        report | {"rows": [row.to_json() for row in tried.rows]},
        lambda: _print(report, tried.rows, all_fields),
    )
    sys.exit(exit_status([Verdict(report["verdict"])]))


@dataclass
class _Tried:
    """The rows of all fields that were run, on one host after the other if one dies."""

    host: Host
    words: Sequence[str]
    rows: list[Row] = field(default_factory=list)
    kernel_log: list[str] = field(default_factory=list)
    warned: bool = False
    """The kernel's log has something that is no known issue."""
    seconds: float = 0.0

    @property
    def setting(self) -> Setting:
        """The model's knobs; known once the host has been started."""
        return chosen(self.words, str(self.host.describe()["kernel_release"]))

    def run(self, fields: list[str]) -> None:
        """Run fields; one that kills its host is run again, cell by cell."""
        started = time.monotonic()
        with progress_bar() as progress:
            task = progress.add_task("fields", total=len(fields))
            waiting = list(fields)
            while waiting:
                waiting = self._call(waiting, lambda: progress.advance(task))
                if waiting:
                    log(f"the host was lost in {waiting[0]}: once more, value by value")
                    self._one_by_one(waiting.pop(0))
                    progress.advance(task)
        self.seconds = time.monotonic() - started

    def _call(self, fields: list[str], advance: Any) -> list[str]:
        """Run fields in one call; return those that are left because the host was lost."""
        left = list(fields)

        def on_event(event: Event) -> None:
            if event["event"] == "kmsg":
                self._note(event["text"], left[0] if left else fields[-1])
            elif event["event"] == "emit":
                self.rows += [Row.from_json(row) for row in event["data"]["rows"]]
                left.remove(event["data"]["field"])
                advance()

        try:
            self._run_fields(fields, None, on_event, _TIMEOUT_S)
        except HostLost:
            return left
        return []

    def _one_by_one(self, name: str) -> None:
        target = "harness.fields.calls:cells_here"
        session = self.host.start()
        cells = session.call(target, timeout_s=_CELL_TIMEOUT_S, field=name).unwrap("listing values")
        for cell in cells:
            found: list[Row] = []

            def on_event(event: Event, found: list[Row] = found) -> None:
                if event["event"] == "emit":
                    found += [Row.from_json(row) for row in event["data"]["rows"]]

            try:
                self._run_fields([name], [cell["value"]], on_event, _CELL_TIMEOUT_S)
            except HostLost as e:
                nothing = Predicted("no loss of the host", (), "", ())
                lost = Row(name, cell["value"], cell["changes"], nothing, LOST, str(e), "")
                found = [lost]
            self.rows += found

    def _run_fields(
        self, fields: list[str], only: list[str] | None, on_event: Any, timeout_s: float
    ) -> None:
        session = self.host.start()
        setting = self.setting
        session.call(
            "harness.fields.calls:run_fields",
            timeout_s=timeout_s,
            on_event=on_event,
            fields=fields,
            setting=setting.name,
            turned=dict(setting.turned),
            only=only,
        ).unwrap("trying fields")

    def _note(self, text: str, where: str) -> None:
        if splats([text]):
            # The log comes a little late: the field may be the one before.
            about = {where, self.rows[-1].field if self.rows else where}
            issue = next(filter(None, (issue_of(text, name) for name in about)), None)
            known = f", known: {issue}" if issue else ""
            self.kernel_log.append(f"{text}  (about {where}{known})")
            self.warned |= issue is None


def _report(tried: _Tried, host: Host) -> dict[str, Any]:
    differing = [row for row in tried.rows if row.differences()]
    return {
        "host": host.describe(),
        "setting": str(tried.setting),
        "values": len(tried.rows),
        "fields": [asdict(line) for line in lines(tried.rows)],
        "differences": [{"cell": r.shown(), "how": r.differences()} for r in differing],
        "departures": [asdict(departure) for departure in departures(tried.rows)],
        "kernel_log": tried.kernel_log,
        "seconds": round(tried.seconds, 1),
        "verdict": "FAIL" if differing or tried.warned else "PASS",
    }


def _print(report: dict[str, Any], rows: Sequence[Row], all_fields: bool) -> None:
    console = Console(highlight=False, soft_wrap=True)
    print_host(console, report["host"], 11)
    console.print(f"model      {report['setting']}")
    console.print(_table(lines(rows), all_fields))
    console.print(_LEGEND, soft_wrap=False)
    for departure in report["departures"]:
        values = "; ".join(departure["values"])
        console.print(f"manual     {departure['field']} {departure['how']}: {values}", markup=False)
    for difference in report["differences"][:_SHOWN]:
        console.print(f"DIFFERS    {difference['cell']}", markup=False)
        for how in difference["how"]:
            console.print(f"           {how}", markup=False)
    if (more := len(report["differences"]) - _SHOWN) > 0:
        console.print(f"           and {more} more")
    for line in report["kernel_log"]:
        console.print(f"kernel log {line}", markup=False)
    count = len(report["differences"])
    console.print(
        f"values     {report['values']} of {len(report['fields'])} fields,"
        f" {count} differ from the model, {report['seconds']:.0f} s"
    )
    console.print(f"verdict    {report['verdict']}")


_COLUMNS: Final = (
    ("field", "field"),
    ("values", "values"),
    ("entered", "enter"),
    ("refused", "refuse"),
    ("stopped", "stop"),
    ("taken", "SET ok"),
    ("manual_refuses", "APM no"),
    ("departing", "!APM"),
    ("differing", "!model"),
)
_LEGEND: Final = (
    "enter, refuse, stop: VMRUN entered L2, refused, came to no end; SET ok: KVM_SET_NESTED_STATE"
    " takes it; APM no: the manual says that VMRUN refuses it; !APM, !model: was seen otherwise"
)


def _table(all_lines: Sequence[Line], all_fields: bool) -> Table:
    shown = [line for line in all_lines if all_fields or _says_something(line)]
    hidden = len(all_lines) - len(shown)
    caption = f"{hidden} fields more are always taken" if hidden else None
    table = Table(box=None, padding=(0, 1, 0, 0), caption=caption, caption_justify="left")
    for name, title in _COLUMNS:
        table.add_column(title, justify="left" if name == "field" else "right", no_wrap=True)
    for line in shown:
        table.add_row(*(_cell(getattr(line, name)) for name, _ in _COLUMNS))
    return table


def _says_something(line: Line) -> bool:
    odd = (line.stopped, line.manual_refuses, line.departing, line.differing)
    return any(odd) or not line.values == line.entered == line.taken


def _cell(value: str | int) -> str:
    return str(value) if value else "-"
