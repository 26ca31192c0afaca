"""A whole cross-check, seen from outside of the host: it goes on whatever becomes of that."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from harness.crosscheck.complaints import known_complaint, known_death
from harness.crosscheck.coverage import Coverage, not_asked
from harness.crosscheck.generator import sequence
from harness.crosscheck.notation import sequence_from, to_plain
from harness.crosscheck.record import Bundle, told
from harness.crosscheck.settings import Setting
from harness.crosscheck.shrink import Budget, shrink
from harness.errors import HostLost
from harness.host.session import CallResult, Event, Host, Session
from harness.model.operations import Operation
from harness.probe.kmsg import splats
from harness.report.verdict import Verdict

_SLICE: Final = 2000
"""Steps of one call: after as many, a fresh process."""
_PER_STEP_S: Final = 0.25
_CALL_S: Final = 300.0
_REPEAT_S: Final = 60.0
_MOST_LOST: Final = 20
"""Hosts lost, after which a run is given up."""
_LOST_TRIES: Final = 40
_LOST_S: Final = 120.0

_EMULATED: Final = "emulated"

Operations = tuple[Operation, ...]
Log = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What to cross-check."""

    steps: int
    seed: int
    focus: str | None
    setting: Setting
    memory: bool = False
    enough: int = 0
    """Findings, after which the run ends; 0: at the last step only."""


@dataclass
class Report:
    """What came of it."""

    bundles: list[Bundle] = field(default_factory=list)
    """One for each finding."""
    errors: list[str] = field(default_factory=list)
    """What the harness or the lab did wrong."""
    known: Counter[str] = field(default_factory=Counter)
    """Named deviations, and how often each was met."""
    coverage: Coverage = field(default_factory=Coverage)
    asked: set[str] = field(default_factory=set)
    """Knobs that decided something."""
    steps: int = 0
    sequences: int = 0
    again: Counter[str] = field(default_factory=Counter)
    """Findings that were met again, by signature; each is recorded once."""
    hosts_lost: int = 0
    seconds: float = 0.0
    times: Counter[str] = field(default_factory=Counter)
    """Seconds by `model_s`, `kernel_s`, `harness_s`."""

    @property
    def verdict(self) -> Verdict:
        """FAIL for any finding without a name."""
        if self.bundles:
            return Verdict.FAIL
        return Verdict.ERROR if self.errors or not self.steps else Verdict.PASS

    def to_plain(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        return {
            "verdict": self.verdict.value,
            "steps": self.steps,
            "sequences": self.sequences,
            "seconds": round(self.seconds, 2),
            "steps_per_s": round(self.steps / self.seconds, 1) if self.seconds else 0.0,
            "times_s": {name: round(value, 2) for name, value in self.times.items()},
            "hosts_lost": self.hosts_lost,
            "findings": [bundle.to_plain() for bundle in self.bundles],
            "met_again": dict(self.again),
            "errors": self.errors,
            "known_deviations": dict(self.known),
            "transitions": self.coverage.rows(),
            "knobs_asked": sorted(self.asked),
            "knobs_not_asked": not_asked(self.asked),
        }


class CrosscheckRun:
    """Runs sequences on a host, starting it again as often as need be."""

    def __init__(
        self, host: Host, plan: Plan, log: Log, keep: Callable[[Bundle], None] = lambda b: None
    ) -> None:
        """Prepare a run.

        Args:
            host: where to run; it is started by whoever calls `go`.
            plan: what to run.
            log: is told of trouble as it comes.
            keep: is given every finding at once, whatever becomes of the run.

        """
        self.report = Report()
        self._host, self._plan, self._log, self._keep = host, plan, log, keep
        self._next = 0
        self._silent: int | None = None
        """The sequence at which an emulated host last fell silent."""
        self._signatures: set[str] = set()
        """Of differences that were recorded: each is made small once."""
        self._said: dict[int, list[str]] = {}
        """What the kernel complained of, by sequence."""

    def go(self, session: Session) -> Report:
        """Run all of it; return the report, whatever happens."""
        started = time.monotonic()
        while not self._ends():
            try:
                usable = self._call(session)
            except HostLost as e:
                self._lost(e)
                usable = False
            if self._tell_splats() or not usable:
                session = self._host.start()
        self.report.seconds = time.monotonic() - started
        if self.report.hosts_lost >= _MOST_LOST:
            self.report.errors.append(f"given up: {self.report.hosts_lost} hosts were lost")
        return self.report

    def _ends(self) -> bool:
        report, plan = self.report, self._plan
        found = bool(plan.enough) and len(report.bundles) >= plan.enough
        return found or report.steps >= plan.steps or report.hosts_lost >= _MOST_LOST

    def _call(self, session: Session) -> bool:
        """Run a slice; return whether the session is of further use."""
        plan = self._plan
        left = min(_SLICE, plan.steps - self.report.steps)
        result = session.call(
            "harness.crosscheck.calls:crosscheck",
            timeout_s=_CALL_S + _PER_STEP_S * left,
            on_event=self._on_event,
            seed=plan.seed,
            first=self._next,
            steps=left,
            focus=plan.focus,
            setting=plan.setting.name,
            turned=dict(plan.setting.turned),
            memory=plan.memory,
            told=sorted(self._signatures),
            enough=max(0, plan.enough - len(self.report.bundles)),
        )
        if result.outcome == "return":
            self.report.asked.update(result.value["asked"])
            for name in ("model_s", "kernel_s", "harness_s"):
                self.report.times[name] += result.value[name]
            return True
        self._broken(result)
        return result.outcome not in ("stuck", "timeout")

    def _on_event(self, event: Event) -> None:
        if event["event"] == "kmsg":
            for line in splats([event["text"]]):
                self._said.setdefault(self._next, []).append(line)
        if event["event"] != "emit":
            return
        data = event["data"]
        if event["kind"] == "begins":
            self._next = data["number"]
        elif event["kind"] == "checked":
            self.report.steps += data["steps"]
            self.report.sequences += 1
            self.report.known.update(data["known"])
            self.report.coverage.merge(data["covered"])
        elif event["kind"] == "again":
            self.report.again[data["signature"]] += 1
        elif event["kind"] == "finding":
            self._signatures.add(data["signature"])
            self._found(data)

    def _found(self, data: dict[str, Any]) -> None:
        operations = sequence_from(data["operations"])
        what = "the model and the machine differ"
        evidence = {
            "results": data["results"],
            "explained_by": data["explained_by"],
            "reproducible": data["reproducible"],
        }
        self._add(operations, what, data["difference"], evidence)

    def _add(
        self,
        operations: Operations,
        what: str,
        difference: dict[str, Any] | None = None,
        evidence: dict[str, Any] | None = None,
        number: int | None = None,
    ) -> None:
        plan = self._plan
        found_by = {
            "seed": plan.seed,
            "sequence": self._next if number is None else number,
            "focus": plan.focus,
            "host": self._host.describe(),
        }
        bundle = Bundle(
            operations,
            plan.setting,
            kernel=str(self._host.describe()["kernel_release"]),
            what=what,
            difference=difference or {},
            evidence={**found_by, **(evidence or {})},
        )
        self.report.bundles.append(bundle)
        self._keep(bundle)
        how = f": {told(bundle.difference)}" if bundle.difference else ""
        self._log(
            f"finding {len(self.report.bundles)}, sequence {found_by['sequence']}: {what}{how}"
        )

    # Trouble: a finding too, and never the end

    def _broken(self, result: CallResult) -> None:
        """Record a call that did not return, and go on behind its sequence."""
        if result.outcome == "raise":
            message = result.error.get("message", "")
            kind = result.error.get("type", "error")
            self.report.errors.append(f"sequence {self._next}: {kind}: {message}")
        else:
            what = f"the process ended: {result.outcome} {result.raw.get('status', '')}".strip()
            self._add(self._sequence(), what, evidence={"output": result.output[-20:]})
        self._next += 1

    def _lost(self, error: HostLost) -> None:
        self.report.hosts_lost += 1
        if known := known_death(error.console, self._sequence()):
            self.report.known[known.id] += 1
            self._log(f"sequence {self._next}: {known.id}: {known.what}")
            self._next += 1
            return
        if error.silent and self._silent != self._next:
            # The emulation's own kind of hang: the same sequence gets one more try.
            self._silent = self._next
            self._log(f"the host fell silent at sequence {self._next}: once more")
            return
        shown = self._sequence()
        if not error.silent:
            # A silence takes its deadline every time; a dead kernel tells at once.
            shown = self._smaller(shown, self._loses_the_host)
        self._add(shown, f"the host was lost: {error}", evidence={"console": error.console[-4000:]})
        self._next += 1

    def _tell_splats(self) -> bool:
        """Record what the kernel complained of; tell whether that took the session away."""
        told = False
        for number, lines in self._said.items():
            operations = sequence(self._plan.seed, number, self._plan.focus)
            known = known_complaint(lines, operations)
            if known is not None:
                self.report.known[known.id] += 1
                continue
            told = True
            shown = self._smaller(operations, self._makes_it_complain)
            self._add(
                shown,
                f"the kernel complained: {lines[0]}",
                evidence={"kernel_log": lines},
                number=number,
            )
        self._said.clear()
        return told

    def _sequence(self) -> Operations:
        return sequence(self._plan.seed, self._next, self._plan.focus)

    def _smaller(self, operations: Operations, shows: Callable[[Operations], bool]) -> Operations:
        """Make a sequence small, each try on a fresh host; elsewhere leave it as it is."""
        if self._host.kind != _EMULATED:
            return operations
        budget = Budget(_LOST_TRIES, _LOST_S)
        if not (budget.take() and shows(operations)):
            return operations
        return shrink(operations, shows, budget)

    def _loses_the_host(self, operations: Operations) -> bool:
        try:
            repeat(self._host.start(), operations, self._plan.setting, explain=False)
        except HostLost:
            return True
        return False

    def _makes_it_complain(self, operations: Operations) -> bool:
        try:
            result = repeat(self._host.start(), operations, self._plan.setting, explain=False)
        except HostLost:
            return False
        return bool(splats(event["text"] for event in result.kmsg))


def repeat(
    session: Session,
    operations: Operations,
    setting: Setting,
    *,
    explain: bool = True,
) -> CallResult:
    """Run one sequence in a host; the value says what differed.

    Raises HostLost: the host did not survive it.
    """
    return session.call(
        "harness.crosscheck.calls:repeat",
        timeout_s=_REPEAT_S,
        operations=[to_plain(each) for each in operations],
        setting=setting.name,
        turned=dict(setting.turned),
        explain=explain,
    )
