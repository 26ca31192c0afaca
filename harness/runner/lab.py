"""What the cases of one run share: how long each may take, where results go, what is known."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from harness.errors import HarnessError, HostLost, HostUnavailable, NsvmError
from harness.host.session import Cancelled
from harness.report.results import ResultsFile
from harness.report.verdict import Outcome, Verdict
from harness.runner.hosts import HostPool
from harness.runner.judge import judge, judge_lost
from harness.runner.known_issues import KnownIssue, find
from harness.scenarios.case import Case

#: How much slower everything is under TCG, for timeouts.
EMULATED_FACTOR = 3.0


@dataclass(frozen=True)
class Ran:
    """How a case ended, and how long it took with all that it needed, in seconds."""

    outcome: Outcome
    total_seconds: float


class Lab:
    """Runs cases on hosts of a pool and records them; may be used by several threads.

    Each thread has a pool of its own.
    """

    def __init__(
        self,
        results: ResultsFile,
        timeout_s: float | None = None,
        issues: Sequence[KnownIssue] = (),
        *,
        strict: bool = False,
        lifecycle: str | None = None,
    ) -> None:
        self.results = results
        self.strict = strict
        self._lifecycle = lifecycle
        self._timeout_s = timeout_s
        self._issues = issues
        #: Set when the run ends early: what is under way then has no outcome.
        self.stopping = threading.Event()

    def run(self, pool: HostPool, case: Case) -> Ran:
        """Run one case, record it, and say how it ended.

        Raises:
            Cancelled: the run ends early, and this case has no outcome.
            HostUnavailable: the host cannot be had, for this case and for those behind it.
        """
        self.results.write(
            "begin",
            case=case.id,
            repeat=case.repeat,
            claim=case.scenario.claim,
            levels=case.scenario.levels,
        )
        started = time.monotonic()
        outcome = self._attempt(pool, case)
        if outcome is None:
            self.results.write("retry", case=case.id, reason="the emulated host hung")
            outcome = self._attempt(pool, case, last=True)
        if outcome is None:
            raise HarnessError(f"{case.id}: the last attempt had no outcome")
        if self.stopping.is_set():
            raise Cancelled("the run ends early")
        params = case.scenario.host_params
        host = pool.host(params).describe() if pool.has(params) else None
        ran = Ran(self._known(case, outcome, host), round(time.monotonic() - started, 3))
        self._record_end(case, ran, host)
        return ran

    def record_missed(self, case: Case, reason: str) -> Outcome:
        """Give a case that was to run and never did its outcome."""
        outcome = Outcome(Verdict.MISS, reason)
        self._record_end(case, Ran(outcome, 0.0), None)
        return outcome

    def is_known_fail(self, outcome: Outcome) -> bool:
        """Say whether an outcome is a FAIL that does not fail the run."""
        return outcome.verdict is Verdict.FAIL and bool(outcome.known) and not self.strict

    def _record_end(self, case: Case, ran: Ran, host: dict[str, Any] | None) -> None:
        outcome = ran.outcome
        self.results.write(
            "end",
            case=case.id,
            repeat=case.repeat,
            claim=case.scenario.claim,
            verdict=outcome.verdict.value,
            reason=outcome.reason,
            known=outcome.known,
            seconds=outcome.seconds,
            total_seconds=ran.total_seconds,
            host=host,
            evidence=outcome.evidence,
        )

    def _known(self, case: Case, outcome: Outcome, host: dict[str, Any] | None) -> Outcome:
        if outcome.verdict not in (Verdict.FAIL, Verdict.PASS) or host is None:
            return outcome
        issue = find(self._issues, case.id, host["kernel_release"], host["kind"])
        if issue is None:
            return outcome
        if issue.has_expired(date.today()):
            said = f"known issue {issue.id} expired on {issue.expires}"
            return replace(outcome, reason=f"{outcome.reason}\n({said})".strip())
        return replace(outcome, known=issue.id)

    def _attempt(self, pool: HostPool, case: Case, *, last: bool = False) -> Outcome | None:
        """Return the outcome; None if the emulated host hung without a word: try again."""
        started = time.monotonic()
        params = case.scenario.host_params
        try:
            host, session = pool.session(params)
        except HostUnavailable:
            raise
        except (NsvmError, OSError) as e:
            return Outcome(Verdict.ERROR, f"host: {e}", time.monotonic() - started)
        if self.stopping.is_set():
            raise Cancelled("the run ends early")
        try:
            result = session.call(
                "harness.inside:run_case",
                timeout_s=self._timeout(case, host.kind),
                on_event=lambda event: self._record(case, event),
                name=case.scenario.function.__name__,
                values=dict(case.values),
                lifecycle=self._lifecycle,
                **_where(case),
            )
        except HostLost as lost:
            pool.drop(params)
            if lost.silent and not last:
                return None
            return judge_lost(lost, time.monotonic() - started)
        outcome = judge(result, case)
        if outcome.verdict is Verdict.FAIL:
            # What a failed scenario leaves behind in the kernel is not the next one's to find.
            pool.drop(params)
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
