"""Everything that `nsvm mutants` runs on one kernel, with a bug put back or without."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from harness.commands.crosscheck_run import CrosscheckRun, Plan
from harness.crosscheck.record import told
from harness.crosscheck.settings import Setting, setting_for
from harness.host.kernel_build import Variant
from harness.report.results import ResultsFile
from harness.report.verdict import Outcome, Verdict
from harness.repro.mutants import (
    CrossChecked,
    Enough,
    KernelRun,
    Told,
    able_to_notice,
    compare,
    run_cases,
    run_until_noticed,
)
from harness.repro.peers import passed, run_peers
from harness.repro.races import CPUS, unknown_window
from harness.runner.hosts import HostChoice, HostPool, make_host
from harness.runner.lab import Lab
from harness.scenarios.case import Case

Log = Callable[[str], None]

#: Of a line of the kernel's log: differs from run to run.
_WHO = re.compile(r"CPU: \d+ PID: \d+ ")


@dataclass(frozen=True)
class Work:
    """What is to be run on each kernel."""

    cases: Sequence[Case]
    steps: int
    """Of the cross-check; 0: none."""
    seed: int
    enough: Enough
    race_s: float = 0.0
    """For each field of vmcb12, where nothing else noticed; 0: none."""
    selftests: Mapping[str, Path] | None = None


@dataclass(frozen=True)
class Bugged:
    """A kernel with a bug put back."""

    spec: str
    """As `--kernel` takes it."""
    bug: Variant
    own: frozenset[str]
    """The cases that the bug's reproducers name."""


def run_without(spec: str, work: Work, directory: Path, log: Log) -> KernelRun:
    """Run everything on the kernel without a bug.

    Raises NsvmError: the kernel cannot be had, or its host does not come up.
    """
    with _on(spec, directory, log) as (pool, lab):
        crosscheck = _crosscheck(pool, work, log) if work.steps else None
        peers = run_peers(pool, work.selftests) if work.selftests is not None else None
        outcomes = run_cases(pool, lab, work.cases, _teller(log))
        return KernelRun(outcomes, crosscheck, peers=peers)


def run_with(kernel: Bugged, work: Work, before: KernelRun, directory: Path, log: Log) -> KernelRun:
    """Run on a kernel with a bug what may notice it, until enough has.

    Raises NsvmError: the kernel cannot be built, or its host does not come up.
    """
    started = time.monotonic()
    with _on(kernel.spec, directory, log) as (pool, lab):
        # First, as its host is not to have what a failed case left in the kernel.
        crosscheck = None
        if work.steps and before.crosscheck is not None:
            crosscheck = _crosscheck(pool, work, log, len(before.crosscheck.findings) + 1)
        found = bool(crosscheck and crosscheck.finding_beside(before.crosscheck))
        able = able_to_notice(before, work.cases, kernel.own)
        enough = replace(work.enough, noticed=found)
        run = run_until_noticed(pool, lab, able, _teller(log), enough)
        peers = None
        if work.selftests is not None and before.peers is not None:
            peers = run_peers(pool, work.selftests, passed(before.peers))
    run = replace(run, crosscheck=crosscheck, peers=peers)
    if work.race_s and not compare(kernel.bug, before, run).noticed:
        with make_host(HostChoice("emulated", kernel.spec), log=log, cpus=CPUS) as host:
            run = replace(run, window=unknown_window(host, work.race_s))
    return replace(run, seconds=time.monotonic() - started)


@contextmanager
def _on(spec: str, directory: Path, log: Log) -> Iterator[tuple[HostPool, Lab]]:
    choice = HostChoice("emulated", spec)
    with (
        ResultsFile(directory / "results.jsonl") as file,
        HostPool(choice, fresh=False, log=log) as pool,
    ):
        yield pool, Lab(file)


def _teller(log: Log) -> Told:
    def tell(case: Case, outcome: Outcome) -> None:
        if outcome.verdict in (Verdict.ERROR, Verdict.MISS):
            log(f"{outcome.verdict.value} {case.id}: {outcome.reason.partition(chr(10))[0]}")

    return tell


def _crosscheck(pool: HostPool, work: Work, log: Log, enough: int = 0) -> CrossChecked:
    host, session = pool.session({})
    setting = Setting(setting_for(str(host.describe()["kernel_release"])))
    plan = Plan(work.steps, work.seed, None, setting, enough=enough)
    report = CrosscheckRun(host, plan, log).go(session)
    # Its host may have been started anew: the session that the pool has may be gone.
    pool.drop({})
    findings = tuple(
        f"{bundle.what}: {told(bundle.difference)}"
        if bundle.difference
        else _WHO.sub("", bundle.what)
        for bundle in report.bundles
    )
    return CrossChecked(findings, "; ".join(report.errors))
