"""`nsvm doctor`: what this machine can do."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import click

from harness.commands.options import host_choice, host_options
from harness.commands.output import log
from harness.doctor import Inside, collect, collect_inside, render
from harness.errors import HostError
from harness.facts import Answer
from harness.runner.hosts import HostChoice, make_host

STATUS_NO_HOST = 2


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
@host_options
def command(as_json: bool, host: str, kernel: str | None, modules: Path | None) -> None:
    """Say what this machine can do, and how to mend what it cannot.

    With --host emulated, ssh:NAME or --kernel, that host is started too, and asked what scenarios
    will ask there.

    Exit status: 0 if nested scenarios can run here, on this machine's own KVM or on an emulated
    host; 2 if on neither.
    """
    choice = host_choice(host, kernel, modules)
    report = collect()
    if choice.host not in ("auto", "local") or choice.kernel:
        report = replace(report, inside=_ask_inside(choice))
    if as_json:
        click.echo(report.to_json())
    else:
        render(report)
    if not report.usable:
        sys.exit(STATUS_NO_HOST)


def _ask_inside(choice: HostChoice) -> Inside:
    """Return the host's answers, or as the only one why it did not start."""
    try:
        with make_host(choice, log=log) as host:
            return collect_inside(host)
    except HostError as e:
        return Inside(f"{choice.resolved()} host", (Answer("start", None, str(e)),))
