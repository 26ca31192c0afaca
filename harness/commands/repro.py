"""`nsvm repro`: known bugs by name, and what shows them."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from harness.commands.list import all_scenarios
from harness.commands.options import host_choice, host_options
from harness.commands.output import json_option, log, require_writable, wide_console, write_json
from harness.report.results import ResultsFile
from harness.repro import evidence as recorded
from harness.repro.colour import Colour
from harness.repro.evidence import Evidence, Seen
from harness.repro.run import Bench, Ran
from harness.repro.table import Reproducer, choose, load
from harness.runner.hosts import HostChoice, HostPool, make_host
from harness.runner.lab import Lab
from harness.runner.run import new_directory
from harness.scenarios.case import Case, cases_of

_STATUS_RED = 1
_STATUS_BROKE = 2
_STATUS_NOTHING = 4
_STYLES = {"red": "red", "green": "green", "other": "yellow", "broke": "yellow", "skip": "dim"}


@click.group("repro")
def command() -> None:
    """Known bugs of nested SVM, by name: what each is, and does this kernel have it."""


@command.command("list")
@click.option("--json", "as_json", is_flag=True, help="As JSON, with the evidence.")
def list_command(as_json: bool) -> None:
    """List the reproducers, and in which colour each was seen on which kernel."""
    table, evidence = load(), recorded.load()
    if as_json:
        click.echo(json.dumps([_plain(one, evidence) for one in table.values()], indent=2))
        return
    console = wide_console()
    shown = Table("name", "claim", "fixed in", "red on", "green on")
    for one in table.values():
        seen = evidence.get(one.name, {})
        columns = (_series(recorded.kernels_of(seen, colour)) for colour in ("red", "green"))
        shown.add_row(Text(one.name), Text(one.claim), one.since, *columns)
    console.print(shown)
    both = sum(_has_both(evidence.get(name, {})) for name in table)
    console.print(f"{len(table)} reproducers, {both} seen in both colours")


@command.command("show")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True)
def show_command(name: str, as_json: bool) -> None:
    """Show all that is known of one reproducer."""
    [one] = choose(load(), [name])
    evidence = recorded.load()
    plain = _plain(one, evidence)
    if as_json:
        click.echo(json.dumps(plain, indent=2))
        return
    console = Console(highlight=False)
    for key, value in plain.items():
        if value and key != "evidence":
            text = ", ".join(value) if isinstance(value, list) else str(value)
            console.print(f"{key + ':':<11}{text}", markup=False, soft_wrap=True)
    for kernel, seen in evidence.get(name, {}).items():
        console.print(f"seen:      {kernel}: {seen.colour}, {seen.what}", markup=False)
        for line in seen.saw.splitlines():
            console.print(f"             {line}", markup=False, soft_wrap=True)


@command.command("run")
@click.argument("names", nargs=-1, metavar="NAME...")
@click.option("--all", "every", is_flag=True, help="All reproducers, in place of names.")
@json_option
@click.option("--results", type=click.Path(path_type=Path), metavar="DIR", help="Default: results/")
@click.option("--timeout", "timeout_s", type=float, metavar="S", help="For every case.")
@click.option("--unsafe", is_flag=True, help="Also those that may take a local host down.")
@click.option("--shared", is_flag=True, help="One machine for all until something fails on it.")
@click.option("--record", is_flag=True, help="Keep red and green as evidence, in the harness.")
@host_options
def run_command(
    names: tuple[str, ...],
    every: bool,
    json_file: Path | None,
    results: Path | None,
    timeout_s: float | None,
    unsafe: bool,
    shared: bool,
    record: bool,
    host: str,
    kernel: str | None,
    modules: Path | None,
) -> None:
    """Run reproducers: red, the bug shows with its own symptom; green, it does not.

    Any other failure is no word on the bug: "other".

    Exit status: 1 one is red, 0 none, 2 something broke or failed otherwise, 4 none can run here.
    """
    if every == bool(names):
        raise click.UsageError("give names of reproducers, or --all")
    require_writable(json_file)
    table = load()
    chosen = list(table.values()) if every else choose(table, names)
    choice = host_choice(host, kernel, modules)
    with (
        ResultsFile((results or new_directory()) / "results.jsonl") as file,
        HostPool(choice, fresh=not shared, log=log) as pool,
    ):
        bench = Bench(
            pool,
            Lab(file, timeout_s),
            _cases(),
            choice.resolved(),
            make=lambda cpus: make_host(choice, log=log, cpus=cpus),
            unsafe=unsafe,
        )
        console = wide_console()
        ran = [_told(console, bench.run(one)) for one in chosen]
        described = _described(pool) or bench.described
        log(f"results in {file.path.parent}")
    where = _kernel_name(described, choice)
    if record:
        recorded.record(_evidence(ran, where, described))
    if json_file is not None:
        plain = {"kernel": where, "host": described, "ran": [each.to_plain() for each in ran]}
        write_json(json_file, plain)
    _print_counts(console, ran, where)
    sys.exit(_status(ran))


# Running


def _cases() -> dict[str, Case]:
    return {case.id: case for _, declared in all_scenarios() for case in cases_of(declared)}


def _described(pool: HostPool) -> dict[str, Any]:
    """Return the description of the host that was used; of one, if they differ in parameters."""
    descriptions = pool.describe()
    return descriptions[0] if descriptions else {}


def _kernel_name(described: Mapping[str, Any], choice: HostChoice) -> str:
    """Return ``RELEASE``, or ``RELEASE:VARIANT``."""
    release = str(described.get("kernel_release", "unknown"))
    variant = (choice.kernel or "").partition(":")[2]
    return f"{release}:{variant}" if variant else release


def _evidence(ran: Sequence[Ran], kernel: str, described: Mapping[str, Any]) -> Evidence:
    host = f"{described.get('kind')}: {described.get('silicon', '')}".rstrip(": ")
    return {
        each.reproducer.name: {
            kernel: Seen(each.colour.value, each.decisive.what, each.decisive.saw, host)
        }
        for each in ran
        if each.colour in (Colour.RED, Colour.GREEN)
    }


def _status(ran: Sequence[Ran]) -> int:
    colours = {each.colour for each in ran}
    # Red is news about the kernel, even where something else broke.
    if Colour.RED in colours:
        return _STATUS_RED
    if colours & {Colour.BROKE, Colour.OTHER}:
        return _STATUS_BROKE
    return 0 if Colour.GREEN in colours else _STATUS_NOTHING


# Output


def _told(console: Console, ran: Ran) -> Ran:
    colour = ran.colour.value
    line = Text(f"{colour:<6}", _STYLES[colour]).append(f" {ran.reproducer.name}", "bold")
    console.print(line.append(f"  {ran.decisive.what}", "dim"), soft_wrap=True)
    for text in ran.decisive.saw.splitlines():
        console.print(f"         {text}", markup=False, soft_wrap=True)
    return ran


def _print_counts(console: Console, ran: Sequence[Ran], kernel: str) -> None:
    counts = {colour: sum(each.colour is colour for each in ran) for colour in Colour}
    shown = ", ".join(f"{count} {colour.value}" for colour, count in counts.items() if count)
    console.print(f"{kernel}: {shown or 'nothing ran'}")


def _plain(one: Reproducer, evidence: Evidence) -> dict[str, Any]:
    return {
        "name": one.name,
        "claim": one.claim,
        "mechanism": one.mechanism,
        "fix": one.fix,
        "fixed in": one.since,
        "kernels": list(one.kernels),
        "needs": list(one.needs),
        "cases": list(one.cases),
        "symptom": one.symptom,
        "knob": one.knob,
        "bad": list(one.bad),
        "variants": list(one.variants),
        "evidence": {kernel: vars(seen) for kernel, seen in evidence.get(one.name, {}).items()},
    }


def _series(kernels: Sequence[str]) -> str:
    """Return releases as people say them: ``5.10``, ``6.1:eager``."""
    return " ".join(_short(kernel) for kernel in kernels)


def _short(kernel: str) -> str:
    release, colon, variant = kernel.partition(":")
    return ".".join(release.split(".")[:2]) + colon + variant


def _has_both(seen: Mapping[str, Seen]) -> bool:
    return {"red", "green"} <= {each.colour for each in seen.values()}
