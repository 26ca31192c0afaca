"""Live migration of plain machines over links that are slow or lossy, or break when it hurts."""

import random
import threading
import time
from contextlib import contextmanager

import pytest
from counting_guest import counting, resumed

from harness.machine.addresses import Gpa
from harness.machine.errors import MachineError
from harness.migrate import live
from harness.migrate.difference import memory_differences
from harness.migrate.errors import HandoverUnknown, LinkLost
from harness.migrate.links import Cancel, FdLink
from harness.migrate.live_move import hand_over
from harness.migrate.precopy import Options
from harness.network.shape import LinkShape

pytestmark = pytest.mark.kvm

END_S = 60.0
PAGE = 4096
DATA_GPA, DATA_PAGES = Gpa(0x20000), 80


@pytest.fixture
def guest(kvm):
    with counting(kvm) as running:
        yield running


@pytest.fixture
def over(lay):
    return lambda text: lay(LinkShape.parse(text))


def fill(machine):
    """Give the machine something to send."""
    machine.memory.write(DATA_GPA, random.Random(1).randbytes(DATA_PAGES * PAGE))


def expect_only(running, still):
    """One of two machines counts, the other one does not."""
    before = still.counters()
    running.expect_progress()
    running.expect_progress()
    assert still.counters() == before


def cutting(between, connected, when):
    """A link that is cut, once, as soon as `when` says so of what is about to be sent over it."""

    class Cutting(FdLink):
        cut = False

        def write_all(self, pieces, /):
            if not self.cut and when(self, b"".join(pieces)):
                self.cut = True
                between.partition()
            super().write_all(pieces)

    return Cutting(connected.fileno(), connected.fileno(), "the other end", connected.close)


def says(word):
    return lambda link, data: f'"{word}"'.encode() in data


def never(link, data):
    return False


class Receiver:
    """A destination in a thread."""

    def __init__(self, kvm, link, **limits):
        self.machine = self.error = None
        self._cancel = Cancel()
        patience = live.Patience(**limits)

        def work():
            try:
                self.machine = live.receive(
                    kvm, link, patience=patience, cancel=self._cancel
                ).machine
            except Exception as e:
                self.error = e

        self._thread = threading.Thread(target=work)
        self._thread.start()

    def join(self):
        self._thread.join(END_S)
        assert not self._thread.is_alive()

    def close(self):
        self._cancel.set()
        self.join()
        if self.machine is not None:
            self.machine.close()


@contextmanager
def receiving(kvm, between, *, source=never, destination=never, **limits):
    """Give the source's link and a receiver; each link is cut when its function says so."""
    one, other = between.connect()
    receiver = Receiver(kvm, cutting(between, other, destination), **limits)
    try:
        yield cutting(between, one, source), receiver
    finally:
        receiver.close()


# Bandwidth, delay, loss


@pytest.mark.parametrize(("rate", "converges"), [("100mbit", True), ("2mbit", False)])
def test_a_guest_that_writes_faster_than_the_link_is_stopped_by_the_limit(
    guest, over, rate, converges
):
    """Pages are written one after the other, at about 8 Mbit/s."""
    fill(guest.machine)
    stop = threading.Event()

    def write():
        number = 0
        while not stop.wait(0.004):
            number += 1
            guest.machine.memory.write_int(Gpa(DATA_GPA + number % DATA_PAGES * PAGE), 4, number)

    writer = threading.Thread(target=write)
    # A short queue: what waits in one delays the last round, too.
    with over(f"rate={rate},delay=1ms,limit=20") as between:
        writer.start()
        try:
            options = Options(few_pages=30, most_rounds=1000, most_seconds=4)
            started = time.monotonic()
            handed = hand_over(guest.machine, options=options, links=between.links())
            seconds = time.monotonic() - started
            assert memory_differences(guest.machine, handed.received.machine) == []
        finally:
            stop.set()
        handed.go_on()
        writer.join()
    sent = handed.sent
    assert sent.converged == converges
    assert (sum(done.seconds for done in sent.rounds) >= 4 * 0.9) == (not converges)
    assert seconds < END_S
    if not converges:
        assert sent.size_bytes * 8 / seconds < 2e6 * 1.2
        assert sent.rest.pages > 30
    guest.expect_unharmed()


def test_each_question_takes_the_way_there_and_back(guest, over):
    with over("delay=100ms") as between:
        handed = hand_over(guest.machine, links=between.links())
        handed.go_on()
        # READY and RUNNING are waited for.
        assert 0.39 < handed.sent.downtime_s < END_S
    guest.expect_unharmed()


@pytest.mark.parametrize(
    "text", ["loss=5%", "delay=10ms,jitter=5ms,loss=1%,duplicate=10%,reorder=20%"]
)
def test_what_is_lost_or_comes_late_arrives(guest, over, text):
    fill(guest.machine)
    for _ in range(2):
        before = guest.counters()[0]
        with over(text) as between:
            handed = hand_over(guest.machine, links=between.links())
            assert memory_differences(guest.machine, handed.received.machine) == []
            handed.go_on()
        guest.expect_unharmed()
        assert guest.counters()[0] > before


# Partitions


def test_a_partition_during_the_pre_copy_is_noticed_and_the_source_goes_on(guest, over):
    fill(guest.machine)
    # So few are never left: a guest that gets no processor for a while writes nothing.
    options = Options(few_pages=-1, most_rounds=10_000_000, stall_s=1.5)
    with (
        over("delay=1ms") as between,
        receiving(
            guest.machine.kvm, between, source=lambda link, data: link.sent_bytes > 100_000
        ) as (link, receiver),
    ):
        with pytest.raises(LinkLost, match=r"sending memory: link .* lost: nothing moved in time"):
            live.send(guest.machine, link, options=options)
        guest.expect_unharmed()
        receiver.close()
        assert receiver.machine is None
    guest.expect_unharmed()


@pytest.mark.parametrize("lost", ["the rest", "READY"])
def test_a_partition_before_commit_leaves_the_source_running(guest, over, lost):
    def sides():
        if lost == "the rest":
            between.partition()
        return {}

    when = says("READY") if lost == "READY" else never
    with (
        over("delay=1ms") as between,
        receiving(
            guest.machine.kvm, between, destination=when, commit_s=1.0, stall_s=2.0, say_s=1.0
        ) as (link, receiver),
    ):
        with pytest.raises(LinkLost, match=r"waiting for READY: .* nothing moved in time"):
            live.send(guest.machine, link, sides=sides, options=Options(ready_s=1.5))
        guest.expect_unharmed()
        receiver.join()
        assert isinstance(receiver.error, LinkLost)
        assert receiver.machine is None
    guest.expect_unharmed()


def test_a_commit_that_is_lost_leaves_neither_running_until_somebody_decides(guest, over):
    with (
        over("delay=1ms") as between,
        receiving(guest.machine.kvm, between, source=says("COMMIT"), commit_s=1.0, say_s=1.0) as (
            link,
            receiver,
        ),
    ):
        with pytest.raises(HandoverUnknown, match="the destination may run, or not"):
            live.send(guest.machine, link, options=Options(commit_s=1.5))
        receiver.join()
        assert isinstance(receiver.error, LinkLost)
        assert receiver.machine is None
        before = guest.counters()
        time.sleep(0.2)
        assert guest.counters() == before
    guest.machine.resume()
    guest.expect_unharmed()


def test_a_confirmation_that_is_lost_leaves_the_destination_alone_running(guest, over):
    with (
        over("delay=1ms") as between,
        receiving(guest.machine.kvm, between, destination=says("RUNNING")) as (link, receiver),
    ):
        with pytest.raises(HandoverUnknown):
            live.send(guest.machine, link, options=Options(commit_s=1.5))
        receiver.join()
        assert receiver.error is None
        there = resumed(receiver.machine)
        expect_only(running=there, still=guest)
        assert there.stop() > max(guest.counters())
        # What whoever finds it running does.
        guest.machine.abandon("found at the destination")
        with pytest.raises(MachineError, match="found at the destination"):
            guest.thread.join(10)


@pytest.mark.parametrize("at", ["pre-copy", "READY", "COMMIT", "RUNNING"])
def test_a_partition_that_heals_in_time_is_only_a_delay(guest, over, at):
    cut_at = []

    def once(when):
        def check(link, data):
            if cut_at or not when(link, data):
                return False
            cut_at.append(time.monotonic())
            threading.Timer(1.0, between.heal).start()
            return True

        return check

    fill(guest.machine)
    ends = {
        "pre-copy": {"source": once(lambda link, data: link.sent_bytes > 100_000)},
        "READY": {"destination": once(says("READY"))},
        "COMMIT": {"source": once(says("COMMIT"))},
        "RUNNING": {"destination": once(says("RUNNING"))},
    }[at]
    with (
        over("delay=1ms") as between,
        receiving(guest.machine.kvm, between, **ends) as (link, receiver),
    ):
        sent = live.send(guest.machine, link)
        assert time.monotonic() - cut_at[0] > 1.0
        receiver.join()
        assert memory_differences(guest.machine, receiver.machine) == []
        sent.abandon()
        there = resumed(receiver.machine)
        expect_only(running=there, still=guest)
        assert there.stop() > max(guest.counters())
        with pytest.raises(MachineError):
            guest.thread.join(10)
