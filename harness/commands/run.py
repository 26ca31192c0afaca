"""`nsvm run`: scenarios on a host, with a verdict for every case."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import click
import pytest

import harness.scenarios
from harness.commands.options import expression_option, host_choice, host_options
from harness.commands.output import log
from harness.errors import NsvmError
from harness.host.lifeline import end_with_holder
from harness.report.verdict import BISECT_ABORT, BISECT_SKIP, bisect_status
from harness.runner.ktap_plugin import KtapPlugin
from harness.runner.plugin import Plugin
from harness.runner.run import STORE_VARIABLE, Part, Run, RunOptions
from harness.runner.selection import Choice, Selection
from harness.scenarios.case import LIFECYCLES

_NOTHING = pytest.ExitCode.NO_TESTS_COLLECTED

#: How the user's own pytest is made to behave; none of it is meant for this command.
_PYTEST_VARIABLES = ("PYTEST_ADDOPTS", "PYTEST_PLUGINS", "PYTEST_DEBUG")


_BISECT = "bisect"


class _RunCommand(click.Command):
    """`git bisect run` takes most statuses for "bad": a wrong use of the command is not that."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None,
        **extra: object,
    ) -> click.Context:  # fmt: skip
        """Parse the command line; with --exit-style bisect an error in it ends the bisection."""
        with _ending_bisections(_BISECT in args or f"--exit-style={_BISECT}" in args):
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        """Run; options that do not fit together are an error in the command line, too."""
        with _ending_bisections(ctx.params["exit_style"] == _BISECT):
            return super().invoke(ctx)


@contextmanager
def _ending_bisections(bisects: bool) -> Iterator[None]:
    try:
        yield
    except click.UsageError as e:
        if not bisects:
            raise
        e.show()
        sys.exit(BISECT_ABORT)


class _PartType(click.ParamType[Part]):
    """``I/N``."""

    name = "I/N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Part:
        """Return the part, if there is such a one."""
        number, _, count = str(value).partition("/")
        if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
            self.fail(f"{value!r} is not I/N with I from 1 to N", param, ctx)
        return Part(int(number), int(count))


@click.command("run", cls=_RunCommand)
@click.argument("files", nargs=-1, type=click.Path(exists=True, path_type=Path))
@expression_option()
@click.option(
    "-j",
    "--jobs",
    type=click.IntRange(min=1),
    metavar="N",
    help="Hosts at work at the same time. Default: 1 on a local host, else what fits.",
)
@click.option("--case", "cases", multiple=True, metavar="ID", help="Only this case. Repeatable.")
@click.option("--part", type=_PartType(), help="Only the Ith of N parts, dealt out like cards.")
@click.option("--repeat", type=click.IntRange(min=1), default=1, metavar="N",
              help="All cases N times, round after round.")  # fmt: skip
@click.option("--until-fail", is_flag=True, help="With --repeat: end with the first failure.")
@click.option("--quick", is_flag=True, help="Only the quick ones.")
@click.option("--unsafe", is_flag=True, help="Also those that may take a local host down.")
@click.option(
    "--require",
    multiple=True,
    metavar="FACT",
    help="A fact that must hold, as nsvm doctor names it, or the run is an ERROR. Repeatable.",
)
@click.option("--results", type=click.Path(path_type=Path), metavar="DIR", help="Default: results/")
@click.option(
    "--store",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help=f"Results store. Default: ${STORE_VARIABLE}, else beside the results' directory.",
)
@click.option("--ktap", is_flag=True, help="KTAP on standard output, all else on standard error.")
@click.option("--exit-style", type=click.Choice(["verdict", _BISECT]), default="verdict",
              help="bisect: 0 good, 1 bad, 125 cannot tell; a known issue is bad.")  # fmt: skip
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
    cases: tuple[str, ...],
    part: Part | None,
    repeat: int,
    until_fail: bool,
    quick: bool,
    unsafe: bool,
    require: tuple[str, ...],
    results: Path | None,
    store: Path | None,
    ktap: bool,
    exit_style: str,
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
    skipped. With --exit-style bisect: 0 all passed, 1 something FAILed (known or not), 125 neither,
    128 and more what ends a bisection: a wrong command line, no such case, Ctrl-C.
    """
    if until_fail and repeat == 1:
        raise click.UsageError("--until-fail goes with --repeat N")
    choice = host_choice(host, kernel, modules)
    bisects = exit_style == _BISECT
    options = RunOptions(
        choice, results, timeout_s, strict=strict or bisects, shared=shared, unsafe=unsafe,
        jobs=jobs, require=require, lifecycle=lifecycle, store=store,
    )  # fmt: skip
    marks = "quick" if quick else ""
    selection = Choice(cases, repeat, until_fail, part)
    try:
        run, status = _run(options, selection, files, expression, marks, ktap=ktap)
    except NsvmError as e:
        if not bisects:
            raise
        click.echo(f"nsvm: {e}", err=True)
        sys.exit(BISECT_SKIP)
    sys.exit(_bisect_status(run, status) if bisects else run.status(broken=_is_broken(status)))


def _run(
    options: RunOptions,
    selection: Choice,
    files: tuple[Path, ...],
    expression: str,
    marks: str,
    *,
    ktap: bool,
) -> tuple[Run, int]:
    """Run the cases and say how they ended; return the run with pytest's own status."""
    # pytest takes SystemExit for one more failed test; this ends the run and makes the rest MISS.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    end_with_holder()
    to_stdout = _line_writer()
    with redirect_stdout(sys.stderr) if ktap else nullcontext(), Run(options, log) as run:
        plugins: list[object] = [Plugin(run), Selection(run, selection)]
        if ktap:
            plugins.append(KtapPlugin(run, to_stdout))
        with _own_environment():
            status = pytest.main(
                _arguments(files, expression, marks, run.directory), plugins=plugins
            )
        run.finish(pytest.ExitCode(status).name.lower())
        run.redden_junit(run.directory / "junit.xml", run.status(broken=_is_broken(status)))
    for line in run.summary():
        click.echo(line, err=ktap)
    return run, status


def _line_writer() -> Callable[[str], None]:
    """Return what writes lines to standard output as it is now, each at once."""
    file = sys.stdout
    return lambda line: print(line, file=file, flush=True)


def _is_broken(status: int) -> bool:
    return status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, _NOTHING)


def _bisect_status(run: Run, status: int) -> int:
    if not run.cases:
        # No kernel would change that.
        return BISECT_ABORT
    if status == pytest.ExitCode.INTERRUPTED and not run.complaints:
        return 128 + signal.SIGINT
    return bisect_status(run.status(broken=_is_broken(status)))


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
