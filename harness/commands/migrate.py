"""`nsvm migrate`: storms of migrations, and which kernels take each other's machines."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import click
from rich.console import Console
from rich.table import Table

from harness.commands.options import host_choice, host_options
from harness.commands.output import log, require_writable, write_json
from harness.commands.storms import storm
from harness.network.shape import LinkShape
from harness.network.wire import best_shaper
from harness.report.verdict import Verdict, exit_status
from harness.runner import matrix as kernels_matrix
from harness.runner.hosts import HostChoice, make_host
from harness.runner.known_issues import load as load_known_issues
from harness.storm.places import PLACES

_TARGET = "harness.storm.calls:storm"
_PER_MOVE_S = 30.0
_MARKS = {"works": "works", "refused": "refused", "differs": "DIFFERS", "no twin": "no twin"}
_KNOWN = "known"


@click.command("migrate")
@click.option("--storm", "moves", type=click.IntRange(1), metavar="N", help="Move N times.")
@click.option("--matrix", "specs", metavar="HOSTS", help="As 5.10,6.1,ssh:NAME: each to each.")
@click.option("--from", "source", metavar="HOST", help="One way, live: as 6.1, local or ssh:NAME.")
@click.option("--to", "target", metavar="HOST", help="With --from.")
@click.option("--levels", type=click.IntRange(1, 5), default=2, show_default=True)
@click.option("--shadow", is_flag=True, help="Shadow paging for L2 and L3; else nested paging.")
@click.option("--tracking", type=click.Choice(["log", "ring"]), default="log", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--places", metavar="PLACES", help="Of the table; by default all.")
@click.option("--live", is_flag=True, help="The table: between two hosts that run, too.")
@click.option("--link", metavar="LINK", help="With --live: as rate=10mbit,delay=20ms,loss=1%.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="'-' is stdout.")
@host_options
def command(
    moves: int | None,
    specs: str | None,
    source: str | None,
    target: str | None,
    levels: int,
    shadow: bool,
    tracking: str,
    seed: int,
    places: str | None,
    live: bool,
    link: str | None,
    json_file: Path | None,
    host: str,
    kernel: str | None,
    modules: Path | None,
) -> None:
    """Migrate machines while their nested guests are at work.

    --storm hands one machine to and fro between two processes of a host, beside a twin that stays.
    --matrix saves machines on each host and loads them on each. --from and --to send them live from
    one host to another one. A HOST is a kernel for an emulated one, this machine (local), or
    ssh:NAME, a machine of the lab.

    Exit status: 0 nothing diverged, 1 something did (in the table: a machine differs afterwards,
    for no known issue; a refusal is an answer), 2 a host broke.
    """
    require_writable(json_file)
    if [moves, specs, source].count(None) != 2:
        raise click.UsageError("one of --storm, --matrix and --from, please")
    if (source is None) != (target is None):
        raise click.UsageError("--from and --to go together")
    if link is not None and source is None and (specs is None or not live):
        raise click.UsageError("--link goes with --from, or with --matrix and --live")
    shape = None if link is None else LinkShape.parse(link)
    choice = host_choice(host, kernel, modules)
    if source is not None and target is not None:
        report = _matrix(
            [source, target], places, shape, choice, files=False, live=(source, target)
        )
        verdict = _matrix_verdict(report["rows"])
        show = _print_matrix
    elif specs is not None:
        hosts = [spec.strip() for spec in specs.split(",")]
        report = _matrix(hosts, places, shape, choice, live="all" if live else None)
        verdict = _matrix_verdict(report["rows"])
        show = _print_matrix
    elif moves is not None:
        options = {"levels": levels, "npt": not shadow, "tracking": tracking, "seed": seed}
        with make_host(choice, log=log) as where:
            report = storm(where, _TARGET, moves, "moves", "moved", _PER_MOVE_S, **options)
        verdict = Verdict(report["verdict"])
        show = _print_storm
    if json_file is not None:
        write_json(json_file, report)
    if json_file is None or str(json_file) != "-":
        show(report)
    sys.exit(exit_status([verdict]))


# Storms


def _print_storm(report: dict[str, Any]) -> None:
    console = Console(highlight=False)
    host = report["host"]
    console.print(f"kernel       {host['kernel_release']}  ({host['kernel_origin']})")
    console.print(f"host         {host['kind']}: {host['silicon']}")
    for line in report["kernel_log"]:
        console.print(f"kernel log   {line}", markup=False)
    if "moves" in report:
        paging = "nested" if report["nested_paging"] else "shadow"
        console.print(
            f"moves        {report['moves']} with L{report['levels']} at work, {paging} paging,"
            f" dirty {report['tracking']}, {report['seconds']:.0f} s"
        )
        console.print(
            f"stopped      {report['in_guest_mode']} times in guest mode,"
            f" {report['run_pending']} of them between VMRUN and its entry"
        )
        console.print(f"steps        {report['steps']}, divergences {report['divergences']}")
        for how in report["first_divergences"]:
            console.print(f"  {how}", markup=False)
        table = Table("", *report["downtime_s"], title=None)
        table.add_row("downtime, ms", *(f"{1e3 * v:.1f}" for v in report["downtime_s"].values()))
        table.add_row("KiB", *(f"{v / 1024:.0f}" for v in report["bytes"].values()))
        console.print(table)
    else:
        console.print(report["why"], markup=False)
    console.print(f"verdict      {report['verdict']}")


# The table


def _matrix(
    specs: Sequence[str],
    places: str | None,
    link: LinkShape | None,
    choice: HostChoice,
    *,
    files: bool = True,
    live: tuple[str, str] | Literal["all"] | None = None,
) -> dict[str, Any]:
    """Return the table of all hosts; `live` is the one way that is taken live, or all."""
    if len(set(specs)) < len(specs):
        raise click.UsageError(f"{', '.join(specs)}: each host once, please")
    wanted = _chosen(places)
    how = None if link is None else {"shape": str(link), "shaper": best_shaper().value}
    started = time.monotonic()
    with kernels_matrix.Kernels(specs, log, choice) as kernels:
        rows = kernels_matrix.by_file(kernels, wanted, _tell) if files else []
        if live is not None:
            ways = None if live == "all" else [live]
            rows += kernels_matrix.live(kernels, wanted, _tell, link, ways)
        return {
            "kernels": {spec: kernels.release(spec) for spec in kernels.specs},
            "hosts": kernels.describe(),
            "places": {name: PLACES[name].what for name in wanted},
            "rows": rows,
            "link": how,
            "seconds": round(time.monotonic() - started, 1),
        }


def _chosen(places: str | None) -> list[str]:
    names = [name.strip() for name in places.split(",")] if places else list(PLACES)
    for name in names:
        if name not in PLACES:
            raise click.UsageError(f"no place is called {name}; there are {', '.join(PLACES)}")
    return names


def _tell(row: kernels_matrix.Row) -> None:
    if row["verdict"] != "works":
        log(_said(row))


def _matrix_verdict(rows: Sequence[kernels_matrix.Row]) -> Verdict:
    verdicts = {row["verdict"] for row in rows}
    if verdicts - set(_MARKS):
        return Verdict.ERROR
    differing = [row for row in rows if row["verdict"] == "differs"]
    return Verdict.FAIL if any("issue" not in row for row in differing) else Verdict.PASS


def _print_matrix(report: dict[str, Any]) -> None:
    console = Console(highlight=False)
    specs = list(report["kernels"])
    for way in dict.fromkeys(row["way"] for row in report["rows"]):
        table = Table("place", "from \\ to", *specs, title=f"by {way}", title_justify="left")
        for place, what in report["places"].items():
            for source in specs:
                marks = [_mark(report["rows"], way, place, source, target) for target in specs]
                table.add_row(what if source == specs[0] else "", source, *marks)
            table.add_section()
        console.print(table)
    for row in report["rows"]:
        if row["verdict"] != "works":
            console.print(_said(row), markup=False, soft_wrap=True)
    for line in _issue_lines(report["rows"]):
        console.print(line, markup=False, soft_wrap=True)
    counts = ", ".join(f"{n} {verdict}" for verdict, n in kernels_matrix.verdicts(report["rows"]))
    known = sum("issue" in row for row in report["rows"])
    console.print(
        f"{counts}{f', {known} of them known' if known else ''} in {report['seconds']:.0f} s"
    )
    if report["link"] is not None:
        console.print(
            f"live over {report['link']['shape']}, by {report['link']['shaper']}", soft_wrap=True
        )


def _said(row: kernels_matrix.Row) -> str:
    """Return a row in words; of the reason its first line, all of it is in the JSON."""
    way = f"{row['from']} to {row.get('to', '-')} by {row['way']}"
    known = f" (known: {row['issue']})" if "issue" in row else ""
    return f"{row['place']}, {way}: {row['verdict']}{known}: {row['why'].partition(chr(10))[0]}"


def _issue_lines(rows: Sequence[kernels_matrix.Row]) -> list[str]:
    """Return a line for each known issue that showed: what the kernel does, and why."""
    shown = {row["issue"] for row in rows if "issue" in row}
    return [
        f"* {issue.id}: {issue.behaviour}. {issue.reason}."
        for issue in load_known_issues()
        if issue.id in shown
    ]


def _mark(
    rows: Sequence[kernels_matrix.Row], way: str, place: str, source: str, target: str
) -> str:
    key = (way, place, source, target)
    for row in rows:
        if (row["way"], row["place"], row["from"], row.get("to")) == key:
            mark = _KNOWN if "issue" in row else str(_MARKS.get(row["verdict"], row["verdict"]))
            return mark + (" *" if row.get("changed_count") else "")
    return ""
