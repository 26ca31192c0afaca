"""`nsvm receive`: take a machine that `nsvm send` sends, and let it go on here."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from harness.commands.output import require_writable, write_json
from harness.commands.peers import Tcp, listening_address, local_kvm
from harness.migrate import live
from harness.migrate.connections import Listener, listen_tcp, listen_unix, standard_streams
from harness.migrate.errors import Refused
from harness.migrate.links import Link
from harness.report.verdict import Verdict, exit_status
from harness.storm.travel import settle

_SHOWN = 12


@click.command("receive")
@click.option("--listen", metavar="ADDRESS", help="tcp:PORT, tcp:HOST:PORT or unix:PATH.")
@click.option(
    "--wait",
    "wait_s",
    type=click.FloatRange(0.1, 86400.0),
    default=300.0,
    show_default=True,
    help="With --listen: how many seconds for somebody to connect.",
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="'-' is stdout.")
def command(listen: str | None, wait_s: float, json_file: Path | None) -> None:
    """Take one machine on this machine's /dev/kvm, let it go on, and compare it with its twin.

    The machine comes on standard input, and standard output answers (`nsvm send PLACE --to 'ssh
    HOST nsvm receive'`), or over --listen. Whoever can connect can send one: tcp:PORT listens on
    127.0.0.1 only, tcp:0.0.0.0:PORT everywhere. How it went is said on standard error.

    Exit status: 0 it goes on as its twin did, 1 it differs or is refused, 2 the link or this host
    broke.
    """
    require_writable(json_file)
    if listen is None and str(json_file) == "-":
        raise click.UsageError("--json - needs --listen: standard output is the link")
    if listen is None and os.isatty(0):
        raise click.UsageError("standard input is a terminal: --listen, or be started by nsvm send")
    with _link(listen, wait_s) as link:
        row = _take(link)
    if json_file is not None:
        write_json(json_file, row)
    _print(row)
    sys.exit(exit_status([Verdict.PASS if row["verdict"] == "works" else Verdict.FAIL]))


@contextlib.contextmanager
def _link(listen: str | None, wait_s: float) -> Iterator[Link]:
    if listen is None:
        with standard_streams() as link:
            yield link
        return
    with _listener(listen) as listener:
        _say(f"listening on {_name(listener)}")
        with listener.accept(wait_s) as link:
            yield link


def _listener(listen: str) -> contextlib.AbstractContextManager[Listener]:
    address = listening_address(listen)
    if isinstance(address, Tcp):
        return listen_tcp(address.host, address.port)
    return listen_unix(address.path)


def _name(listener: Listener) -> str:
    """Return what `nsvm send --to` takes; with the port that was chosen, if it was left open."""
    at = listener.listening.getsockname()
    return f"tcp:{at[0]}:{listener.port}" if isinstance(at, tuple) else listener.name


def _take(link: Link) -> dict[str, Any]:
    with local_kvm() as kvm:
        try:
            received = live.receive(kvm, link)
        except Refused as e:
            row: dict[str, Any] = {"verdict": "refused", "why": str(e)}
        else:
            with received.machine:
                row = {**settle(received), "acknowledged": received.acknowledged}
    return {**row, "kernel": os.uname().release}


def _print(row: dict[str, Any]) -> None:
    _say(f"sent from {row.get('source', 'another kernel')}, received on {row['kernel']}")
    changed = row.get("changed", ())
    for line in (*row.get("notes", ()), *(f"changed: {what}" for what in changed[:_SHOWN])):
        _say(f"  {line}")
    if not row.get("acknowledged", True):
        _say("the source could not be told, and stays paused")
    _say(f"received: {row['verdict']}{': ' if row['why'] else ''}{row['why']}")


def _say(text: str) -> None:
    click.echo(f"nsvm: {text}", err=True)
