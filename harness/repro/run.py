"""Runs reproducers on a host: each case and each experiment once, whoever asks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from harness.errors import HostLost, NsvmError
from harness.host.session import Host, Session
from harness.identify.finding import Finding, unseen
from harness.report.verdict import Outcome
from harness.repro.colour import Colour, Sight, of_findings, of_outcome, of_race, whole
from harness.repro.races import CPUS, race_for, race_name
from harness.repro.table import Reproducer, ReproError
from harness.runner.hosts import HostPool
from harness.runner.lab import Lab
from harness.scenarios.case import Case

_EXPERIMENT_TIMEOUT_S = 180.0
"""For one experiment and the call around it; it has a deadline of its own, which is shorter."""

_RACE_S = 15.0
"""For the race for one field; a window that is there is hit within a few seconds."""


@dataclass(frozen=True)
class Ran:
    """One reproducer on one host."""

    reproducer: Reproducer
    sights: tuple[Sight, ...]

    @property
    def colour(self) -> Colour:
        """Whether the bug showed."""
        return whole(self.sights)

    @property
    def decisive(self) -> Sight:
        """The first part that has the whole's colour."""
        return next(sight for sight in self.sights if sight.colour is self.colour)

    def to_plain(self) -> dict[str, Any]:
        """Return this as JSON takes it."""
        return {
            "name": self.reproducer.name,
            "colour": self.colour.value,
            "sights": [sight.to_plain() for sight in self.sights],
        }


class Bench:
    """Runs cases and experiments on the hosts of a pool, and remembers how they ended."""

    def __init__(
        self,
        pool: HostPool,
        lab: Lab,
        cases: Mapping[str, Case],
        kind: str,
        *,
        make: Callable[[int], Host] | None = None,
        unsafe: bool = False,
    ) -> None:
        """Prepare.

        Args:
            pool: of hosts of the one chosen kind.
            lab: what cases are run and recorded with.
            cases: all there are, by id.
            kind: of host: ``local`` or ``emulated``.
            make: gives an emulated host with so many CPUs, for races.
            unsafe: run what may end a local host, too.

        """
        self._pool = pool
        self._lab = lab
        self._cases = cases
        self._kind = kind
        self._make = make
        self._unsafe = unsafe
        #: Of the last host that was made for races.
        self.described: dict[str, Any] = {}
        self._outcomes: dict[str, Outcome] = {}
        self._findings: dict[tuple[str, tuple[tuple[str, str], ...]], list[Finding]] = {}

    def run(self, one: Reproducer) -> Ran:
        """Run all that shows a bug.

        Raises:
            ReproError: it names a case that does not exist.
        """
        if reason := self._not_here(one):
            return Ran(one, (Sight(one.name, Colour.SKIP, reason),))
        if one.knob:
            return Ran(one, (of_findings(one, self._found(one)),))
        if one.races:
            return Ran(one, tuple(self._races(one)))
        return Ran(one, tuple(self._sights(one)))

    def _not_here(self, one: Reproducer) -> str:
        if one.host not in ("", self._kind):
            return f"shows on an {one.host} host only; this one is {self._kind}"
        if self._kind != "emulated" and one.unsafe and not self._unsafe:
            return "may end this host: --unsafe runs it nevertheless"
        return ""

    def _sights(self, one: Reproducer) -> Iterator[Sight]:
        for case_id in one.cases:
            case = self._cases.get(case_id)
            if case is None:
                raise ReproError(f"reproducer {one.name}: there is no case {case_id}")
            if case_id not in self._outcomes:
                self._outcomes[case_id] = self._lab.run(self._pool, case).outcome
            yield of_outcome(one, case_id, self._outcomes[case_id])

    def _races(self, one: Reproducer) -> Iterator[Sight]:
        with ExitStack() as stack:
            if self._kind == "emulated" and self._make is not None:
                host = stack.enter_context(self._make(CPUS))
                session = host.start()
                self.described = host.describe()
            else:
                _, session = self._pool.session({})
            for name in one.races:
                yield _race(session, name)

    def _found(self, one: Reproducer) -> list[Finding]:
        params = dict(one.params or {})
        key = (one.experiment.name, tuple(sorted(params.items())))
        if key not in self._findings:
            self._findings[key] = self._conduct(one, params)
        return self._findings[key]

    def _conduct(self, one: Reproducer, params: Mapping[str, str]) -> list[Finding]:
        """Run the experiment; what kept it from ending is why its knob was not seen."""
        for attempt in (1, 2):
            try:
                _, session = self._pool.session(params)
                result = session.call(
                    "harness.identify.calls:run_experiment",
                    timeout_s=_EXPERIMENT_TIMEOUT_S,
                    name=one.experiment.name,
                )
                return [Finding.from_plain(plain) for plain in result.unwrap(one.experiment.name)]
            except HostLost as lost:
                self._pool.drop(params)
                # An emulated host hangs now and then, with nothing running at all.
                if not lost.silent or attempt == 2:
                    return [unseen(one.knob, f"the host was lost: {lost}")]
            except NsvmError as e:
                return [unseen(one.knob, str(e))]
        raise AssertionError("unreachable")


def _race(session: Session, name: str) -> Sight:
    """Race for one field; what kept it from its end is no word on the bug."""
    try:
        return of_race(race_for(session, name, _RACE_S))
    except NsvmError as e:
        return Sight(race_name(name), Colour.BROKE, str(e).partition("\n")[0])
