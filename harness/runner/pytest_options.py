"""Plain ``pytest harness/scenarios``: the options of `nsvm run` as pytest's, and the same run.

The exit status is that of `nsvm run`, too: all that was skipped is not green.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

import harness.scenarios
from harness.errors import NsvmError
from harness.runner.hosts import HostChoice, host_name
from harness.runner.plugin import Plugin
from harness.runner.run import Run, RunOptions
from harness.scenarios.case import LIFECYCLES

_OWN = Path(harness.scenarios.__file__).parent

#: Where pytest's exit status says no more than that the run took place, or was ended early.
_OURS = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add what `nsvm run` has and pytest has not."""
    group = parser.getgroup("nsvm", "nested SVM scenarios (as nsvm run)")
    add = group.addoption
    add("--nsvm-host", type=host_name, default="auto", help="auto, local, emulated or ssh:NAME")
    add("--nsvm-kernel", metavar="SPEC", help="kernel of the emulated host")
    add("--nsvm-modules", type=Path, metavar="DIR", help="with --nsvm-kernel PATH: its modules")
    add("--nsvm-shared", action="store_true", help="one machine for all cases")
    add("--nsvm-jobs", type=int, metavar="N", help="hosts at work at the same time")
    add("--nsvm-unsafe", action="store_true", help="also what may take a local host down")
    add("--nsvm-strict", action="store_true", help="a known issue's FAIL fails the run, too")
    add("--nsvm-timeout", type=float, metavar="S", help="for every case")
    add("--nsvm-results", type=Path, metavar="DIR", help="default: a new one below results/")
    add("--nsvm-lifecycle", choices=LIFECYCLES, help="restored: move machines before every run")
    add("--nsvm-require", action="append", default=[], metavar="FACT", help="must hold")


def options_of(config: pytest.Config) -> RunOptions:
    """Return what the command line says about the run.

    Raises:
        pytest.UsageError: it contradicts itself.
    """

    def value(name: str) -> object:
        return config.getoption(f"nsvm_{name}")

    jobs, kernel, modules = (config.getoption(f"nsvm_{n}") for n in ("jobs", "kernel", "modules"))
    if jobs is not None and jobs < 1:
        raise pytest.UsageError(f"--nsvm-jobs {jobs}: at least 1")
    if modules is not None and kernel is None:
        raise pytest.UsageError("--nsvm-modules goes with --nsvm-kernel PATH")
    return RunOptions(
        HostChoice(str(value("host")), kernel, modules),
        config.getoption("nsvm_results"),
        config.getoption("nsvm_timeout"),
        strict=bool(value("strict")),
        shared=bool(value("shared")),
        unsafe=bool(value("unsafe")),
        jobs=jobs,
        require=tuple(config.getoption("nsvm_require")),
        lifecycle=config.getoption("nsvm_lifecycle"),
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Prepare the run; before pytest's own JUnit file is named."""
    try:
        run = Run(options_of(config), lambda text: print(f"nsvm: {text}", file=sys.stderr))
    except NsvmError as e:
        raise pytest.UsageError(str(e)) from e
    if not config.option.xmlpath and not config.option.collectonly:
        config.option.xmlpath = str(run.directory / "junit.xml")
    config.pluginmanager.register(PlainPlugin(run), "nsvm-run")


class PlainPlugin(Plugin):
    """Begins and ends the run with pytest's session, and shows its summary in pytest's."""

    def __init__(self, run: Run) -> None:
        super().__init__(run, only=_OWN)
        #: Of the run; 0 if pytest has a status of its own to tell.
        self.status = 0
        self._stack = ExitStack()

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        """Begin to record, unless nothing is to run."""
        if session.config.option.collectonly:
            return
        try:
            self._stack.enter_context(self.run)
        except NsvmError as e:
            raise pytest.UsageError(str(e)) from e

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Choose the exit status as well, unless pytest has one of its own to tell."""
        super().pytest_sessionfinish(session, exitstatus)
        only_ours = len(session.items) == len(self.run.cases)
        status = pytest.ExitCode(exitstatus)
        if self.run.finished and only_ours and status in _OURS:
            self.status = self.run.status(broken=status is pytest.ExitCode.INTERRUPTED)
            session.exitstatus = self.status

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Show what `nsvm run` shows at its end."""
        if self.run.finished:
            terminalreporter.section("nsvm")
            for line in self.run.summary():
                terminalreporter.write_line(line)
            if path := terminalreporter.config.option.xmlpath:
                self.run.redden_junit(Path(path), self.status)

    def pytest_unconfigure(self) -> None:
        """End the hosts and close the files."""
        self._stack.close()
