"""The pytest plugin: collects scenarios as items of its own, and shows and judges their outcomes.

Nothing of a scenario runs in pytest's process, and nothing is run by pytest's loop: it takes up,
in the order of collection, what the run's workers have done on their hosts.
"""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from harness.host.session import Cancelled
from harness.report.verdict import Outcome, Verdict
from harness.runner.lab import Ran
from harness.runner.modules import ScenarioModule
from harness.runner.run import Run
from harness.scenarios.case import Case, cases_of, scenario_of

_LETTERS = {"PASS": ".", "FAIL": "F", "KNOWN": "x", "SKIP": "s", "ERROR": "E", "MISS": "M"}
_CATEGORIES = {"PASS": "passed", "FAIL": "failed", "KNOWN": "xfailed", "SKIP": "skipped",
               "ERROR": "error", "MISS": "error"}  # fmt: skip

#: The attribute that carries a verdict on pytest's report.
_VERDICT = "nsvm_verdict"


class NotPassed(Exception):
    """Carries a FAIL, ERROR or MISS through pytest."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.reason)
        self.outcome = outcome


class ScenarioItem(pytest.Item):
    """One case."""

    def __init__(self, *, case: Case, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.case = case
        #: Among all that are to run.
        self.number = -1
        self.ran: Ran | None = None
        if case.scenario.quick:
            self.add_marker("quick")
        if case.scenario.unsafe:
            self.add_marker("unsafe")

    def runtest(self) -> None:
        """Wait for the case's outcome and raise unless it passed."""
        run = self.config.stash[_RUN]
        try:
            self.ran = run.wait(self.number)
        except Cancelled as e:
            self.ran = Ran(Outcome(Verdict.MISS, str(e)), 0.0)
        outcome = self.ran.outcome
        if outcome.verdict is Verdict.SKIP:
            pytest.skip(outcome.reason)
        if run.lab.is_known_fail(outcome):
            pytest.xfail(f"known: {outcome.known}: {outcome.reason}")
        if outcome.verdict is not Verdict.PASS:
            raise NotPassed(outcome)

    def reportinfo(self) -> tuple[Any, int, str]:
        """Return where pytest says the case stands."""
        return self.path, self.case.scenario.function.__code__.co_firstlineno - 1, self.case.id

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> str:
        """Show the claim, the reason and the evidence; never this plugin's own frames."""
        if not isinstance(excinfo.value, NotPassed):
            return str(super().repr_failure(excinfo))
        outcome = excinfo.value.outcome
        text = [f"claim: {self.case.scenario.claim}", f"{outcome.verdict.value}: {outcome.reason}"]
        for title, body in outcome.evidence.items():
            text += [f"--- {title}", body.rstrip()]
        return "\n".join(text)


_RUN = pytest.StashKey[Run]()


class Plugin:
    """Hooks that collect scenarios, and run and show them as a `Run` does."""

    def __init__(self, run: Run, only: Path | None = None) -> None:
        """Take files for ones with scenarios: all of them, or `only` those in a directory."""
        self.run = run
        self._only = only

    def pytest_configure(self, config: pytest.Config) -> None:
        """Make the run reachable from the items."""
        config.stash[_RUN] = self.run
        for mark in ("quick: part of `make run`", "unsafe: may take the host down"):
            config.addinivalue_line("markers", mark)

    def pytest_pycollect_makemodule(
        self, module_path: Path, parent: pytest.Collector
    ) -> pytest.Module | None:
        """Take a file for one with scenarios."""
        if self._only is not None and module_path.parent != self._only:
            return None
        return ScenarioModule.from_parent(parent, path=module_path)

    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        """Leave out what may take a real machine down, unless it was asked for."""
        if self.run.kind == "emulated" or self.run.options.unsafe or config.option.keyword:
            return
        left_out = [item for item in items if item.get_closest_marker("unsafe")]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Remember what is to run."""
        items = [item for item in session.items if isinstance(item, ScenarioItem)]
        for number, item in enumerate(items):
            item.number = number
        self.run.cases = [item.case for item in items]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self, session: pytest.Session) -> Generator[None, object, object]:
        """Have the cases run ahead while the loop takes up one outcome after the other."""
        if session.testsfailed or session.config.option.collectonly:
            return (yield)
        if self.run.complaints:
            raise session.Interrupted("; ".join(self.run.complaints))
        with self.run.workers():
            return (yield)

    @pytest.hookimpl(tryfirst=True)
    def pytest_pycollect_makeitem(
        self, collector: pytest.Module, name: str, obj: object
    ) -> list[ScenarioItem] | None:
        """Turn a scenario into one item per case."""
        declared = scenario_of(obj)
        if declared is None or not isinstance(collector, ScenarioModule):
            return None
        return [
            ScenarioItem.from_parent(collector, name=case.id, case=case)
            for case in cases_of(declared)
        ]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Attach the verdict; what is not KVM's fault is an error to pytest and to JUnit."""
        report = yield
        if isinstance(item, ScenarioItem) and item.ran and call.when == "call":
            outcome = item.ran.outcome
            known = self.run.lab.is_known_fail(outcome)
            setattr(report, _VERDICT, "KNOWN" if known else outcome.verdict.value)
            report.sections = []
            # The time for which it was waited says nothing.
            report.duration = item.ran.total_seconds
            if outcome.verdict in (Verdict.ERROR, Verdict.MISS):
                report.when = "setup"
        return report

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Record the end, and give JUnit, which is written next, what was not taken up."""
        if session.config.option.collectonly:
            return
        self.run.finish(pytest.ExitCode(exitstatus).name.lower())
        # The terminal shows them in the summary, one line for each.
        terminal = session.config.pluginmanager.getplugin("terminalreporter")
        log = session.config.pluginmanager.subset_hook_caller(
            "pytest_runtest_logreport", [terminal]
        )
        for item in session.items:
            if not isinstance(item, ScenarioItem) or item.ran is not None:
                continue
            # None if the run ended while cases were still collected.
            if outcome := self.run.outcomes.get(item.number):
                known = self.run.lab.is_known_fail(outcome)
                log(report=_not_taken_up(item, outcome, known))

    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        """Show KernelCI's words."""
        verdict = getattr(report, _VERDICT, None)
        if verdict is None:
            return None
        return _CATEGORIES[verdict], _LETTERS[verdict], verdict


def _not_taken_up(item: ScenarioItem, outcome: Outcome, known: bool) -> pytest.TestReport:
    """Return a report of a case that pytest's loop did not get to."""
    said = f"{outcome.verdict.value}: {outcome.reason}"
    if outcome.verdict is Verdict.SKIP or known:
        ending: tuple[Any, Any, Any] = ("skipped", (str(item.path), None, said), "call")
    elif outcome.verdict is Verdict.PASS:
        ending = ("passed", None, "call")
    else:
        ending = ("failed", said, "call" if outcome.verdict is Verdict.FAIL else "setup")
    return pytest.TestReport(item.nodeid, item.location, {}, *ending, duration=outcome.seconds)
