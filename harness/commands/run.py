"""`nsvm run`: scenarios on a host, with a verdict for every case."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import click
import pytest

import harness.scenarios
from harness.commands.options import host_choice, host_options
from harness.report.results import ResultsFile
from harness.report.verdict import Outcome, Verdict, exit_status
from harness.runner.hosts import HostPool
from harness.runner.known_issues import load as load_known_issues
from harness.runner.plugin import Lab, Plugin, record_missed

_NOTHING = pytest.ExitCode.NO_TESTS_COLLECTED


@click.command("run")
@click.argument("files", nargs=-1, type=click.Path(exists=True, path_type=Path))
@click.option("-k", "expression", default="", metavar="EXPR", help="Only cases that match.")
@click.option("--quick", is_flag=True, help="Only the quick ones.")
@click.option("--unsafe", is_flag=True, help="Also those that may take a local host down.")
@click.option("--results", type=click.Path(path_type=Path), metavar="DIR", help="Default: results/")
@click.option("--timeout", "timeout_s", type=float, metavar="S", help="For every case.")
@click.option("--strict", is_flag=True, help="A known issue's FAIL fails the run, too.")
@click.option("--shared", is_flag=True, help="One machine for all cases, not a fresh one for each.")
@host_options
def command(
    files: tuple[Path, ...],
    expression: str,
    quick: bool,
    unsafe: bool,
    results: Path | None,
    timeout_s: float | None,
    strict: bool,
    shared: bool,
    host: str,
    kernel: str | None,
    modules: Path | None,
) -> None:
    """Run scenarios; every case ends as PASS, FAIL, SKIP, ERROR or MISS.

    FILES are scenario modules of your own; without any, all of the harness's run.

    Exit status: 0 all passed, 1 something FAILed, 2 ERROR or MISS, 4 nothing ran or all was
    skipped.
    """
    # pytest takes SystemExit for one more failed test; this ends the run and makes the rest MISS.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    choice = host_choice(host, kernel, modules)
    marks = ["quick"] if quick else []
    if choice.resolved() == "local" and not unsafe and not expression:
        marks.append("not unsafe")
    directory = results or Path("results") / datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    started = time.monotonic()
    log = lambda text: click.echo(f"nsvm: {text}", err=True)  # noqa: E731
    with (
        ResultsFile(directory / "results.jsonl") as file,
        HostPool(choice, fresh=not shared, log=log) as pool,
    ):
        file.write("run", version=version("nsvm-harness"), revision=_revision(), argv=sys.argv[1:])
        # A kernel that cannot be had is one error, not one of every case.
        pool.host({})
        lab = Lab(pool, file, timeout_s, load_known_issues(), strict=strict)
        plugin = Plugin(lab)
        own = Path(harness.scenarios.__file__).parent
        arguments = [
            *map(str, files or [own]),
            "--config-file", os.devnull, "--rootdir", str(files[0].parent if files else own),
            "-p", "no:cacheprovider", "-p", "no:unraisableexception", "-p", "no:threadexception",
            "--import-mode=importlib", "--capture=no", "--no-header", "--tb=short", "-v",
            "-o", "console_output_style=count", "-o", "junit_suite_name=nsvm",
            f"--junitxml={directory / 'junit.xml'}",
            "-k", expression, "-m", " and ".join(marks),
        ]  # fmt: skip
        status = pytest.main(arguments, plugins=[plugin])
        why = pytest.ExitCode(status).name.lower()
        record_missed(lab, plugin.items, f"the run ended early ({why})")
        outcomes = list(lab.outcomes.values())
        counts = {v.value: sum(o.verdict is v for o in outcomes) for v in Verdict}
        verdicts = [
            Verdict.PASS if _is_known_fail(o) and not strict else o.verdict for o in outcomes
        ]
        counts["known"] = sum(_is_known_fail(o) for o in outcomes)
        seconds = round(time.monotonic() - started, 1)
        file.write("summary", counts=counts, seconds=seconds, hosts=pool.describe())
    _summarise(lab, counts, seconds, directory)
    broken = status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, _NOTHING)
    sys.exit(exit_status([*verdicts, *([Verdict.ERROR] if broken else [])]))


def _is_known_fail(outcome: Outcome) -> bool:
    return outcome.verdict is Verdict.FAIL and bool(outcome.known)


def _summarise(lab: Lab, counts: dict[str, int], seconds: float, directory: Path) -> None:
    for nodeid, outcome in lab.outcomes.items():
        name = nodeid.partition("::")[2]
        if outcome.verdict is Verdict.PASS and outcome.known:
            click.echo(f"PASS  {name}: known issue {outcome.known} does not show here")
        elif _is_known_fail(outcome):
            click.echo(f"FAIL  {name} (known: {outcome.known}): {outcome.reason}")
        elif outcome.verdict not in (Verdict.PASS, Verdict.SKIP):
            click.echo(f"{outcome.verdict.value}  {name}: {outcome.reason}")
    total = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
    click.echo(f"{total or 'nothing ran'} in {seconds:.0f} s; results in {directory}")


def _revision() -> str:
    """Return the tree's git revision; empty when there is no git or no repository."""
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()
