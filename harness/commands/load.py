"""`nsvm load`: a saved machine goes on."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from harness.commands.options import host_choice, host_options
from harness.commands.output import deliver, json_option, log, require_writable
from harness.errors import HostError
from harness.migrate.orders import NAMED
from harness.report.verdict import Verdict, exit_status
from harness.runner.hosts import make_host
from harness.storm.calls import pack

_TIMEOUT_S = 300.0
_SHOWN = 12


@click.command("load")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--order",
    type=click.Choice(list(NAMED)),
    default="default",
    show_default=True,
    help="In which the parts of a vCPU are restored.",
)
@json_option
@host_options
def command(
    file: Path,
    order: str,
    json_file: Path | None,
    host: str,
    kernel: str | None,
    modules: Path | None,
) -> None:
    """Load the machine of FILE, let it go on, and compare what it sees with its twin.

    Exit status: 0 it goes on as its twin did, 1 it differs or is refused, 2 the file is malformed
    or the host broke.
    """
    require_writable(json_file)
    try:
        data = file.read_bytes()
    except OSError as e:
        raise HostError(f"cannot read {file}: {e.strerror}") from e
    choice = host_choice(host, kernel, modules)
    with make_host(choice, log=log) as where:
        result = where.start().call(
            "harness.storm.calls:arrive_at", timeout_s=_TIMEOUT_S, stream=pack(data), order=order
        )
        if result.outcome == "raise" and "StreamError" in result.error.get("bases", ()):
            raise HostError(f"{file}: {result.error['message']}")
        row: dict[str, Any] = result.unwrap(f"loading {file}")
        row["kernel"] = where.describe()["kernel_release"]
    deliver(json_file, row, lambda: _print(row))
    sys.exit(exit_status([Verdict.PASS if row["verdict"] == "works" else Verdict.FAIL]))


def _print(row: dict[str, Any]) -> None:
    click.echo(f"saved on {row.get('source', 'another kernel')}, loaded on {row['kernel']}")
    for note in row.get("notes", ()):
        click.echo(f"  {note}")
    changed = row.get("changed", ())
    for difference in changed[:_SHOWN]:
        click.echo(f"  changed: {difference}")
    if len(changed) > _SHOWN:
        click.echo(f"  and {row['changed_count'] - _SHOWN} more")
    for line in row.get("seen", ()):
        click.echo(f"  saw: {line}")
    click.echo(f"{row['verdict']}{': ' if row['why'] else ''}{row['why']}")
