"""One run of scenarios from its beginning to its end: options, hosts, results, summary, status."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Self

import psutil

from harness.errors import HostError
from harness.host.session import Cancelled
from harness.report.junit import add_error
from harness.report.results import ResultsFile
from harness.report.run_record import FILE as RESULTS_FILE
from harness.report.run_record import read_record
from harness.report.store import FILE as STORE_FILE
from harness.report.store import Store
from harness.report.verdict import STATUS_NOTHING, Outcome, Verdict, exit_status
from harness.runner.driver import describe_machine
from harness.runner.hosts import DEFAULT_KERNEL, HostChoice, HostPool
from harness.runner.known_issues import load as load_known_issues
from harness.runner.lab import Lab, Ran
from harness.runner.requirements import ask, check_names, complaint
from harness.runner.workers import Workers
from harness.scenarios.case import Case

#: Where runs go that are not told where.
OWN_RESULTS = Path("results")

#: Environment variable: the results store.
STORE_VARIABLE = "NSVM_STORE"

#: An emulated host has a machine at work and one in reserve, of 768 MiB each, and QEMU's own.
_MEMORY_PER_JOB = 2 << 30
#: More was not tried.
_MOST_JOBS = 4


@dataclass(frozen=True)
class Part:
    """One of several parts of the same cases, dealt out like cards."""

    #: From 1 to `count`.
    number: int
    count: int
    #: How many cases there are in all parts together.
    of: int = 0

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


@dataclass(frozen=True)
class RunOptions:
    """What the command line says about a run."""

    choice: HostChoice = field(default_factory=HostChoice)
    #: None: a new one below ``results/``.
    directory: Path | None = None
    #: For every case, in seconds; None: each scenario's own.
    timeout_s: float | None = None
    strict: bool = False
    #: One machine for all cases of a worker, not a fresh one for each.
    shared: bool = False
    #: Also what may take a local host down.
    unsafe: bool = False
    #: Hosts at work at the same time; None: what fits.
    jobs: int | None = None
    #: Names of facts that must hold.
    require: tuple[str, ...] = ()
    #: What all machines go through; None: what each scenario says.
    lifecycle: str | None = None
    #: The results store; None: $NSVM_STORE, else beside the directory of results.
    store: Path | None = None


def default_jobs(kind: str) -> int:
    """Return how many hosts of this kind to use at the same time."""
    if kind != "emulated":
        return 1
    cpus = len(os.sched_getaffinity(0))
    fit = psutil.virtual_memory().available // _MEMORY_PER_JOB
    return max(1, min(cpus, fit, _MOST_JOBS))


class Run:
    """A run that is being recorded; a context manager that ends its hosts and closes its files."""

    def __init__(self, options: RunOptions, log: Callable[[str], None] = lambda text: None) -> None:
        """Prepare a run.

        Raises:
            HarnessError, HostError: the options do not fit together, or name what is not there.
        """
        check_names(options.require)
        self.options = options
        self.kind = options.choice.resolved()
        self.jobs = options.jobs or default_jobs(self.kind)
        if self.kind != "emulated" and self.jobs > 1:
            raise HostError(
                f"{self.jobs} jobs: on {self.kind}, cases run one after the other; they share its"
                " kernel log and its memory"
            )
        self.directory = options.directory or new_directory()
        #: What is to run, in order, and how it ended, by its number.
        self.cases: Sequence[Case] = ()
        #: Which part of them is this run's own; None: all.
        self.part: Part | None = None
        self.outcomes: dict[int, Outcome] = {}
        #: What makes the run an ERROR whatever the cases say; each in one line.
        self.complaints: list[str] = []
        self.finished = False
        #: What is left is not missed: it was to end with the first failure.
        self.has_enough = False
        own = os.environ.get(STORE_VARIABLE)
        self.store = options.store or (
            Path(own) if own else self.directory.resolve().parent / STORE_FILE
        )
        self._log = log
        self._started = time.monotonic()
        self._stack = ExitStack()
        self._pools: list[HostPool] = []
        self._workers: Workers | None = None
        self._seconds = 0.0

    def __enter__(self) -> Self:
        """Begin to record, and ask for what is required.

        Raises:
            HostError: the results cannot be written, or the host cannot be had.
        """
        with ExitStack() as stack:
            file = stack.enter_context(ResultsFile(self.directory / RESULTS_FILE))
            options = self.options
            file.write(
                "run",
                version=version("nsvm-harness"),
                revision=_revision(),
                argv=sys.argv[1:],
                machine=describe_machine(),
                choice=self._chosen(),
            )
            # From now on, whatever becomes of this process: a run without an end is in the report.
            self._into_store()
            stack.callback(self._into_store)
            self._pools = [
                stack.enter_context(
                    HostPool(options.choice, fresh=not options.shared, log=self._log)
                )
                for _ in range(self.jobs)
            ]
            # A kernel that cannot be had is one error, not one of every case.
            self._pools[0].host({})
            self.lab = Lab(
                file,
                options.timeout_s,
                load_known_issues(),
                strict=options.strict,
                lifecycle=options.lifecycle,
            )
            self._require()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _chosen(self) -> dict[str, str]:
        """Return which host and kernel were asked for: what there is to tell if none comes up."""
        kernel = ""  # a lab machine's own: only it knows
        if self.kind == "emulated":
            kernel = self.options.choice.kernel or DEFAULT_KERNEL
        elif self.kind == "local":
            kernel = os.uname().release
        return {"host": self.kind, "kernel": kernel}

    def _into_store(self) -> None:
        """Put what is recorded into the results store; where that fails the files are there."""
        try:
            with Store(self.store) as store:
                store.add(read_record(self.directory / RESULTS_FILE))
        except HostError as e:
            self._log(f"not in the results store: {e}")

    def _require(self) -> None:
        if not self.options.require:
            return
        for answer in ask(self.options.choice, self.options.require, self._log):
            self.lab.results.write("require", **vars(answer))
            if said := complaint(answer):
                self.complaints.append(said)

    def workers(self) -> Workers:
        """Return what runs `cases`, not yet started; `wait` gives their outcomes."""
        part = {} if self.part is None else {"part": str(self.part), "of": self.part.of}
        cases = [[case.id, case.repeat] for case in self.cases]
        self.lab.results.write("plan", cases=cases, **part)
        pools = self._pools[: max(1, len(self.cases))]
        self._workers = Workers(self.lab, pools, self.cases)
        return self._workers

    def wait(self, number: int) -> Ran:
        """Return how case `number` ended, once it has.

        Raises:
            Cancelled: it will not be run.
        """
        if self._workers is None:
            raise Cancelled("nothing was started")
        return self._workers.wait(number)

    def finish(self, why: str) -> None:
        """Record the end of the run; the cases that never ran are MISS, and `why` says it.

        Only the first time counts.
        """
        if self.finished:
            return
        self.finished = True
        ended = self._workers.ended() if self._workers else {}
        self.complaints += self._workers.unavailable if self._workers else []
        reason = "; ".join(self.complaints) or f"the run ended early ({why})"
        self.outcomes = {
            number: ended[number].outcome
            if number in ended
            else self.lab.record_missed(case, reason)
            for number, case in enumerate(self.cases)
            if number in ended or not self.has_enough
        }
        errors = self._workers.errors if self._workers else ()
        self.complaints += [f"the harness's own: {type(e).__name__}: {e}" for e in errors]
        self._seconds = round(time.monotonic() - self._started, 1)
        hosts = self._workers.hosts() if self._workers else []
        self.lab.results.write(
            "summary",
            counts=self.counts(),
            seconds=self._seconds,
            jobs=self.jobs,
            hosts=hosts,
            complaints=self.complaints,
        )

    def counts(self) -> dict[str, int]:
        """Return how many cases ended in which way; ``known`` FAILs are among the FAILs."""
        outcomes = self.outcomes.values()
        counts = {v.value: sum(o.verdict is v for o in outcomes) for v in Verdict}
        return counts | {"known": sum(_is_known(o) for o in outcomes)}

    def status(self, *, broken: bool = False) -> int:
        """Return the exit status; `broken`: something else than a case went wrong."""
        verdicts = [
            Verdict.PASS if self.lab.is_known_fail(o) else o.verdict for o in self.outcomes.values()
        ]
        if broken or self.complaints:
            verdicts.append(Verdict.ERROR)
        return exit_status(verdicts)

    def redden_junit(self, path: Path, status: int) -> None:
        """See to it that the JUnit file of a run that is not green is not, either.

        Raises:
            HostError: it cannot be read or written.
        """
        if status and path.exists():
            nothing = "nothing ran, or all was skipped"
            said = "; ".join(self.complaints) or "the run was broken"
            add_error(path, nothing if status == STATUS_NOTHING else said)

    def summary(self) -> Iterator[str]:
        """Yield lines: each outcome that needs to be looked at, then the totals."""
        yield from (f"ERROR  {said}" for said in self.complaints)
        for number, outcome in self.outcomes.items():
            case = self.cases[number]
            if outcome.verdict is Verdict.PASS and outcome.known:
                yield f"PASS  {case.id}: known issue {outcome.known} does not show here"
            elif _is_known(outcome):
                yield f"FAIL  {case.id} (known: {outcome.known}): {outcome.reason}"
            elif outcome.verdict is Verdict.MISS and self._is_said(outcome.reason):
                continue  # said above
            elif outcome.verdict not in (Verdict.PASS, Verdict.SKIP):
                yield f"{outcome.verdict.value}  {case.id}: {outcome.reason}"
        total = ", ".join(f"{count} {word}" for word, count in self.counts().items() if count)
        took = f"{self._seconds:.0f} s"
        yield f"{total or 'nothing ran'} in {took}; results in {self.directory}"

    def _is_said(self, reason: str) -> bool:
        return any(reason.startswith(said) for said in self.complaints)


def _is_known(outcome: Outcome) -> bool:
    return outcome.verdict is Verdict.FAIL and bool(outcome.known)


def _revision() -> str:
    """Return the tree's git revision; empty when there is no git or no repository."""
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def new_directory() -> Path:
    """Make and return a directory that no other run writes to, named for the time.

    Raises HostError: it cannot be made.
    """
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    path, number = OWN_RESULTS / stamp, 1
    while True:
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            number += 1
            path = path.with_name(f"{stamp}-{number}")
        except OSError as e:
            raise HostError(f"cannot make {path}: {e.strerror}") from e
        else:
            return path
