"""The pytest plugin: collects scenarios as items of its own and runs each on the chosen host.

Works in a plain ``pytest harness/scenarios`` too: nothing of a scenario runs in pytest's process.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness.errors import HarnessError, HostError, HostLost, NsvmError
from harness.report.results import ResultsFile
from harness.report.verdict import Outcome, Verdict
from harness.runner.hosts import HostPool
from harness.runner.judge import judge, judge_lost
from harness.runner.known_issues import KnownIssue, find
from harness.runner.modules import ScenarioModule
from harness.scenarios.case import Case, cases_of, scenario_of

#: How much slower everything is under TCG, for timeouts.
EMULATED_FACTOR = 3.0

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
        self.outcome: Outcome | None = None
        if case.scenario.quick:
            self.add_marker("quick")
        if case.scenario.unsafe:
            self.add_marker("unsafe")

    def runtest(self) -> None:
        """Run the case on the host and raise unless it passed."""
        lab = self.config.stash[_LAB]
        self.outcome = lab.run(self)
        if self.outcome.verdict is Verdict.SKIP:
            pytest.skip(self.outcome.reason)
        if self.outcome.verdict is Verdict.FAIL and self.outcome.known and not lab.strict:
            pytest.xfail(f"known: {self.outcome.known}: {self.outcome.reason}")
        if self.outcome.verdict is not Verdict.PASS:
            raise NotPassed(self.outcome)

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


class Lab:
    """The hosts and the results file of one run."""

    def __init__(
        self,
        pool: HostPool,
        results: ResultsFile,
        timeout_s: float | None,
        issues: Sequence[KnownIssue] = (),
        *,
        strict: bool = False,
    ) -> None:
        self.pool = pool
        self.results = results
        self.strict = strict
        self._timeout_s = timeout_s
        self._issues = issues
        self.outcomes: dict[str, Outcome] = {}

    def run(self, item: ScenarioItem) -> Outcome:
        """Run one case, record it, and return its outcome."""
        case = item.case
        self.results.write("begin", case=case.id, claim=case.scenario.claim)
        started = time.monotonic()
        outcome = self._attempt(case)
        if outcome is None:
            self.results.write("retry", case=case.id, reason="the emulated host hung")
            outcome = self._attempt(case, last=True)
        if outcome is None:
            raise HarnessError(f"{case.id}: the last attempt had no outcome")
        outcome = self._known(case, outcome)
        self.outcomes[item.nodeid] = outcome
        self.results.write(
            "end",
            case=case.id,
            claim=case.scenario.claim,
            verdict=outcome.verdict.value,
            reason=outcome.reason,
            known=outcome.known,
            seconds=outcome.seconds,
            total_seconds=round(time.monotonic() - started, 3),
            host=self.pool.host(case.scenario.params).describe() if self._has_host(case) else None,
            evidence=outcome.evidence,
        )
        return outcome

    def _known(self, case: Case, outcome: Outcome) -> Outcome:
        if outcome.verdict not in (Verdict.FAIL, Verdict.PASS) or not self._has_host(case):
            return outcome
        host = self.pool.host(case.scenario.params).describe()
        issue = find(self._issues, case.id, host["kernel_release"], host["kind"])
        return replace(outcome, known=issue.id) if issue else outcome

    def _has_host(self, case: Case) -> bool:
        return self.pool.has(case.scenario.params)

    def _attempt(self, case: Case, *, last: bool = False) -> Outcome | None:
        """Return the outcome; None if the emulated host hung without a word: try again."""
        started = time.monotonic()
        params = case.scenario.params
        try:
            host, session = self.pool.session(params)
        except (NsvmError, OSError) as e:
            return Outcome(Verdict.ERROR, f"host: {e}", time.monotonic() - started)
        try:
            result = session.call(
                "harness.inside:run_case",
                timeout_s=self._timeout(case, host.kind),
                on_event=lambda event: self._record(case, event),
                name=case.scenario.function.__name__,
                values=dict(case.values),
                **_where(case),
            )
        except HostLost as lost:
            self.pool.drop(params)
            if lost.silent and not last:
                return None
            return judge_lost(lost, time.monotonic() - started)
        outcome = judge(result, case)
        if outcome.verdict is Verdict.FAIL:
            # What a failed scenario leaves behind in the kernel is not the next one's to find.
            self.pool.drop(params)
        return outcome

    def _timeout(self, case: Case, kind: str) -> float:
        if self._timeout_s is not None:
            return self._timeout_s
        factor = EMULATED_FACTOR if kind == "emulated" else 1.0
        return case.scenario.timeout_s * factor

    def _record(self, case: Case, event: dict[str, Any]) -> None:
        if event["event"] in ("emit", "kmsg", "output"):
            data = {key: value for key, value in event.items() if key not in ("event", "id")}
            self.results.write(event["event"], case=case.id, **data)


def _where(case: Case) -> dict[str, str]:
    """Return how a host finds the case's module: by name, or a user's own file as text."""
    function = case.scenario.function
    if function.__module__.startswith("harness.scenarios."):
        return {"module": function.__module__}
    file = function.__code__.co_filename
    return {"module": file, "source": Path(file).read_text()}


_LAB = pytest.StashKey[Lab]()


class Plugin:
    """Hooks; registered by `nsvm run` with a lab, and by the scenarios' conftest without."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        #: What is to run, known once collection is over.
        self.items: list[pytest.Item] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Remember what is to run."""
        self.items = list(session.items)

    def pytest_configure(self, config: pytest.Config) -> None:
        """Make the lab reachable from the items."""
        config.stash[_LAB] = self.lab
        for mark in ("quick: part of `make run`", "unsafe: may take the host down"):
            config.addinivalue_line("markers", mark)

    def pytest_pycollect_makemodule(
        self, module_path: Path, parent: pytest.Collector
    ) -> pytest.Module:
        """Take every file for one with scenarios."""
        return ScenarioModule.from_parent(parent, path=module_path)

    @pytest.hookimpl(tryfirst=True)
    def pytest_pycollect_makeitem(
        self, collector: pytest.Module, name: str, obj: object
    ) -> list[ScenarioItem] | None:
        """Turn a scenario into one item per case."""
        declared = scenario_of(obj)
        if declared is None or not isinstance(collector, pytest.Module):
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
        if isinstance(item, ScenarioItem) and item.outcome and call.when == "call":
            known_fail = item.outcome.known and item.outcome.verdict is Verdict.FAIL
            word = "KNOWN" if known_fail and not self.lab.strict else item.outcome.verdict.value
            setattr(report, _VERDICT, word)
            report.sections = []
            if item.outcome.verdict in (Verdict.ERROR, Verdict.MISS):
                report.when = "setup"
        return report

    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        """Show KernelCI's words."""
        verdict = getattr(report, _VERDICT, None)
        if verdict is None:
            return None
        return _CATEGORIES[verdict], _LETTERS[verdict], verdict


def missed(lab: Lab, items: list[pytest.Item]) -> Iterator[ScenarioItem]:
    """Yield the items that were to run and never did."""
    for item in items:
        if isinstance(item, ScenarioItem) and item.nodeid not in lab.outcomes:
            yield item


def record_missed(lab: Lab, items: list[pytest.Item], reason: str) -> int:
    """Give every item that never ran the verdict MISS; return how many there are."""
    count = 0
    for item in missed(lab, items):
        outcome = Outcome(Verdict.MISS, reason)
        lab.outcomes[item.nodeid] = outcome
        lab.results.write("end", case=item.case.id, claim=item.case.scenario.claim,
                          verdict="MISS", reason=reason, seconds=0.0)  # fmt: skip
        count += 1
    return count


__all__ = ["HostError", "Lab", "Plugin", "ScenarioItem", "record_missed"]
