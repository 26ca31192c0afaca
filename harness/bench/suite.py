"""Runs the chosen benchmarks on the chosen hosts and collects what they yield."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from harness.bench.boot import BOOT_BENCHMARKS, run_boot_benchmarks
from harness.bench.crosscheck_loops import CROSSCHECK_NAMES
from harness.bench.loops import IOCTL_BENCHMARKS
from harness.bench.migrate_loops import MIGRATE_NAMES
from harness.bench.native import executable
from harness.bench.proxy_loops import PROXY_BENCHMARKS
from harness.bench.ratios import Comparison, Pair
from harness.errors import HostLost, NsvmError
from harness.facts import HostView, kvm_device
from harness.host.kernels import resolve
from harness.host.session import Event, Host
from harness.runner.expression import ExpressionError, matcher
from harness.runner.hosts import HostChoice, make_host

IOCTL_NAMES = tuple(benchmark.name for benchmark in IOCTL_BENCHMARKS)
PROXY_NAMES = tuple(benchmark.name for benchmark in PROXY_BENCHMARKS)
NAMES = (*IOCTL_NAMES, *PROXY_NAMES, *MIGRATE_NAMES, *CROSSCHECK_NAMES, *BOOT_BENCHMARKS)

#: Seconds of a sample in C. Python's takes longer, by what the table is about.
SAMPLE_S = 0.02

#: Seconds of a sample through the proxy: a crossing takes milliseconds in the emulated host.
PROXY_SAMPLE_S = 0.1

_IOCTL_TARGET = "harness.bench.inside:run_ioctl_benchmarks"
_PROXY_TARGET = "harness.bench.proxy_loops:run_proxy_benchmarks"
_CROSSCHECK_TARGET = "harness.bench.crosscheck_loops:run_crosscheck_benchmarks"
_MIGRATE_TARGET = "harness.bench.migrate_loops:run_migrate_benchmarks"

#: Of all benchmarks of one call on one host; a few seconds for each repetition is usual.
_CALL_BASE_S, _CALL_PER_REPEAT_S = 120.0, 30.0

#: The same of migrations: in the emulated host alone to start a destination takes seconds.
_MIGRATE_BASE_S, _MIGRATE_PER_REPEAT_S = 240.0, 120.0


@dataclass(frozen=True)
class Wanted:
    """What the command line asks for."""

    hosts: tuple[str, ...]
    kernel: str
    repeat: int
    names: tuple[str, ...]
    sample_s: float = SAMPLE_S
    count: int | None = None
    """Rounds of every sample inside a host, instead of as many as the seconds allow."""
    modules: Path | None = None
    """Those of `kernel`, if that is the path of an image."""


@dataclass
class Report:
    """All rows, and what has none."""

    hosts: list[dict[str, Any]] = field(default_factory=list)
    rows: list[Comparison] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


class PairRows:
    """Makes rows of the events of what runs inside a host: against C, or against each other."""

    def __init__(self, host: str, report: Report) -> None:
        self._host = host
        self._report = report
        self._rows: dict[str, Comparison] = {}

    def take(self, event: Event) -> None:
        """Take one event of the session; others than a pair or a skip are no business of ours."""
        if event["event"] != "emit":
            return
        data = event["data"]
        if event["kind"] == "skipped":
            self._report.skipped.append({"host": self._host, **data})
        elif event["kind"] == "pair":
            self._add(data)

    def _add(self, data: dict[str, Any]) -> None:
        row = self._rows.get(data["name"])
        if row is None:
            row = Comparison(data["name"], self._host, data.get("against", "C"), data["count"])
            row.unit, row.note = data.get("unit", ""), data.get("note", "")
            row.details = {"work": {side: _work(data[side]) for side in ("ours", "theirs")}}
            if data["parts"]:
                row.details["parts"] = data["parts"]
            self._rows[row.name] = row
            self._report.rows.append(row)
        ours, theirs = data["ours"], data["theirs"]
        for side in ("ours", "theirs"):
            for part, seconds in data[side].get("parts_s", {}).items():
                sides = row.details.setdefault("parts_s", {})
                sides.setdefault(side, {}).setdefault(part, []).append(seconds)
        # C does as many rounds as Python; activities that take less time do more in a sample.
        theirs_s = theirs["seconds"] * ours["done"] / theirs["done"]
        row.pairs.append(Pair(ours["seconds"], theirs_s))

    def seen(self) -> set[str]:
        """Return the names that have yielded something."""
        return set(self._rows)


def _work(side: dict[str, Any]) -> dict[str, int]:
    return {"done": side["done"], "witness": side["witness"]}


def choose(expression: str, hosts: tuple[str, ...]) -> tuple[str, ...]:
    """Return the benchmarks that the expression chooses for these hosts.

    Raises ExpressionError: it cannot be read, or chooses none.
    """
    chosen = tuple(filter(matcher(expression), NAMES))
    if not chosen:
        raise ExpressionError(f"-k {expression!r} chooses none of {', '.join(NAMES)}")
    if "emulated" not in hosts and not set(chosen) - set(BOOT_BENCHMARKS):
        raise ExpressionError(f"{', '.join(chosen)}: only on the emulated host")
    return chosen


def run(wanted: Wanted, log: Callable[[str], None] = lambda text: None) -> Report:
    """Run what is wanted. A host that breaks is an error in the report; the others go on.

    Raises HostError: the C counterparts cannot be compiled.
    """
    report = Report()
    calls = _calls(wanted)
    for kind in wanted.hosts if calls else ():
        log(f"{sum(len(call.names) for call in calls)} benchmarks, {kind} host")
        with _recorded(report, kind):
            if not _has_kvm(kind, report):
                continue
            emulated = HostChoice("emulated", wanted.kernel, wanted.modules)
            choice = emulated if kind == "emulated" else HostChoice(kind)
            with make_host(choice, log=log) as host:
                _run_inside(host, calls, wanted, report)
    boot_names = [name for name in wanted.names if name in BOOT_BENCHMARKS]
    if "emulated" in wanted.hosts and boot_names:
        log(f"{', '.join(boot_names)}, emulated host")
        with _recorded(report, "emulated"):
            find_kernel = partial(resolve, wanted.kernel, wanted.modules)
            run_boot_benchmarks(boot_names, find_kernel, wanted.repeat, report.rows.extend)
    return report


class _recorded:
    """Turns what a host did wrong into a line of the report; a context manager."""

    def __init__(self, report: Report, kind: str) -> None:
        self._report = report
        self._kind = kind

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, NsvmError):
            return False
        self._report.errors.append(f"{self._kind} host: {error}")
        return True


def _has_kvm(kind: str, report: Report) -> bool:
    if kind != "local":
        return True
    fact = kvm_device(HostView())
    if not fact.holds:
        report.skipped.append({"host": kind, "name": "all that needs KVM", "reason": fact.evidence})
    return fact.holds


@dataclass(frozen=True)
class _Call:
    """Benchmarks that run in one go inside a host."""

    what: str
    target: str
    names: list[str]
    arguments: dict[str, Any]
    base_s: float = _CALL_BASE_S
    per_repeat_s: float = _CALL_PER_REPEAT_S


def _calls(wanted: Wanted) -> list[_Call]:
    """Return what has to be called in each host; none of it is without benchmarks."""
    found = []
    if names := [name for name in wanted.names if name in IOCTL_NAMES]:
        arguments = {"executable": _program("ioctl_loops"), "sample_s": wanted.sample_s}
        found.append(_Call("the ioctl benchmarks", _IOCTL_TARGET, names, arguments))
    if names := [name for name in wanted.names if name in PROXY_NAMES]:
        arguments = {"sample_s": PROXY_SAMPLE_S}
        found.append(_Call("the proxy benchmarks", _PROXY_TARGET, names, arguments))
    if names := [name for name in wanted.names if name in CROSSCHECK_NAMES]:
        found.append(_Call("the cross-check benchmark", _CROSSCHECK_TARGET, names, {}))
    if names := [name for name in wanted.names if name in MIGRATE_NAMES]:
        arguments = {"executable": _program("migrate_loops"), "sample_s": wanted.sample_s}
        limits = _MIGRATE_BASE_S, _MIGRATE_PER_REPEAT_S
        found.append(_Call("the migration benchmarks", _MIGRATE_TARGET, names, arguments, *limits))
    return found


def _program(name: str) -> str:
    """Return a C side as it is sent to a host."""
    return base64.b64encode(executable(name).read_bytes()).decode()


def _run_inside(host: Host, calls: list[_Call], wanted: Wanted, report: Report) -> None:
    """Make all calls on one host; what goes wrong with one costs the others nothing."""
    for call in calls:
        with _recorded(report, host.kind):
            _run_call(host, call, wanted, PairRows(host.kind, report))
    report.hosts.append(host.describe())


def _run_call(host: Host, call: _Call, wanted: Wanted, rows: PairRows) -> None:
    """Make one call, once more on a fresh host if that hangs silently."""
    try:
        _make(call, call.names, host, wanted, rows)
    except HostLost as e:
        if not e.silent:
            raise
        left = [name for name in call.names if name not in rows.seen()]
        if left:
            _make(call, left, host, wanted, rows)


def _make(call: _Call, names: list[str], host: Host, wanted: Wanted, rows: PairRows) -> None:
    result = host.start().call(
        call.target,
        timeout_s=call.base_s + call.per_repeat_s * wanted.repeat,
        on_event=rows.take,
        names=names,
        repeat=wanted.repeat,
        count=wanted.count,
        **call.arguments,
    )
    result.unwrap(call.what)
