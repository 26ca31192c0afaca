"""What becomes of a fleet's results: nothing that was left out is green."""

import json

import pytest

from harness.fleet.drive import Ended
from harness.fleet.merge import merge
from harness.fleet.plan import FleetPlan

HOST = {"kind": "ssh", "name": "x", "kernel_release": "6.1.0"}


@pytest.fixture
def plan(tmp_path):
    def make(deal=True):
        return FleetPlan((), ("a", "b"), deal, tmp_path, tmp_path / "store.sqlite", ())

    return make


def record(plan, host, verdicts, *, of=None, finished=True, planned=None, release="6.1.0"):
    """Write what a host's run leaves: verdicts by case."""
    cases = [[case, 1] for case in (planned or verdicts)]
    own = {**HOST, "name": host, "kernel_release": release}
    events = [
        {"event": "run", "time": 1.0, "argv": ["run"], "choice": {"host": f"ssh:{host}"}},
        {"event": "plan", "cases": cases, **({"part": plan.part(host), "of": of} if of else {})},
        *(
            {"event": "end", "case": case, "verdict": verdict, "reason": "why", "host": own}
            for case, verdict in verdicts.items()
        ),
        *([{"event": "summary", "seconds": 1.0, "complaints": []}] if finished else []),
    ]
    where = plan.where(host)
    where.mkdir()
    text = "".join(json.dumps({"time": 1.0, **event}) + "\n" for event in events)
    (where / "results.jsonl").write_text(text)


def merged(plan, **statuses):
    ended = {host: Ended(status, "last words") for host, status in statuses.items()}
    return merge(plan, ended, [])


def test_shares_that_passed_are_green(plan):
    plan = plan()
    record(plan, "a", {"one": "PASS", "three": "SKIP"}, of=3)
    record(plan, "b", {"two": "PASS"}, of=3)
    result = merged(plan, a=0, b=0)
    assert (result.status, result.complaints, result.notes) == (0, (), ())


def test_a_share_of_nothing_is_nobodys_fault(plan):
    plan = plan()
    record(plan, "a", {"one": "PASS"}, of=1)
    record(plan, "b", {}, of=1)
    assert merged(plan, a=0, b=4).status == 0


def test_a_host_that_was_to_run_all_and_ran_nothing_is_red(plan):
    plan = plan(deal=False)
    record(plan, "a", {"one": "PASS"})
    record(plan, "b", {"one": "SKIP"})
    assert merged(plan, a=0, b=4).status == 2


def test_nothing_at_all_is_not_green(plan):
    plan = plan()
    record(plan, "a", {"one": "SKIP"}, of=1)
    record(plan, "b", {}, of=1)
    assert merged(plan, a=4, b=4).status == 4


def test_a_host_that_recorded_nothing_is_red_and_in_the_store(plan):
    plan = plan()
    record(plan, "a", {"one": "PASS"}, of=2)
    result = merged(plan, a=0)
    assert result.status == 2
    assert result.hosts[1].complaints == ("nothing was recorded",)
    assert result.complaints == ("b: its share, 2/2 of the cases, was not run",)
    assert result.hosts[1].record.host_name == "b"
    assert not result.hosts[1].record.finished


def test_cases_that_are_in_no_share_are_missed(plan):
    plan = plan()
    record(plan, "a", {"one": "PASS"}, of=3)
    record(plan, "b", {"two": "PASS"}, of=3)
    result = merged(plan, a=0, b=0)
    assert result.complaints == ("the shares have 2 cases together, not 3",)
    assert result.status == 2


def test_a_run_without_an_end_is_red_and_what_it_recorded_is_there(plan):
    plan = plan(deal=False)
    record(plan, "a", {"one": "PASS"})
    record(plan, "b", {"one": "PASS"}, planned=["one", "two"], finished=False)
    result = merged(plan, a=0, b=-9)
    assert result.status == 2
    assert result.hosts[1].complaints == ("its run has no end: last words",)
    assert result.hosts[1].counts == {"PASS": 1, "MISS": 1}


@pytest.mark.parametrize(
    ("ran", "status", "complaints"),
    [
        (2, 2, ("its run was broken: last words",)),
        (130, 2, ("its run ended with status 130: last words",)),
        (None, 2, ("its run ended with status None: last words",)),
        (1, 1, ()),  # --strict: a known issue
        (0, 0, ()),
    ],
)
def test_the_status_of_a_run_counts_too(plan, ran, status, complaints):
    plan = plan(deal=False)
    record(plan, "a", {"one": "PASS"})
    record(plan, "b", {"one": "PASS"})
    result = merged(plan, a=0, b=ran)
    assert (result.status, result.hosts[1].complaints) == (status, complaints)


def test_hosts_that_are_not_equal_are_said_where_cases_are_dealt_out(plan):
    plan = plan()
    record(plan, "a", {"one": "PASS"}, of=2)
    record(plan, "b", {"two": "PASS"}, of=2, release="6.12.1")
    assert merged(plan, a=0, b=0).notes == (
        "the hosts are not equal: each case ran on one of 6.1.0, 6.12.1",
    )
