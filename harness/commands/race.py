"""`nsvm race`: rewrite vmcb12 while VMRUN reads it, and see whether KVM looks twice."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from harness.commands.options import host_choice, host_options
from harness.commands.output import deliver, json_option, log, print_host, require_writable
from harness.errors import HostLost
from harness.host.session import Event, Host, Session
from harness.probe.kmsg import splats
from harness.race.fields import FIELDS, field_named
from harness.report.verdict import Verdict, exit_status
from harness.runner.hosts import make_host

CPUS = 2
"""Of an emulated host: VMRUN and the writer must run at the same time."""

_SET_UP_S = 300.0
"""For a machine, the attempts without a race, and the last ones with it."""


@click.command("race")
@click.option(
    "--field",
    "names",
    multiple=True,
    metavar="FIELD",
    help=f"One of {', '.join(row.name for row in FIELDS)}; may be given again. By default all.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(0.1, 3600),
    default=10.0,
    show_default=True,
    help="For each field.",
)
@click.option(
    "--by",
    type=click.Choice(["vcpu", "host"]),
    default="vcpu",
    show_default=True,
    help="Who rewrites vmcb12: another vCPU of L1, or a thread of the VM's process.",
)
@click.option("--first", is_flag=True, help="Go on to the next field at the first hit.")
@json_option
@host_options
def command(
    names: tuple[str, ...],
    seconds: float,
    by: str,
    first: bool,
    json_file: Path | None,
    host: str,
    kernel: str | None,
    modules: Path | None,
) -> None:
    """Rewrite a field of vmcb12 while VMRUN reads it, and see whether KVM reads it twice.

    A hit is an attempt in which two parts of one VMRUN saw different values: one that passed the
    checks, and another that was loaded.

    Exit status: 0 what was seen fits the table of kernels (a window that was not hit in the time
    given is no contradiction), 1 a window where the table has none, or a field that is not checked
    at all, 2 a host broke.
    """
    require_writable(json_file)
    if not math.isfinite(seconds):
        raise click.UsageError("--seconds: a finite number, please")
    fields = [field_named(name).name for name in names] or [row.name for row in FIELDS]
    choice = host_choice(host, kernel, modules)
    with make_host(choice, log=log, cpus=CPUS) as where:
        options = {"by": by, "seconds": seconds, "first": first}
        rows = _race_all(where, fields, options)
        report = {"host": where.describe(), "by": by, "seconds_each": seconds, **_sum(rows)}
    deliver(json_file, report, lambda: _print(report))
    sys.exit(exit_status([Verdict(report["verdict"])]))


def _race_all(where: Host, fields: list[str], options: dict[str, Any]) -> list[dict[str, Any]]:
    """Race for one field after the other; a host that is lost is started again for the next."""
    rows: list[dict[str, Any]] = []
    session = where.start()
    for field in fields:
        try:
            rows.append(_race(session, field, options))
        except HostLost as e:
            rows.append(_failed(field, Verdict.ERROR, str(e), []))
            session = where.start()
    return rows


def _race(session: Session, field: str, options: dict[str, Any]) -> dict[str, Any]:
    """Race for one field in a call of its own: what breaks there leaves the others alone."""

    def on_event(event: Event) -> None:
        if event["event"] == "emit" and event["kind"] == "raced":
            data = event["data"]
            log(f"{data['field']}: {data['attempts']} attempts, {data['hits']} hits")

    result = session.call(
        "harness.race.calls:run",
        timeout_s=options["seconds"] + _SET_UP_S,
        on_event=on_event,
        fields=[field],
        **options,
    )
    said = splats(event["text"] for event in result.kmsg)
    for base, verdict in _RAISED.items():
        if result.outcome == "raise" and base in result.error.get("bases", ()):
            return _failed(field, verdict, result.error["message"], said)
    [row] = result.unwrap(f"the race for {field}")
    verdict = Verdict.FAIL if _contradicts(row) or said else Verdict.PASS
    return {**row, "kernel_log": said, "verdict": verdict.value, "says": _says(row)}


def _contradicts(row: dict[str, Any]) -> bool:
    """Tell whether the table of kernels is wrong for this one, or the kernel is."""
    if row["unchecked"]:
        return row["check_by_table"] is True
    return row["window_by_table"] is False and row["hits"] > 0


_RAISED = {"ScenarioFailure": Verdict.FAIL, "HostError": Verdict.ERROR}
"""What a field's race may raise without ending those for the others."""


def _failed(field: str, verdict: Verdict, why: str, said: list[str]) -> dict[str, Any]:
    return {
        "field": field,
        "attempts": 0,
        "hits": 0,
        "hits_per_1000": None,
        "window_by_table": None,
        "first_evidence": None,
        "kernel_log": said,
        "verdict": verdict.value,
        "says": why.partition("\n")[0],
    }


_SAYS = {
    (True, True): "window, as the table says",
    (True, False): "the table says window; not seen in {attempts} attempts",
    (False, True): "WINDOW, and the table says none",
    (False, False): "none, as the table says",
    (None, True): "window; the table does not reach this kernel",
    (None, False): "none seen; the table does not reach this kernel",
}


def _says(row: dict[str, Any]) -> str:
    if row["unchecked"]:
        known = "which the table says" if row["check_by_table"] is False else "NOT IN THE TABLE"
        text = "illegal value without a race is not refused by the checks"
        return f"{text}, {known}: {row['unchecked']}"
    return _SAYS[row["window_by_table"], row["hits"] > 0].format(attempts=row["attempts"])


def _sum(rows: list[dict[str, Any]]) -> dict[str, Any]:
    verdicts = {row["verdict"] for row in rows}
    worst = next(v for v in (Verdict.FAIL, Verdict.ERROR, Verdict.PASS) if v.value in verdicts)
    return {
        "attempts": sum(row["attempts"] for row in rows),
        "hits": sum(row["hits"] for row in rows),
        "fields": {row["field"]: row for row in rows},
        "verdict": worst.value,
    }


def _print(report: dict[str, Any]) -> None:
    console = Console(highlight=False)
    print_host(console, report["host"], 11)
    console.print(f"writer     {report['by']}, {report['seconds_each']:g} s for each field")
    table = Table("field", "attempts", "hits", "per 1000", "")
    for row in report["fields"].values():
        rate = "" if row["hits_per_1000"] is None else f"{row['hits_per_1000']:g}"
        numbers = (str(row["attempts"]), str(row["hits"]), rate)
        table.add_row(row["field"], *numbers, row["says"])
    console.print(table)
    for row in report["fields"].values():
        for line in row["kernel_log"]:
            console.print(f"{row['field']}: kernel log: {line}", markup=False, soft_wrap=True)
        if row["first_evidence"]:
            text = _evidence(row["first_evidence"])
            console.print(f"{row['field']}: {text}", markup=False, soft_wrap=True)
    console.print(f"verdict    {report['verdict']}")


def _evidence(first: dict[str, Any]) -> str:
    return (
        f"attempt {first['attempt']}: legal {first['legal']}, illegal {first['illegal']}:"
        f" {first['proof']}"
    )
