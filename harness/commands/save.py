"""`nsvm save`: a machine with nested guests in a file."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from harness.commands.options import host_choice, host_options
from harness.commands.output import log, require_writable
from harness.errors import HostError
from harness.runner.hosts import make_host
from harness.storm.calls import unpack
from harness.storm.places import PLACES

_TIMEOUT_S = 300.0


@click.command("save")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--place",
    type=click.Choice(list(PLACES)),
    default="l2-npt",
    show_default=True,
    metavar="PLACE",
    help="Where the machine is stopped: " + ", ".join(PLACES) + ".",
)
@host_options
def command(file: Path, place: str, host: str, kernel: str | None, modules: Path | None) -> None:
    """Bring a machine to a place, and save it to FILE; `nsvm load` and `nsvm inspect` read it.

    What its twin sees that goes on is in the file, too, for `nsvm load` to compare with.
    """
    require_writable(file)
    choice = host_choice(host, kernel, modules)
    with make_host(choice, log=log) as where:
        result = where.start().call(
            "harness.storm.calls:depart_from", timeout_s=_TIMEOUT_S, place=place
        )
        saved = result.unwrap(f"saving a machine at {place}")
        release = where.describe()["kernel_release"]
    data = unpack(saved["stream"])
    try:
        file.write_bytes(data)
    except OSError as e:
        raise HostError(f"cannot write {file}: {e.strerror}") from e
    click.echo(f"{file}: {PLACES[place].what}, saved on {release}")
    click.echo(f"{saved['pages']} pages, {len(data)} bytes")
    for note in saved["notes"]:
        click.echo(f"not given: {note}")
    sys.exit(0)
