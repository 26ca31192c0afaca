"""What a fleet's hosts recorded, as one: who is red and why, and whether anything was left out."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from harness.fleet.drive import Ended
from harness.fleet.plan import FleetPlan
from harness.report.results import ResultsFile, read_results
from harness.report.run_record import FILE, ResultsError, RunRecord, read_record
from harness.report.store import Store
from harness.report.verdict import STATUS_NOTHING, Verdict, exit_status


@dataclass(frozen=True)
class HostResult:
    """What became of one host's run."""

    host: str
    record: RunRecord
    part: str
    #: What makes it red whatever its cases say, each in one line.
    complaints: tuple[str, ...] = ()
    #: Exit status of its run; None if nobody knows.
    status: int | None = None

    @property
    def counts(self) -> dict[str, int]:
        """How many cases ended in which way; KNOWN is a FAIL that is a known issue's."""
        return dict(Counter(case.word for case in self.record.cases))

    @property
    def verdicts(self) -> list[Verdict]:
        """What the cases say, and an ERROR if there is something to complain about."""
        found = [Verdict.PASS if c.word == "KNOWN" else c.verdict for c in self.record.cases]
        if self.status == 1 and Verdict.FAIL not in found:
            found.append(Verdict.FAIL)  # with --strict, a known issue's
        return [*found, *([Verdict.ERROR] if self.complaints else [])]

    def as_json(self) -> dict[str, Any]:
        """Return what `nsvm fleet run --json` says of the host."""
        return {
            "status": exit_status(self.verdicts),
            "counts": self.counts,
            "complaints": list(self.complaints),
            "kernel": self.record.kernel,
            "part": self.part or None,
            "finished": self.record.finished,
            "seconds": self.record.seconds,
            "directory": str(self.record.directory),
            "cases": {
                case.case: {"verdict": case.verdict.value, "reason": case.reason}
                for case in self.record.cases
                if case.word not in ("PASS", "SKIP")
            },
        }


@dataclass(frozen=True)
class FleetResult:
    """What became of all of it."""

    plan: FleetPlan
    hosts: Sequence[HostResult]
    #: What is no single host's, each in one line.
    complaints: tuple[str, ...] = ()
    #: What is worth knowing, and makes nothing red.
    notes: tuple[str, ...] = field(default=())

    @property
    def status(self) -> int:
        """Exit status, as of `nsvm run`.

        A host that ran nothing is an ERROR, unless it was dealt a share of nothing.
        """
        verdicts = [verdict for host in self.hosts for verdict in host.verdicts]
        if self.complaints:
            verdicts.append(Verdict.ERROR)
        if not self.plan.deal and any(
            exit_status(host.verdicts) == STATUS_NOTHING for host in self.hosts
        ):
            verdicts.append(Verdict.ERROR)
        return exit_status(verdicts)

    def as_json(self) -> dict[str, Any]:
        """Return what `nsvm fleet run --json` writes."""
        counts: Counter[str] = Counter()
        for host in self.hosts:
            counts.update(host.counts)
        return {
            "status": self.status,
            "dealt": self.plan.deal,
            "counts": dict(counts),
            "complaints": list(self.complaints),
            "notes": list(self.notes),
            "directory": str(self.plan.directory),
            "store": str(self.plan.store),
            "hosts": {host.host: host.as_json() for host in self.hosts},
        }


def merge(plan: FleetPlan, ended: Mapping[str, Ended], complaints: Sequence[str]) -> FleetResult:
    """Put what all hosts recorded into the store, and say what became of each.

    Raises HostError: the store cannot be written, or what a host recorded cannot be read.
    """
    hosts = [_host_result(plan, host, ended.get(host, Ended(None))) for host in plan.hosts]
    with Store(plan.store) as store:
        for host in hosts:
            store.add(host.record)
    left_out = _left_out(plan, hosts) if plan.deal else []
    return FleetResult(plan, hosts, (*complaints, *left_out), tuple(_unequal(plan, hosts)))


def _host_result(plan: FleetPlan, host: str, ended: Ended) -> HostResult:
    where = plan.where(host)
    try:
        record = read_record(where / FILE)
    except ResultsError:
        _record_silence(where, host)
        said = f": {ended.said}" if ended.said else ""
        return HostResult(
            host, read_record(where / FILE), plan.part(host), (f"nothing was recorded{said}",)
        )
    complaints = list(record.complaints)
    if not record.finished:
        complaints.append(f"its run has no end{f': {ended.said}' if ended.said else ''}")
    elif ended.status not in (0, 1, 2, STATUS_NOTHING) and not complaints:
        complaints.append(f"its run ended with status {ended.status}: {ended.said}")
    elif ended.status == 2 and record.status == 0:
        complaints.append(f"its run was broken: {ended.said or 'see its results'}")
    return HostResult(host, record, plan.part(host), tuple(complaints), ended.status)


def _record_silence(where: Path, host: str) -> None:
    """Leave a run without an end, for reports to have a red line of the host."""
    with ResultsFile(where / FILE) as file:
        file.write(
            "run",
            version=version("nsvm-harness"),
            argv=sys.argv[1:],
            choice={"host": f"ssh:{host}", "kernel": ""},
        )


def _left_out(plan: FleetPlan, hosts: Sequence[HostResult]) -> list[str]:
    """Return what is wrong about the shares: together they must be all of the cases."""
    planned: set[str] = set()
    totals: set[int] = set()
    for host in hosts:
        events = [e for e in read_results(plan.where(host.host) / FILE) if e["event"] == "plan"]
        if not events:
            return [f"{host.host}: its share, {host.part} of the cases, was not run"]
        planned |= {case for case, _ in events[-1]["cases"]}
        totals.add(int(events[-1].get("of", 0)))
    if totals != {len(planned)}:
        return [f"the shares have {len(planned)} cases together, not {max(totals)}"]
    return []


def _unequal(plan: FleetPlan, hosts: Sequence[HostResult]) -> list[str]:
    kernels = {host.record.kernel for host in hosts if host.record.host}
    if not plan.deal or len(kernels) < 2:
        return []
    return [f"the hosts are not equal: each case ran on one of {', '.join(sorted(kernels))}"]
