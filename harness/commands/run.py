"""`nsvm run`: scenarios on a host, with a verdict for every case."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import pytest

import harness.scenarios
from harness.commands.options import host_choice, host_options
from harness.runner.plugin import Plugin
from harness.runner.run import Run, RunOptions
from harness.scenarios.case import LIFECYCLES

_NOTHING = pytest.ExitCode.NO_TESTS_COLLECTED

#: How the user's own pytest is made to behave; none of it is meant for this command.
_PYTEST_VARIABLES = ("PYTEST_ADDOPTS", "PYTEST_PLUGINS", "PYTEST_DEBUG")


@click.command("run")
@click.argument("files", nargs=-1, type=click.Path(exists=True, path_type=Path))
@click.option("-k", "expression", default="", metavar="EXPR", help="Only cases that match.")
@click.option(
    "-j",
    "--jobs",
    type=click.IntRange(min=1),
    metavar="N",
    help="Hosts at work at the same time. Default: 1 on a local host, else what fits.",
)
@click.option("--quick", is_flag=True, help="Only the quick ones.")
@click.option("--unsafe", is_flag=True, help="Also those that may take a local host down.")
@click.option(
    "--require",
    multiple=True,
    metavar="FACT",
    help="A fact that must hold, as nsvm doctor names it, or the run is an ERROR. Repeatable.",
)
@click.option("--results", type=click.Path(path_type=Path), metavar="DIR", help="Default: results/")
@click.option("--timeout", "timeout_s", type=float, metavar="S", help="For every case.")
@click.option("--strict", is_flag=True, help="A known issue's FAIL fails the run, too.")
@click.option(
    "--shared", is_flag=True, help="One machine (for each job) for all cases, not a fresh one each."
)
@click.option(
    "--lifecycle",
    type=click.Choice(LIFECYCLES),
    help="restored: move every machine into another VM before each run of a vCPU.",
)
@host_options
def command(
    files: tuple[Path, ...],
    expression: str,
    jobs: int | None,
    quick: bool,
    unsafe: bool,
    require: tuple[str, ...],
    results: Path | None,
    timeout_s: float | None,
    strict: bool,
    shared: bool,
    lifecycle: str | None,
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
    options = RunOptions(
        choice, results, timeout_s, strict=strict, shared=shared, unsafe=unsafe, jobs=jobs,
        require=require, lifecycle=lifecycle,
    )  # fmt: skip
    log = lambda text: click.echo(f"nsvm: {text}", err=True)  # noqa: E731
    with Run(options, log) as run, _own_environment():
        arguments = _arguments(files, expression, "quick" if quick else "", run.directory)
        status = pytest.main(arguments, plugins=[Plugin(run)])
        run.finish(pytest.ExitCode(status).name.lower())
    for line in run.summary():
        click.echo(line)
    broken = status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, _NOTHING)
    sys.exit(run.status(broken=broken))


def _arguments(files: tuple[Path, ...], expression: str, marks: str, directory: Path) -> list[str]:
    own = Path(harness.scenarios.__file__).parent
    return [
        *map(str, files or [own]),
        "--config-file", os.devnull, "--rootdir", str(files[0].parent if files else own),
        # Among others the one in harness/scenarios, which is for pytest without this command.
        "--noconftest",
        "-p", "no:cacheprovider", "-p", "no:unraisableexception", "-p", "no:threadexception",
        "--import-mode=importlib", "--capture=no", "--no-header", "--tb=short", "-v",
        "-o", "console_output_style=count", "-o", "junit_suite_name=nsvm",
        f"--junitxml={directory / 'junit.xml'}",
        "-k", expression, "-m", marks,
    ]  # fmt: skip


@contextmanager
def _own_environment() -> Iterator[None]:
    """Keep the user's settings and plugins of pytest away from this run."""
    before = {name: os.environ.pop(name) for name in _PYTEST_VARIABLES if name in os.environ}
    autoload = os.environ.get("PYTEST_DISABLE_PLUGIN_AUTOLOAD")
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    try:
        yield
    finally:
        del os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"]
        if autoload is not None:
            before["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = autoload
        os.environ.update(before)
