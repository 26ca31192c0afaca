"""Storms at L1, which any /dev/kvm can do."""

import os

import pytest

from harness.errors import HostError, ScenarioFailure
from harness.storm import bounce
from harness.storm.bounce import Plan, distribution, storm
from harness.storm.workload import Kind, Workload

pytestmark = pytest.mark.kvm
PLAN = Plan(moves=5, kind=Kind(levels=1), seed=1)


def descriptors():
    return len(os.listdir("/proc/self/fd"))


def nothing(kind, **data):
    pass


def test_a_storm_moves_the_machine_so_often_and_nothing_diverges(kvm):
    told = []
    before = descriptors()
    report = storm(lambda kind, **data: told.append((kind, data)), PLAN)
    assert (report["moves"], report["divergences"]) == (5, 0)
    assert [data["number"] for kind, data in told if kind == "moved"] == [1, 2, 3, 4, 5]
    assert report["steps"] > 0
    assert report["downtime_s"]["min"] > 0
    assert descriptors() == before


@pytest.mark.parametrize(
    ("page", "how"), [(0, "a step gave"), (5, "at the end, memory at")], ids=["used", "unused"]
)
def test_a_machine_that_changes_on_its_way_diverges(kvm, monkeypatch, page, how):
    resume = Workload.resume

    def forgetful(machine, state):
        workload = resume(machine, state)
        machine.memory.write_int(workload.level.scratch + page * 4096, 8, 0xBAD)
        return workload

    monkeypatch.setattr(Workload, "resume", forgetful)
    report = storm(nothing, PLAN)
    assert report["divergences"] > 0
    assert how in report["first_divergences"][0]


def test_a_process_that_dies_ends_the_storm_in_one_line(kvm, monkeypatch):
    monkeypatch.setattr(bounce._Process, "_receive", lambda *_: os._exit(3))
    monkeypatch.setattr(bounce, "SILENCE_S", 3.0)
    with pytest.raises((HostError, ScenarioFailure)) as ended:
        storm(nothing, PLAN)
    assert str(ended.value).startswith("storm")


def test_no_process_is_left(kvm, monkeypatch):
    pids = []
    fork = os.fork

    def counted():
        pid = fork()
        if pid:
            pids.append(pid)
        return pid

    monkeypatch.setattr(os, "fork", counted)
    storm(nothing, Plan(moves=1, kind=Kind(levels=1)))
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_distribution():
    assert distribution([]) == {}
    assert distribution([2.0]) == {"min": 2, "median": 2, "p90": 2, "p99": 2, "max": 2}
    assert distribution([float(n) for n in range(101)]) == {
        "min": 0,
        "median": 50,
        "p90": 90,
        "p99": 99,
        "max": 100,
    }
