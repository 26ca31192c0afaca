"""`nsvm doctor`: what this machine can do."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import click

from harness.commands.options import host_choice, host_options
from harness.doctor import collect, collect_inside, render
from harness.runner.hosts import make_host

STATUS_NO_HOST = 2


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
@host_options
def command(as_json: bool, host: str, kernel: str | None, modules: Path | None) -> None:
    """Say what this machine can do, and how to mend what it cannot.

    With --host or --kernel, that host is started too, and asked what scenarios will ask there.

    Exit status: 0 if nested scenarios can run here, on this machine's own KVM or on an emulated
    host; 2 if on neither.
    """
    choice = host_choice(host, kernel, modules)
    report = collect()
    if host != "auto" or kernel:
        log = lambda text: click.echo(f"nsvm: {text}", err=True)  # noqa: E731
        with make_host(choice, log=log) as started:
            report = replace(report, inside=collect_inside(started))
    if as_json:
        click.echo(report.to_json())
    else:
        render(report)
    if not report.usable:
        sys.exit(STATUS_NO_HOST)
