"""`nsvm report`: what the runs of many hosts say, as a page, as text, or for KernelCI."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path

import click

from harness.commands.output import require_writable, write_json, write_text
from harness.errors import HostError
from harness.report.bugs import Bugs
from harness.report.bugs import load as load_bugs
from harness.report.history import Line, lines_of
from harness.report.kcidb import to_kcidb
from harness.report.store import FILE, Store, StoreError
from harness.report.text import level_of_testing
from harness.runner.known_issues import load as load_known_issues
from harness.runner.run import OWN_RESULTS, STORE_VARIABLE

#: A host that was not heard of for longer is red: a night was left out.
_MAX_AGE_HOURS = 36.0


@click.command("report")
@click.argument("results", nargs=-1, type=click.Path(path_type=Path), metavar="[RESULTS]...")
@click.option(
    "--store",
    type=click.Path(dir_okay=False, path_type=Path),
    envvar=STORE_VARIABLE,
    metavar="FILE",
    help=f"The results store; RESULTS are imported into it. Default without RESULTS:"
    f" ${STORE_VARIABLE}, else {OWN_RESULTS / FILE}.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="FILE",
              help="Write the report as one HTML page.")  # fmt: skip
@click.option("--text", is_flag=True, help="Print the level of testing, for a mailing list.")
@click.option("--kcidb", type=click.Path(path_type=Path), metavar="FILE",
              help="Write the latest runs as KCIDB's JSON; - for standard output.")  # fmt: skip
@click.option("--origin", default="nsvm", show_default=True, metavar="NAME",
              help="With --kcidb: the CI system that they are from.")  # fmt: skip
@click.option("--max-age", type=float, metavar="HOURS",
              help=f"A line without a run for so long is red. Default: {_MAX_AGE_HOURS:.0f} for a"
              " store, none for RESULTS alone.")  # fmt: skip
@click.option("--mutants", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="With -o: the score in this file of `nsvm mutants --json`, too.")  # fmt: skip
@click.option("--check", is_flag=True, help="Exit status 1 if any line is red.")
def command(
    results: tuple[Path, ...],
    store: Path | None,
    output: Path | None,
    text: bool,
    kcidb: Path | None,
    origin: str,
    max_age: float | None,
    mutants: Path | None,
    check: bool,
) -> None:
    """Say what hosts, kernels and scenarios do, and what changed since the run before.

    RESULTS are directories that `nsvm run` wrote, or that have such below them, results.jsonl
    files, or other stores; with --store they are imported into it, and the report is of all that it
    has. A line of the report is a host with a kernel series; it is red if its latest run failed,
    was cut short, ran nothing or skipped all, or if there was none for --max-age hours.

    Exit status: 0 the report is written, 1 with --check: something is red, 2 it cannot be made.
    """
    if store is None and not results:
        store = OWN_RESULTS / FILE
    if not (output or text or kcidb or check or (results and store)):
        raise click.UsageError("nothing to make: -o FILE, --text, --kcidb FILE or --check")
    require_writable(output)
    require_writable(kcidb)
    bugs = load_bugs(mutants) if mutants else None
    if max_age is None and store is not None:
        max_age = _MAX_AGE_HOURS
    max_age_s = None if max_age is None else max_age * 3600
    with ExitStack() as stack:
        opened = stack.enter_context(_open(store, results))
        opened.refresh()
        lines = lines_of(opened)
        if not lines:
            raise HostError(f"{opened}: no run in it")
        if output:
            _write_page(output, opened, lines, max_age_s, bugs)
        if text:
            click.echo(level_of_testing(lines, max_age_s), nl=False)
        if kcidb:
            latest = [opened.load(line.latest.id, evidence=True) for line in lines]
            write_json(kcidb, to_kcidb(latest, origin))
    if check and any([_say_red(line, max_age_s) for line in lines]):
        sys.exit(1)


def _open(path: Path | None, results: tuple[Path, ...]) -> Store:
    if path and not results and not path.exists():
        raise StoreError(f"results store {path}: no such file; nsvm run makes it, and --store")
    with ExitStack() as stack:
        store = stack.enter_context(Store(path))
        count = sum(store.add_results(entry) for entry in results)
        if path and results:
            click.echo(f"nsvm: {count} runs into {path}", err=True)
        stack.pop_all()
        return store


def _write_page(
    output: Path, store: Store, lines: list[Line], max_age_s: float | None, bugs: Bugs | None
) -> None:
    # Only a page needs the template engine.
    from harness.report.page import render

    write_text(output, render(store, lines, load_known_issues(), max_age_s=max_age_s, bugs=bugs))


def _say_red(line: Line, max_age_s: float | None) -> bool:
    why = line.why_red(max_age_s)
    if why:
        click.echo(f"nsvm: {line.title}: {'; '.join(why)}", err=True)
    return bool(why)
