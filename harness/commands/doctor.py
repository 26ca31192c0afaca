"""`nsvm doctor`: what this machine can do."""

from __future__ import annotations

import sys

import click

from harness.doctor import collect, render

STATUS_NO_HOST = 2


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def command(as_json: bool) -> None:
    """Say what this machine can do, and how to mend what it cannot.

    Exit status: 0 if nested scenarios can run here, on this machine's own KVM or on an emulated
    host; 2 if on neither.
    """
    report = collect()
    if as_json:
        click.echo(report.to_json())
    else:
        render(report)
    if not report.usable:
        sys.exit(STATUS_NO_HOST)
