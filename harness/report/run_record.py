"""What one run recorded; a run that was cut short counts for what it has.

A case that was begun, or planned, and has no end in a run that has none either is a MISS: what died
in the middle is in the report, and is never taken for something that passed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.errors import HostError
from harness.report.reproduce import chooses
from harness.report.results import read_results
from harness.report.verdict import Verdict, exit_status

FILE = "results.jsonl"

#: An evidence longer than this is cut: a kernel that prints in a loop is not to fill the report.
MOST_EVIDENCE = 64 << 10

#: A run that has no end yet; none of `exit_status`'s numbers.
STATUS_UNFINISHED = 3


class ResultsError(HostError):
    """A directory that holds no results; one line says what is wrong with it."""


@dataclass(frozen=True)
class Metric:
    """Something that scenarios measure and note, and that is worth a plot over time."""

    name: str
    unit: str
    #: The note's `what`, and the key of the figure in it.
    what: str
    key: str


METRICS = (
    Metric("memory per vCPU", "bytes", "bytes per vCPU", "on"),
    Metric("migration downtime", "s", "live migration", "downtime_s"),
)


@dataclass(frozen=True)
class CaseRecord:
    """How one case ended, once; with --repeat there is one for each time."""

    case: str
    verdict: Verdict
    reason: str = ""
    #: Id of the known issue that a FAIL is, or that a PASS should have been.
    known: str = ""
    repeat: int = 1
    claim: str = ""
    #: Levels of guests, the host's own not counted: 3 is L3. 0: not recorded.
    levels: int = 0
    seconds: float = 0.0
    #: None: no host came up, or the case never ran.
    host: Mapping[str, Any] | None = None
    evidence: Mapping[str, str] = field(default_factory=dict)

    @property
    def word(self) -> str:
        """The verdict; KNOWN for a known FAIL, and XPASS for a PASS that should have been one."""
        if not self.known:
            return self.verdict.value
        return {Verdict.FAIL: "KNOWN", Verdict.PASS: "XPASS"}.get(self.verdict, self.verdict.value)

    @property
    def is_red(self) -> bool:
        """Whether it makes a run red."""
        return self.word in ("FAIL", "ERROR", "MISS")


@dataclass(frozen=True)
class Measured:
    """One figure that a case noted."""

    case: str
    metric: str
    value: float


@dataclass(frozen=True)
class RunRecord:
    """One run."""

    id: str
    directory: Path
    #: Seconds since the epoch; 0 if not recorded.
    started: float
    finished: bool
    seconds: float = 0.0
    version: str = ""
    revision: str = ""
    argv: tuple[str, ...] = ()
    #: The machine that drove the run: its name, CPU, kernel.
    machine: Mapping[str, Any] = field(default_factory=dict)
    #: Which host and kernel were asked for.
    choice: Mapping[str, Any] = field(default_factory=dict)
    #: What made the run an ERROR whatever the cases say.
    complaints: tuple[str, ...] = ()
    cases: Sequence[CaseRecord] = ()
    measured: Sequence[Measured] = ()

    @property
    def host(self) -> Mapping[str, Any]:
        """Description of the first host that a case ran on; empty if there was none."""
        return next((case.host for case in self.cases if case.host), {})

    @property
    def host_name(self) -> str:
        """What the host is called in a report: a lab machine's name, or that it is emulated."""
        machine = str(self.machine.get("name", ""))
        kind = str(self.host.get("kind") or self.choice.get("host") or "unknown")
        name = self.host.get("name") or (machine if kind == "local" else "")
        if name or kind != "emulated":
            return str(name or kind.removeprefix("ssh:"))
        return f"{machine} (emulated)" if machine else kind

    @property
    def kernel(self) -> str:
        """Release of the kernel that the cases ran on; what was asked for if none came up."""
        return str(self.host.get("kernel_release") or self.choice.get("kernel") or "unknown")

    @property
    def is_whole(self) -> bool:
        """Whether no cases were chosen: what a whole run does not have is there no more."""
        return not chooses(self.argv)

    @property
    def status(self) -> int:
        """Exit status as of `nsvm run` without --strict; STATUS_UNFINISHED if it has no end."""
        if not self.finished:
            return STATUS_UNFINISHED
        verdicts = [Verdict.PASS if c.word == "KNOWN" else c.verdict for c in self.cases]
        return exit_status([*verdicts, *([Verdict.ERROR] if self.complaints else [])])


def read_record(path: Path) -> RunRecord:
    """Return what a results.jsonl, or the one in a directory, says.

    Raises:
        ResultsError: there is none, or it is malformed.
    """
    path = path / FILE if path.is_dir() or not path.suffix else path
    try:
        events = read_results(path)
    except json.JSONDecodeError as e:
        raise ResultsError(f"{path}: a line is no JSON ({e.msg})") from None
    except UnicodeDecodeError:
        raise ResultsError(f"{path}: no text") from None
    except OSError as e:
        raise ResultsError(f"{path}: {e.strerror}") from None
    if not events:
        raise ResultsError(f"{path}: no case has ended")
    try:
        return _record(path, events)
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise ResultsError(f"{path}: malformed ({type(e).__name__}: {e})") from None


def find_results(directory: Path) -> list[Path]:
    """Return the results files in a directory and below it, those kept aside included.

    Raises:
        ResultsError: there is none.
    """
    if directory.is_file():
        return [directory]
    found = sorted(directory.rglob("results*.jsonl"))
    if not found:
        raise ResultsError(f"{directory}: no {FILE} in it, nor below it")
    return found


def _record(path: Path, events: Sequence[Mapping[str, Any]]) -> RunRecord:
    of = {kind: [e for e in events if e["event"] == kind] for kind in ("run", "summary", "plan")}
    run = of["run"][0] if of["run"] else {}
    summary = of["summary"][-1] if of["summary"] else None
    record = RunRecord(
        # The first line has the time, the command and the machine: no two runs have the same.
        id=hashlib.sha256(json.dumps(events[0], sort_keys=True).encode()).hexdigest()[:16],
        directory=path.parent.resolve(),
        started=float(run.get("time", 0.0)),
        finished=summary is not None,
        seconds=float((summary or {}).get("seconds", 0.0)),
        version=str(run.get("version", "")),
        revision=str(run.get("revision", "")),
        argv=tuple(map(_text, run.get("argv", ()))),
        machine=dict(run.get("machine", {})),
        choice=dict(run.get("choice", {})),
        complaints=tuple(map(_text, (summary or {}).get("complaints", ()))),
        cases=list(_cases(events, of["plan"], finished=summary is not None)),
        measured=list(_measured(events)),
    )
    return record


def _cases(
    events: Sequence[Mapping[str, Any]], plans: Sequence[Mapping[str, Any]], *, finished: bool
) -> Iterator[CaseRecord]:
    levels = {_text(e["case"]): int(e.get("levels", 0)) for e in events if e["event"] == "begin"}
    # A case that was tried again on a new machine may have two ends; the last one counts.
    ends = {_key(e): _ended(e, levels) for e in events if e["event"] == "end"}
    yield from ends.values()
    if finished:
        return
    begun = {_key(e): "begun, and the run has no end" for e in events if e["event"] == "begin"}
    planned = {(str(case), int(repeat)): "planned, and the run has no end"
               for plan in plans for case, repeat in plan["cases"]}  # fmt: skip
    for (case, repeat), reason in (planned | begun).items():
        if (case, repeat) not in ends:
            yield CaseRecord(case, Verdict.MISS, reason, repeat=repeat)


def _key(event: Mapping[str, Any]) -> tuple[str, int]:
    return _text(event["case"]), int(event.get("repeat", 1))


def _text(value: object) -> str:
    """Return a text that can be written as UTF-8: JSON may hold halves of characters."""
    return str(value).encode("utf-8", "backslashreplace").decode()


def _ended(end: Mapping[str, Any], levels: Mapping[str, int]) -> CaseRecord:
    case, repeat = _key(end)
    return CaseRecord(
        case,
        Verdict(end["verdict"]),
        _text(end["reason"]),
        _text(end.get("known", "")),
        repeat,
        _text(end.get("claim", "")),
        levels.get(case, 0),
        float(end.get("seconds", 0.0)),
        dict(end["host"]) if end.get("host") else None,
        {_text(title): _cut(_text(text)) for title, text in end.get("evidence", {}).items()},
    )


def _cut(text: str) -> str:
    if len(text) <= MOST_EVIDENCE:
        return text
    return f"{text[:MOST_EVIDENCE]}\n[{len(text) - MOST_EVIDENCE} more characters]"


def _measured(events: Sequence[Mapping[str, Any]]) -> Iterator[Measured]:
    metrics = {metric.what: metric for metric in METRICS}
    for event in events:
        if event["event"] != "emit" or not isinstance(event.get("data"), Mapping):
            continue
        metric = metrics.get(str(event["data"].get("what")))
        value = event["data"].get(metric.key) if metric else None
        if metric and isinstance(value, int | float):
            yield Measured(_text(event["case"]), metric.name, float(value))


#: Of what ended several ways, this is what counts, the first of them.
_SEVERITY = ("FAIL", "ERROR", "MISS", "KNOWN", "XPASS", "PASS", "SKIP")


def severity(word: str) -> int:
    """Return a key that sorts `CaseRecord.word`s, the worst first."""
    return _SEVERITY.index(word)


def worst(cases: Sequence[CaseRecord]) -> list[CaseRecord]:
    """Return one outcome for each case: the worst of those that were repeated."""
    found: dict[str, CaseRecord] = {}
    for case in cases:
        if case.case not in found or severity(case.word) < severity(found[case.case].word):
            found[case.case] = case
    return list(found.values())
