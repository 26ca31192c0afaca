"""`nsvm fleet`: scenarios on many hosts at once, with one result."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from harness.commands.output import require_writable, write_json
from harness.errors import HostError
from harness.fleet.drive import Drive
from harness.fleet.errors import FleetError
from harness.fleet.inventory import read_hosts
from harness.fleet.merge import FleetResult, HostResult, merge
from harness.fleet.plan import FleetPlan, absolute
from harness.fleet.progress import Progress
from harness.host.lab_file import parameter
from harness.report.run_record import FILE
from harness.report.store import FILE as STORE_FILE
from harness.report.text import printable
from harness.report.verdict import exit_status
from harness.runner.requirements import check_names
from harness.runner.run import STORE_VARIABLE, new_directory

_LONGEST_H = 6.0


@click.group("fleet")
def command() -> None:
    """Scenarios on many hosts at once, over Ansible."""


@command.command("run")
@click.argument("files", nargs=-1, type=click.Path(exists=True, path_type=Path))
@click.option("-i", "--inventory", "inventories", multiple=True, required=True, metavar="FILE",
              type=click.Path(path_type=Path), help="Of Ansible's. Repeatable.")  # fmt: skip
@click.option("--limit", default="", metavar="PATTERN", help="Only hosts that match, as Ansible's.")
@click.option(
    "--deal/--repeat-on-each",
    default=False,
    help="Deal the cases out over equal hosts; or, by default, run all on each.",
)
@click.option("-k", "expression", default="", metavar="EXPR", help="Only cases that match.")
@click.option("--quick", is_flag=True, help="Only the quick ones.")
@click.option("--unsafe", is_flag=True, help="Also those that may take a host down.")
@click.option("--repeat", type=click.IntRange(min=1), default=1, metavar="N",
              help="All cases N times, round after round.")  # fmt: skip
@click.option("--require", multiple=True, metavar="FACT", help="As of nsvm run. Repeatable.")
@click.option("--param", "params", multiple=True, metavar="NAME=VALUE",
              help="A parameter of kvm_amd on all hosts, such as npt=0. Repeatable.")  # fmt: skip
@click.option("--timeout", "timeout_s", type=float, metavar="S", help="For every case.")
@click.option(
    "--longest",
    "longest_h",
    type=click.FloatRange(min=0, min_open=True),
    metavar="HOURS",
    default=_LONGEST_H,
    show_default=True,
    help="For all: what then never ran is MISS.",
)
@click.option("--strict", is_flag=True, help="A known issue's FAIL is red, too.")
@click.option("--results", type=click.Path(path_type=Path), metavar="DIR", help="Default: results/")
@click.option("--store", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help=f"Results store. Default: ${STORE_VARIABLE}, else beside the results'"
              " directory.")  # fmt: skip
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="'-' is stdout.")
def run(
    files: tuple[Path, ...],
    inventories: tuple[Path, ...],
    limit: str,
    deal: bool,
    expression: str,
    quick: bool,
    unsafe: bool,
    repeat: int,
    require: tuple[str, ...],
    params: tuple[str, ...],
    timeout_s: float | None,
    longest_h: float,
    strict: bool,
    results: Path | None,
    store: Path | None,
    json_file: Path | None,
) -> None:
    """Run scenarios on all hosts of an inventory at once; the results come into one store.

    FILES are scenario modules of your own; without any, all of the harness's run. How to get to a
    host is what Ansible knows (ansible_host, ansible_port, ansible_user,
    ansible_ssh_private_key_file, ansible_become); the variable nsvm_KEY is the KEY of lab.toml.

    A host that cannot be reached, or is lost, is red; what it recorded before is in the results,
    and what it was to run is MISS.

    Exit status: 0 all passed, 1 something FAILed, 2 ERROR or MISS, 4 nothing ran or all was
    skipped.
    """
    require_writable(json_file)
    check_names(require)
    hosts = tuple(read_hosts(inventories, limit))
    arguments = [
        *(["-k", expression] if expression else []),
        *(["--quick"] if quick else []),
        *(["--unsafe"] if unsafe else []),
        *(["--strict"] if strict else []),
        *(["--repeat", str(repeat)] if repeat > 1 else []),
        *(["--timeout", str(timeout_s)] if timeout_s is not None else []),
        *(word for name in require for word in ("--require", name)),
        *(word for text in params for word in ("--param", _parameter(text))),
        "--",
        *map(str, absolute(files)),
    ]
    directory = _directory(results, hosts).absolute()
    own = os.environ.get(STORE_VARIABLE)
    plan = FleetPlan(
        absolute(inventories), hosts, deal, directory,
        (store or (Path(own) if own else directory.parent / STORE_FILE)).absolute(),
        tuple(arguments), limit, longest_h * 3600,
    )  # fmt: skip
    result = _run(plan)
    if json_file is not None:
        write_json(json_file, result.as_json())
    if json_file is None or str(json_file) != "-":
        _print(result)
    sys.exit(result.status)


def _parameter(text: str) -> str:
    try:
        name, value = parameter(text)
    except ValueError as e:
        raise click.BadParameter(str(e), param_hint="--param") from None
    return f"{name}={value}"


def _directory(given: Path | None, hosts: tuple[str, ...]) -> Path:
    """Return the directory of this fleet's results; nothing of another run is in it.

    Raises HostError: it cannot be made, or something is.
    """
    if given is None:
        given = new_directory()
    for host in hosts:
        if (given / host / FILE).exists():
            # Taken for this run's, it could make a host green that was never reached.
            raise FleetError(f"{given / host} has the results of another run")
        try:
            (given / host).mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise HostError(f"cannot make {given / host}: {e.strerror}") from e
    return given


def _run(plan: FleetPlan) -> FleetResult:
    drive = Drive(plan)
    progress = Progress(plan, lambda line: click.echo(f"nsvm: {printable(line)}", err=True))
    try:
        drive.run(progress.look)
    finally:
        progress.look(last=True)
        # Also of a fleet that was interrupted: what was recorded is not lost.
        result = merge(plan, drive.ended, drive.complaints)
    return result


def _print(result: FleetResult) -> None:
    for host in result.hosts:
        for line in _red_lines(host):
            click.echo(printable(line))
    for said in result.complaints:
        click.echo(printable(f"ERROR  {said}"))
    for said in result.notes:
        click.echo(printable(f"note  {said}"))
    width = max(len(host.host) for host in result.hosts)
    for host in result.hosts:
        counts = ", ".join(f"{count} {word}" for word, count in host.counts.items())
        colour = {0: "green", 4: "nothing ran"}.get(exit_status(host.verdicts), "RED")
        part = f", part {host.part}" if host.part else ""
        click.echo(
            printable(
                f"{host.host:<{width}}  {colour}: {counts or 'no case'} on {host.record.kernel}"
                f" in {host.record.seconds:.0f} s{part}"
            )
        )
    click.echo(f"results in {result.plan.directory}, and in {result.plan.store}")


def _red_lines(host: HostResult) -> list[str]:
    """Return a line for each thing that makes a host red; what complaints say is not repeated."""
    complaints = [said.removeprefix(f"{host.host}: ") for said in host.complaints]
    lines = [f"ERROR  {host.host}: {said}" for said in complaints]
    for case in host.record.cases:
        if case.is_red and not any(case.reason.startswith(said) for said in host.complaints):
            lines.append(f"{case.word}  {host.host}: {case.case}: {case.reason.splitlines()[0]}")
    return lines
