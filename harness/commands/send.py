"""`nsvm send`: bring a machine to a place, and send it live to `nsvm receive` elsewhere."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from harness.commands.output import require_writable, write_json
from harness.commands.peers import Command, Tcp, Unix, destination, local_kvm
from harness.errors import HostError, NsvmError
from harness.migrate import live
from harness.migrate.connections import child, connect_tcp, connect_unix
from harness.migrate.errors import LinkLost, Refused, StreamError
from harness.migrate.links import Link
from harness.proxy.machine import ProxyMachine
from harness.storm.places import PLACES, Place
from harness.storm.travel import SIDE_PLACE, place_named, prepare
from kvm_ioctl.handles import Kvm

SETTLE_S = 300.0
"""How long a command may take, after it has the machine, to let it live on."""

Process = subprocess.Popen[bytes]
_Given = Mapping[str, Any]


@click.command("send")
@click.argument("place", type=click.Choice(list(PLACES)), metavar="PLACE")
@click.option(
    "--to",
    required=True,
    metavar="WHERE",
    help="tcp:HOST:PORT, unix:PATH, or a command such as 'ssh HOST nsvm receive'.",
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="'-' is stdout.")
def command(place: str, to: str, json_file: Path | None) -> None:
    """Bring a machine to PLACE on this machine's /dev/kvm, and send it live to `nsvm receive`.

    PLACE is one of those of `nsvm save`. If it cannot be sent, the machine goes on here, and is
    compared with its twin.

    Exit status: 0 it is there and, as far as is known here, goes on as its twin did; 1 it does not;
    2 it was not sent, or nobody knows.
    """
    require_writable(json_file)
    where = destination(to)
    chosen = place_named(place)
    with local_kvm() as kvm:
        report = _sent(kvm, chosen, where)
    if json_file is not None:
        write_json(json_file, report)
    if json_file is None or str(json_file) != "-":
        _print(chosen, report)
    sys.exit(report["status_there"] or 0)


def _sent(kvm: Kvm, place: Place, where: Tcp | Unix | Command) -> dict[str, Any]:
    machine, given = prepare(kvm, place)
    with machine:
        process: Process | None = None
        try:
            with _link(where) as (link, process):
                sent = live.send(machine, link, sides=lambda: given)
                sent.abandon()
                status = None if process is None else _status(process)
        except (LinkLost, Refused, StreamError) as e:
            how = _ended(process)
            raise HostError(f"{e}{how}; {_went_on(machine, place, given)}") from e
    return {
        "place": place.name,
        "to": link.name,
        "pages": sum(done.pages for done in (*sent.rounds, sent.rest)),
        "size_bytes": sent.size_bytes,
        "rounds": len(sent.rounds),
        "converged": sent.converged,
        "downtime_s": sent.downtime_s,
        "notes": [str(note) for note in sent.state.notes],
        "status_there": status,
    }


@contextlib.contextmanager
def _link(where: Tcp | Unix | Command) -> Iterator[tuple[Link, Process | None]]:
    if isinstance(where, Command):
        with child(where.argv) as started:
            yield started
        return
    link = (
        connect_tcp(where.host, where.port) if isinstance(where, Tcp) else connect_unix(where.path)
    )
    with link:
        yield link, None


def _status(process: Process) -> int:
    """Wait for the command that has the machine now.

    Raises HostError: it does not say how the machine went on.
    """
    try:
        status = process.wait(SETTLE_S)
    except subprocess.TimeoutExpired as e:
        raise HostError(f"sent, but the other side has not ended within {SETTLE_S:g} s") from e
    if status not in (0, 1):
        raise HostError(f"sent, but the other side then ended with status {status}")
    return status


def _ended(process: Process | None) -> str:
    """Say how the command ended that could not take the machine."""
    if process is None:
        return ""
    # `child` has waited for it.
    return f" (the command ended with status {process.returncode})"


def _went_on(machine: ProxyMachine, place: Place, given: _Given) -> str:
    """Let the machine go on here; return how that went."""
    side = given[SIDE_PLACE]
    try:
        seen = place.live_on(machine, side["state"])
    except NsvmError as e:
        return f"the machine was to go on here, and did not: {e}"
    if seen != side["expected"]:
        return "the machine goes on here, but not as its twin did"
    return "the machine goes on here, as its twin did"


def _print(place: Place, report: Mapping[str, Any]) -> None:
    click.echo(f"{place.what}: sent to {report['to']}")
    click.echo(
        f"{report['pages']} pages, {report['size_bytes']} bytes, {report['rounds']} rounds,"
        f" downtime {report['downtime_s'] * 1e3:.1f} ms"
    )
    for note in report["notes"]:
        click.echo(f"not given: {note}")
    if report["status_there"] is not None:
        how = "differs there" if report["status_there"] else "goes on there as its twin did"
        click.echo(how)
