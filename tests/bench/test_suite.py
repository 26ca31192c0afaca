from pathlib import Path

import pytest

from harness.bench import suite
from harness.bench.ratios import Comparison, Pair
from harness.bench.suite import IOCTL_NAMES, PairRows, Report, Wanted, run
from harness.errors import HarnessError, HostError, HostLost
from harness.host.session import CallResult
from harness.runner.hosts import HostChoice


def pair(name, ours_s=0.2, theirs_s=0.1, parts=()):
    side = {"done": 5, "witness": 60}
    data = {
        "name": name,
        "count": 5,
        "parts": list(parts),
        "ours": {**side, "seconds": ours_s},
        "theirs": {**side, "seconds": theirs_s},
    }
    return {"event": "emit", "kind": "pair", "data": data}


def test_events_become_rows_in_order():
    report = Report()
    rows = PairRows("local", report)
    rows.take({"event": "begin", "pid": 1})
    for event in (pair("b", 0.4), pair("a"), pair("b", 0.2, parts=["regs"])):
        rows.take(event)
    skipped = {"name": "get_msrs", "reason": "KVM_GET_MSRS: refused"}
    rows.take({"event": "emit", "kind": "skipped", "data": skipped})
    assert [row.name for row in report.rows] == ["b", "a"]
    assert report.rows[0].shares() == [0.25, 0.5]
    assert report.rows[0].count == 5
    assert report.rows[0].details["work"]["ours"] == {"done": 5, "witness": 60}
    assert report.skipped == [{"host": "local", **skipped}]
    assert rows.seen() == {"a", "b"}


def test_rounds_that_differ_are_compared_as_if_they_did_not():
    report = Report()
    event = pair("proxy_batched_l1", ours_s=2.0, theirs_s=1.0)
    event["data"].update(against="single L1", unit="operations", note="a note")
    event["data"]["ours"]["done"], event["data"]["theirs"]["done"] = 1000, 10
    PairRows("local", report).take(event)
    [row] = report.rows
    # 500 a second against 10 a second.
    assert row.share == 50
    assert (row.against, row.unit, row.note) == ("single L1", "operations", "a note")


class FakeHost:
    """Answers each call by what it was given: events, then an end or an exception."""

    kind = "emulated"

    def __init__(self, *calls):
        self.calls = list(calls)
        self.names = []
        self.closed = False

    def __enter__(self):
        return self

    def __exit__(self, *reason):
        self.closed = True

    def start(self):
        return self

    def describe(self):
        return {"kind": self.kind, "kernel_release": "6.1", "silicon": "none"}

    def call(self, target, *, on_event, names, **kwargs):
        self.names.append(list(names))
        events, end = self.calls.pop(0)
        for event in events:
            on_event(event)
        if isinstance(end, Exception):
            raise end
        return end


RETURNED = CallResult("return")
WANTED = Wanted(("emulated",), "6.1", 1, ("api_version", "run_exit"))


@pytest.fixture
def run_on(monkeypatch, tmp_path):
    program = tmp_path / "program"
    program.write_bytes(b"")
    monkeypatch.setattr(suite, "executable", lambda name: program)

    def start(host, wanted=WANTED):
        def make_host(choice, log):
            start.choices.append(choice)
            return host

        monkeypatch.setattr(suite, "make_host", make_host)
        return run(wanted)

    start.choices = []
    return start


def test_a_silent_hang_of_the_emulation_is_tried_once_more_for_what_is_missing(run_on):
    hang = HostLost("hangs", silent=True)
    host = FakeHost(([pair("api_version")], hang), ([pair("run_exit")], RETURNED))
    report = run_on(host)
    assert host.names == [["api_version", "run_exit"], ["run_exit"]]
    assert [row.name for row in report.rows] == ["api_version", "run_exit"]
    assert report.errors == []
    assert host.closed


def test_a_host_that_dies_loses_no_row_and_is_an_error(run_on):
    report = run_on(FakeHost(([pair("api_version")], HostLost("went down (panic)"))))
    assert [row.name for row in report.rows] == ["api_version"]
    assert report.errors == ["emulated host: went down (panic)"]


def test_two_hangs_are_an_error(run_on):
    hang = HostLost("hangs", silent=True)
    report = run_on(FakeHost(([], hang), ([], hang)))
    assert report.errors == ["emulated host: hangs"]


def test_what_the_benchmarks_raise_is_an_error(run_on):
    error = {"type": "HarnessError", "message": "C did 7, Python 6"}
    report = run_on(FakeHost(([], CallResult("raise", error=error))))
    [line] = report.errors
    assert line.endswith("HarnessError: C did 7, Python 6")


BOTH = Wanted(("emulated",), "6.1", 3, ("api_version", "proxy_single_l1"), count=7)


def test_ioctls_and_proxies_are_two_calls_and_one_costs_the_other_nothing(run_on):
    error = {"type": "HarnessError", "message": "C did 7, Python 6"}
    failed = CallResult("raise", error=error)
    host = FakeHost(([], failed), ([pair("proxy_single_l1")], RETURNED))
    report = run_on(host, BOTH)
    assert host.names == [["api_version"], ["proxy_single_l1"]]
    assert [row.name for row in report.rows] == ["proxy_single_l1"]
    assert len(report.errors) == 1
    assert [found["kind"] for found in report.hosts] == ["emulated"]


def test_proxies_need_no_c_compiler(run_on, monkeypatch):
    def missing(name):
        raise HostError("no C compiler")

    monkeypatch.setattr(suite, "executable", missing)
    wanted = Wanted(("emulated",), "6.1", 1, ("proxy_single_l1",))
    report = run_on(FakeHost(([pair("proxy_single_l1")], RETURNED)), wanted)
    assert [row.name for row in report.rows] == ["proxy_single_l1"]


def test_a_machine_without_kvm_skips_with_the_evidence(run_on, monkeypatch):
    class Fact:
        holds = False
        evidence = "/dev/kvm: No such file or directory"

    monkeypatch.setattr(suite, "kvm_device", lambda view: Fact)
    host = FakeHost()
    report = run_on(host, Wanted(("local",), "6.1", 1, IOCTL_NAMES))
    assert host.names == []
    assert report.skipped[0]["reason"] == Fact.evidence
    assert report.errors == []


def test_a_kvm_that_may_not_be_used_is_an_error_and_the_other_host_goes_on(run_on, monkeypatch):
    def refused(view):
        raise HostError("/dev/kvm: Permission denied")

    monkeypatch.setattr(suite, "kvm_device", refused)
    host = FakeHost(([pair("api_version")], RETURNED))
    report = run_on(host, Wanted(("local", "emulated"), "6.1", 1, ("api_version",)))
    assert report.errors == ["local host: /dev/kvm: Permission denied"]
    assert [(row.host, row.name) for row in report.rows] == [("emulated", "api_version")]


def test_a_kernel_of_ones_own_is_booted_with_its_modules(run_on, monkeypatch):
    image, modules = "/boot/bzImage", Path("/lib/modules/6.99")
    resolved = []
    monkeypatch.setattr(suite, "resolve", lambda *what: resolved.append(what))
    monkeypatch.setattr(suite, "run_boot_benchmarks", lambda names, find_kernel, *_: find_kernel())
    wanted = Wanted(("emulated",), image, 1, ("api_version", "start_warm"), modules=modules)
    run_on(FakeHost(([pair("api_version")], RETURNED)), wanted)
    assert run_on.choices == [HostChoice("emulated", image, modules)]
    assert resolved == [(image, modules)]


def test_a_fault_of_the_harness_keeps_what_was_measured(run_on, monkeypatch):
    def faulty(names, kernel, repeat, done):
        done([Comparison("start_warm", "emulated", "bare QEMU", pairs=[Pair(1.0, 1.0)])])
        raise HarnessError("no channel and monitor")

    monkeypatch.setattr(suite, "run_boot_benchmarks", faulty)
    report = run_on(FakeHost(), Wanted(("emulated",), "6.1", 1, ("start_warm", "memory")))
    assert [row.name for row in report.rows] == ["start_warm"]
    assert report.errors == ["emulated host: no channel and monitor"]
