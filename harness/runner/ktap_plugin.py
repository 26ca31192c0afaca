"""The pytest plugin that writes KTAP while a run goes on, one result as soon as there is one."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest

from harness.report import ktap
from harness.report.run_record import CaseRecord
from harness.report.verdict import Outcome
from harness.runner.plugin import ScenarioItem
from harness.runner.run import Run


class KtapPlugin:
    """Writes through `write`, which gets whole lines without their ends."""

    def __init__(self, run: Run, write: Callable[[str], None]) -> None:
        self._run = run
        self._write = write

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Write the version and the plan."""
        self._say(ktap.header(sum(isinstance(item, ScenarioItem) for item in session.items)))

    def pytest_runtest_teardown(self, item: pytest.Item) -> None:
        """Write how a case ended."""
        if isinstance(item, ScenarioItem) and item.ran is not None:
            self._result(item, item.ran.outcome)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Write what pytest's loop did not take up: the plan holds, or is given up."""
        for item in session.items:
            if not isinstance(item, ScenarioItem) or item.ran is not None:
                continue
            if outcome := self._run.outcomes.get(item.number):
                self._result(item, outcome)
        if self._run.has_enough:
            self._write("Bail out! the first failure ends the run")

    def _result(self, item: ScenarioItem, outcome: Outcome) -> None:
        known = outcome.known if self._run.lab.is_known_fail(outcome) else ""
        record = CaseRecord(item.case.id, outcome.verdict, outcome.reason, known)
        self._say(ktap.result(item.number + 1, record, title=item.name))

    def _say(self, lines: Iterable[str]) -> None:
        for line in lines:
            self._write(line)
