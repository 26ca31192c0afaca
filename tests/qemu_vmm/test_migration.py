"""A migration between two QEMUs that only say what a real one would."""

import threading

import pytest

from harness.errors import HostError, ScenarioFailure
from harness.qemu_vmm import migration
from harness.qemu_vmm.migration import Journey, migrate
from harness.qemu_vmm.over import Over

COMPLETED = {
    "status": "completed",
    "downtime": 250,
    "ram": {"transferred": 4096, "dirty-sync-count": 3},
}


class Monitor:
    """Answers from a table; the last of several answers is given again and again."""

    def __init__(self, **answers):
        self.answers = {name.replace("_", "-"): [*given] for name, given in answers.items()}
        self.asked = []

    def command(self, name, **arguments):
        self.asked.append((name, arguments))
        given = self.answers.get(name, [{}])
        answer = given.pop(0) if len(given) > 1 else given[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def pass_descriptor(self, fd, name):
        self.asked.append(("getfd", {"fdname": name}))


class Qemu:
    def __init__(self, *, why="", said="", **answers):
        self.monitor = Monitor(**answers)
        self.stopped = False
        self._why, self._said = why, said

    @property
    def ended(self):
        return bool(self._why)

    def why_ended(self):
        return self._why

    def complaint(self):
        return self._said

    def wait(self, timeout_s):
        return self.ended

    def stop(self):
        self.stopped = True


def source(*told):
    return Qemu(query_migrate=told)


def arrived():
    there = [{"status": "inmigrate"}] * 2
    return Qemu(query_status=[*there, {"status": "running"}])


@pytest.fixture
def journey(tmp_path, monkeypatch):
    monkeypatch.setattr(migration, "raise_loopback", lambda: None)

    def made(target, timeout_s=5.0):
        started = []

        def start(extra, inherited):
            started.append(extra)
            return target

        trip = Journey(start, tmp_path, timeout_s, threading.Event())
        return trip, started

    return made


def uri_of(qemu):
    [arguments] = [arguments for name, arguments in qemu.monitor.asked if name == "migrate"]
    return arguments["uri"]


def test_over_a_unix_socket(journey, tmp_path):
    trip, started = journey(arrived())
    sender = source({"status": "active"}, COMPLETED)
    target, figures = migrate(sender, Over.UNIX, trip)
    assert started == [["-incoming", f"unix:{tmp_path}/migration"]]
    assert uri_of(sender) == f"unix:{tmp_path}/migration"
    assert (figures["bytes"], figures["rounds"], figures["downtime_s"]) == (4096, 3, 0.25)
    assert not target.stopped
    # It was asked until it said so.
    assert target.monitor.answers["query-status"] == [{"status": "running"}]


def test_over_tcp_to_the_port_that_qemu_chose(journey):
    target = arrived()
    address = {"socket-address": [{"host": "127.0.0.1", "port": "4711"}]}
    target.monitor.answers["query-migrate"] = [{}, address]
    trip, started = journey(target)
    sender = source(COMPLETED)
    migrate(sender, Over.TCP, trip)
    assert started == [["-incoming", "tcp:127.0.0.1:0"]]
    assert uri_of(sender) == "tcp:127.0.0.1:4711"


def test_through_a_file_the_next_one_starts_only_when_all_is_in_it(journey):
    trip, started = journey(arrived())
    sender = source({"status": "failed", "error-desc": "no space"})
    with pytest.raises(ScenarioFailure, match="QEMU could not migrate: no space"):
        migrate(sender, Over.FILE, trip)
    assert started == []
    # It was stopped for that, and goes on.
    assert [name for name, _ in sender.monitor.asked][-1] == "cont"
    migrate(source(COMPLETED), Over.FILE, trip)
    [extra] = started
    assert extra[1].startswith("fd:")


def test_a_machine_is_saved_at_a_moment_when_its_guest_runs(journey):
    target = Qemu(query_status=[{"status": "paused"}, {"status": "running"}])
    trip, _ = journey(target)
    answers = [False, False, True]
    trip = Journey(trip.start, trip.directory, 5.0, trip.given_up, lambda side: answers.pop(0))
    sender = source(COMPLETED)
    _, figures = migrate(sender, Over.FILE, trip)
    asked = [name for name, _ in sender.monitor.asked if name in ("stop", "cont", "migrate")]
    assert asked == ["stop", "cont", "stop", "cont", "stop", "migrate"]
    # It stood still, and goes on at the other end.
    assert ("cont", {}) in target.monitor.asked
    assert figures["downtime_s"] <= figures["seconds"]


def test_what_the_other_end_says_is_in_the_message(journey):
    target = Qemu(query_status=[{"status": "inmigrate"}], why="QEMU ended with status 1: kvm: no")
    trip, _ = journey(target)
    failed = source({"status": "failed", "error-desc": "Broken pipe"})
    with pytest.raises(ScenarioFailure) as refused:
        migrate(failed, Over.UNIX, trip)
    assert str(refused.value) == (
        "QEMU could not migrate: Broken pipe (the other end: QEMU ended with status 1: kvm: no)"
    )
    assert target.stopped


def test_a_machine_that_does_not_arrive_is_a_failure(journey):
    target = Qemu(query_status=[{"status": "inmigrate"}], why="QEMU ended with status 1: kvm: no")
    trip, _ = journey(target)
    with pytest.raises(ScenarioFailure, match="did not arrive: QEMU ended with status 1: kvm: no"):
        migrate(source(COMPLETED), Over.UNIX, trip)


def test_a_machine_that_arrives_dead_is_a_failure(journey):
    target = Qemu(query_status=[{"status": "internal-error"}], said="KVM internal error")
    trip, _ = journey(target)
    with pytest.raises(ScenarioFailure, match="arrived as 'internal-error': KVM internal error"):
        migrate(source(COMPLETED), Over.UNIX, trip)


def test_a_refusal_of_qemu_itself_is_no_verdict(journey):
    target = arrived()
    trip, _ = journey(target)
    sender = source({})
    sender.monitor.answers["migrate"] = [HostError("QEMU: migrate: State blocked")]
    with pytest.raises(HostError, match="State blocked"):
        migrate(sender, Over.UNIX, trip)
    assert target.stopped


def test_a_migration_that_does_not_end_is_given_up(journey):
    target = arrived()
    trip, _ = journey(target, timeout_s=0.3)
    with pytest.raises(HostError, match=r"did not end within 0\.3 s"):
        migrate(source({"status": "active"}), Over.UNIX, trip)
    assert target.stopped


def test_nobody_waits_for_a_migration_that_nobody_wants_any_more(journey):
    trip, _ = journey(arrived(), timeout_s=60)
    trip.given_up.set()
    with pytest.raises(HostError, match="given up"):
        migrate(source({"status": "active"}), Over.UNIX, trip)
