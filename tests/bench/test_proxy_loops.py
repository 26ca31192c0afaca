"""What runs through the proxies: same work by the guest's own counter, in turn, shallow first."""

import pytest

from harness.bench import proxy_loops
from harness.bench.loops import Work
from harness.bench.proxy_loops import (
    BATCH,
    PROXY_BENCHMARKS,
    VMRUN_BATCH,
    Activity,
    ProxyBenchmark,
    compare,
    measure,
    run_proxy_benchmarks,
)
from harness.errors import HarnessError
from harness.facts import HostView, nested_svm
from harness.host.emulated import EmulatedHost
from harness.host.local import LocalHost

NAMES = [benchmark.name for benchmark in PROXY_BENCHMARKS]


def activity(title, order, *, counted=None, seconds=0.1, depth=1):
    def run(bench, rounds):
        order.append((title, rounds))
        return Work(rounds, rounds if counted is None else counted, seconds * rounds)

    return Activity(title, run, depth)


def rows_of(order, *depths):
    return tuple(
        ProxyBenchmark(
            f"row{n}", "operations", activity(f"ours{n}", order, depth=depth), activity("base", [])
        )
        for n, depth in enumerate(depths)
    )


@pytest.mark.parametrize("counted", [6, 8])
def test_what_the_guest_did_not_count_is_not_measured(counted):
    with pytest.raises(HarnessError, match=rf"batched: did 7, the guest counted {counted}"):
        measure(activity("batched", [], counted=counted), None, 7)


@pytest.mark.parametrize("ours_first", [True, False])
def test_both_sides_run_in_turn_with_rounds_of_their_own(ours_first):
    order = []
    row = ProxyBenchmark("row", "", activity("a", order), activity("b", order, seconds=0.5))
    rounds = {row.ours: 3, row.against: 2}
    ours, theirs = compare(row, None, rounds.__getitem__, ours_first=ours_first)
    assert order == ([("a", 3), ("b", 2)] if ours_first else [("b", 2), ("a", 3)])
    assert (ours.done, theirs.done) == (3, 2)
    assert theirs.seconds == 1.0


class NoKvm:
    def __enter__(self):
        return self

    def __exit__(self, *reason):
        pass


class FakeFact:
    def __init__(self, holds):
        self.holds, self.evidence = holds, "kvm_amd.nested=0"


@pytest.fixture
def run_rows(monkeypatch):
    """Run benchmarks on nothing; return what was emitted."""

    def start(rows, names, *, nested=True, **how):
        monkeypatch.setattr(proxy_loops, "PROXY_BENCHMARKS", rows)
        monkeypatch.setattr(proxy_loops, "Kvm", NoKvm)
        monkeypatch.setattr(proxy_loops, "nested_svm", lambda view: FakeFact(nested))
        emitted = []
        run_proxy_benchmarks(
            lambda kind, **data: emitted.append((kind, data)), names, sample_s=0.4, **how
        )
        return emitted

    return start


def test_rounds_are_found_once_and_every_repetition_is_a_pair(run_rows):
    order = []
    emitted = run_rows(rows_of(order, 1), ["row0"], repeat=3)
    assert [kind for kind, _ in emitted] == ["pair"] * 3
    # 0.1 s a round: the first trial says it, then as many as fill 0.4 s.
    assert order == [("ours0", 2), *[("ours0", 4)] * 3]
    assert emitted[0][1]["count"] == emitted[0][1]["ours"]["done"] == 4


def test_without_nested_svm_only_l1_is_measured_and_the_evidence_is_said(run_rows):
    order = []
    emitted = run_rows(rows_of(order, 1, 2), ["row0", "row1"], repeat=1, nested=False)
    assert [(kind, data["name"]) for kind, data in emitted] == [
        ("pair", "row0"),
        ("skipped", "row1"),
    ]
    assert emitted[1][1]["reason"] == "nested_svm: kvm_amd.nested=0"
    assert {title for title, _ in order} == {"ours0"}


def test_only_the_named_run_as_often_as_asked_for(run_rows):
    order = []
    run_rows(rows_of(order, 1, 1), ["row1"], repeat=2, count=7)
    assert order == [("ours1", 7), ("ours1", 7)]


def test_rows_are_ordered_by_depth():
    depths = [benchmark.depth for benchmark in PROXY_BENCHMARKS]
    assert depths == sorted(depths)
    assert set(depths) == {1, 2, 3}


def test_what_goes_through_python_says_so():
    noted = {benchmark.name for benchmark in PROXY_BENCHMARKS if benchmark.note}
    assert noted == {"proxy_vmrun_l2_l3"}


def run_on(host):
    """Run one round of everything on a host; return its pairs and skips by name."""
    found = {}

    def take(event):
        if event["event"] == "emit":
            found[event["data"]["name"]] = (event["kind"], event["data"])

    with host:
        result = host.start().call(
            "harness.bench.proxy_loops:run_proxy_benchmarks",
            timeout_s=100,
            on_event=take,
            names=NAMES,
            repeat=1,
            sample_s=0.001,
            count=1,
        )
    result.unwrap("the proxy benchmarks")
    return found


def done_of(found, name, side="ours"):
    kind, data = found[name]
    assert kind == "pair", data
    assert data[side]["done"] == data[side]["witness"]
    assert data[side]["seconds"] > 0
    return data[side]["done"]


@pytest.mark.kvm
def test_on_this_machine_guests_count_what_they_did(kvm):
    found = run_on(LocalHost())
    assert list(found) == NAMES
    assert done_of(found, "proxy_single_l1") == done_of(found, "proxy_single_l1", "theirs") == 1
    assert done_of(found, "proxy_batched_l1") == BATCH
    expected = "pair" if nested_svm(HostView()).holds else "skipped"
    assert {found[name][0] for name in NAMES if name.endswith(("l2", "l3"))} == {expected}


@pytest.mark.emulated
def test_in_the_emulated_host_every_level_counts_what_it_did(kernel):
    found = run_on(EmulatedHost(kernel.kernel))
    assert list(found) == NAMES
    for level in ("l1", "l2", "l3"):
        assert done_of(found, f"proxy_single_{level}") == 1
        assert done_of(found, f"proxy_batched_{level}") == BATCH
    assert done_of(found, "proxy_vmrun_l1_l2") == VMRUN_BATCH[1]
    assert done_of(found, "proxy_vmrun_l2_l3") == VMRUN_BATCH[2]
