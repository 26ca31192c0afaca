"""`nsvm smi`: storms of SMIs into machines whose nested guests are at work."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from harness.commands.options import host_choice, host_options
from harness.commands.output import deliver, json_option, log, require_writable
from harness.commands.storms import storm
from harness.report.verdict import Verdict, exit_status
from harness.runner.hosts import make_host

_TARGET = "harness.storm.calls:storm_of_smis"
_PER_SMI_S = 5.0


@click.command("smi")
@click.option("--storm", "smis", type=click.IntRange(1), metavar="N", help="Send N SMIs.")
@click.option("--levels", type=click.IntRange(1, 3), default=2, show_default=True)
@click.option("--shadow", is_flag=True, help="Shadow paging for L2 and L3; else nested paging.")
@click.option("--save-area", is_flag=True, help="Check every save area against what it is of.")
@click.option("--seed", type=int, default=0, show_default=True)
@json_option
@host_options
def command(
    smis: int | None,
    levels: int,
    shadow: bool,
    save_area: bool,
    seed: int,
    json_file: Path | None,
    host: str,
    kernel: str | None,
    modules: Path | None,
) -> None:
    """Send SMIs to a machine whose nested guests are at work, and compare it with a calm twin.

    They come at random times: by KVM_SMI, by an interrupt message while the vCPU runs, and from the
    guest itself.

    Exit status: 0 nothing diverged, 1 something did, 2 a host broke.
    """
    require_writable(json_file)
    if smis is None:
        raise click.UsageError("--storm N, please")
    options = {"levels": levels, "npt": not shadow, "save_area": save_area, "seed": seed}
    with make_host(host_choice(host, kernel, modules), log=log) as where:
        report = storm(where, _TARGET, smis, "SMIs", "smi", _PER_SMI_S, **options)
    deliver(json_file, report, lambda: _print(report))
    sys.exit(exit_status([Verdict(report["verdict"])]))


def _print(report: dict[str, Any]) -> None:
    console = Console(highlight=False)
    host = report["host"]
    console.print(f"host         {host['kind']}, {host['kernel_release']}", markup=False)
    for splat in report["kernel_log"]:
        console.print(f"kernel       {splat}", markup=False, soft_wrap=True)
    if "why" in report:
        console.print(report["why"], markup=False, soft_wrap=True)
    else:
        _print_numbers(console, report)
    console.print(f"verdict      {report['verdict']}")


def _print_numbers(console: Console, report: dict[str, Any]) -> None:
    paging = "nested" if report["nested_paging"] else "shadow"
    console.print(
        f"storm        {report['smis']} SMIs, L{report['levels']}, {paging} paging, "
        f"{report['steps']} steps, seed {report['seed']}, {report['seconds']:.0f} s"
    )
    for title, counts in (("interrupted", report["hit"]), ("sent by", report["sources"])):
        shown = ", ".join(f"{name or 'nobody'} {count}" for name, count in counts.items())
        console.print(f"{title:<13}{shown}")
    if report["save_areas_checked"]:
        checked, wrong = report["save_areas_checked"], report["implausible_save_areas"]
        console.print(f"save areas   {checked} checked, {wrong} implausible")
    console.print(f"divergences  {report['divergences']}")
    for text in (*report["first_divergences"], *report["first_implausible"]):
        console.print(f"  {text}", markup=False, soft_wrap=True)
    table = Table("", *report["latency_s"], title="latency, ms", title_justify="left")
    table.add_row("SMI", *(f"{1000 * value:.1f}" for value in report["latency_s"].values()))
    console.print(table)
