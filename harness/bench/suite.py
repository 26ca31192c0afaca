"""Runs the chosen benchmarks on the chosen hosts and collects what they yield."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from harness.bench.boot import BOOT_BENCHMARKS, run_boot_benchmarks
from harness.bench.choose import ExpressionError, matching
from harness.bench.loops import IOCTL_BENCHMARKS
from harness.bench.native import executable
from harness.bench.ratios import Comparison, Pair
from harness.errors import HostLost, NsvmError
from harness.facts import HostView, kvm_device
from harness.host.session import Event, Host
from harness.runner.hosts import HostChoice, make_host

IOCTL_NAMES = tuple(benchmark.name for benchmark in IOCTL_BENCHMARKS)
NAMES = (*IOCTL_NAMES, *BOOT_BENCHMARKS)

#: Seconds of a sample in C. Python's takes longer, by what the table is about.
SAMPLE_S = 0.02

_IOCTL_TARGET = "harness.bench.inside:run_ioctl_benchmarks"

#: Of all ioctl benchmarks on one host; a few seconds for each repetition is usual.
_CALL_BASE_S, _CALL_PER_REPEAT_S = 120.0, 30.0


@dataclass(frozen=True)
class Wanted:
    """What the command line asks for."""

    hosts: tuple[str, ...]
    kernel: str
    repeat: int
    names: tuple[str, ...]
    sample_s: float = SAMPLE_S
    count: int | None = None
    """Rounds of every ioctl sample, instead of as many as `sample_s` allows."""


@dataclass
class Report:
    """All rows, and what has none."""

    hosts: list[dict[str, Any]] = field(default_factory=list)
    rows: list[Comparison] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


class IoctlRows:
    """Makes rows of the events of `run_ioctl_benchmarks`."""

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
            row = Comparison(data["name"], self._host, "C", data["count"])
            row.details = {"work": {side: _work(data[side]) for side in ("ours", "theirs")}}
            if data["parts"]:
                row.details["parts"] = data["parts"]
            self._rows[row.name] = row
            self._report.rows.append(row)
        row.pairs.append(Pair(data["ours"]["seconds"], data["theirs"]["seconds"]))

    def seen(self) -> set[str]:
        """Return the names that have yielded something."""
        return set(self._rows)


def _work(side: dict[str, Any]) -> dict[str, int]:
    return {"done": side["done"], "witness": side["witness"]}


def choose(names: str, hosts: tuple[str, ...]) -> tuple[str, ...]:
    """Return the benchmarks that the expression chooses for these hosts.

    Raises ExpressionError: it cannot be read, or chooses none.
    """
    chosen = matching(NAMES, names)
    if "emulated" not in hosts and not set(chosen) & set(IOCTL_NAMES):
        raise ExpressionError(f"{', '.join(chosen)}: only on the emulated host")
    return tuple(chosen)


def run(wanted: Wanted, log: Callable[[str], None] = lambda text: None) -> Report:
    """Run what is wanted. A host that breaks is an error in the report; the others go on.

    Raises HostError: the C counterparts cannot be compiled.
    """
    report = Report()
    ioctl_names = [name for name in wanted.names if name in IOCTL_NAMES]
    program = executable("ioctl_loops").read_bytes() if ioctl_names else b""
    for kind in wanted.hosts:
        if not ioctl_names:
            break
        log(f"{len(ioctl_names)} ioctl benchmarks, {kind} host")
        with _recorded(report, kind):
            if not _has_kvm(kind, report):
                continue
            choice = HostChoice(kind, wanted.kernel if kind == "emulated" else None)
            with make_host(choice, log=log) as host:
                _run_ioctl(host, ioctl_names, program, wanted, report)
    boot_names = [name for name in wanted.names if name in BOOT_BENCHMARKS]
    if "emulated" in wanted.hosts and boot_names:
        log(f"{', '.join(boot_names)}, emulated host")
        with _recorded(report, "emulated"):
            run_boot_benchmarks(boot_names, wanted.kernel, wanted.repeat, report.rows.extend)
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
        report.skipped.append({"host": kind, "name": "ioctl benchmarks", "reason": fact.evidence})
    return fact.holds


def _run_ioctl(
    host: Host, names: list[str], program: bytes, wanted: Wanted, report: Report
) -> None:
    """Run the ioctl benchmarks on one host, once more on a fresh one if it hangs silently."""
    rows = IoctlRows(host.kind, report)
    try:
        _call(host, names, program, wanted, rows)
    except HostLost as e:
        if not e.silent:
            raise
        left = [name for name in names if name not in rows.seen()]
        if left:
            _call(host, left, program, wanted, rows)
    report.hosts.append(host.describe())


def _call(host: Host, names: list[str], program: bytes, wanted: Wanted, rows: IoctlRows) -> None:
    result = host.start().call(
        _IOCTL_TARGET,
        timeout_s=_CALL_BASE_S + _CALL_PER_REPEAT_S * wanted.repeat,
        on_event=rows.take,
        executable=base64.b64encode(program).decode(),
        names=names,
        repeat=wanted.repeat,
        sample_s=wanted.sample_s,
        count=wanted.count,
    )
    result.unwrap("the ioctl benchmarks")
