"""Live migration that goes wrong: at most one side runs, and the source loses nothing."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from counting_guest import counting
from cut_link import pair_cut

from harness.errors import NsvmError
from harness.machine.memory import PAGE_SIZE
from harness.migrate import live
from harness.migrate.connections import child, connect_unix, pair
from harness.migrate.errors import Cancelled, HandoverUnknown, LinkLost, Refused, StreamError
from harness.migrate.handover import Message, Say, expect, put
from harness.migrate.links import Cancel
from harness.migrate.live import Patience
from harness.migrate.precopy import Options
from harness.migrate.sections import DONE, PREP, unpack_number
from harness.migrate.state import StateWriter
from harness.migrate.stream import StreamReader

pytestmark = pytest.mark.kvm

DESTINATION = Path(__file__).with_name("live_destination.py")
CUTS = 30
QUICK = Options(few_pages=1000, welcome_s=10, ready_s=10, commit_s=2, stall_s=10)
COMMIT_BYTES = len(Message(Say.COMMIT).encode())
SAYS = (Say.WELCOME, Say.PREPARED, Say.READY, Say.RUNNING)
SAID = [len(Message(say).encode()) for say in SAYS]


@pytest.fixture
def guest(kvm):
    with counting(kvm) as running:
        yield running


class Destination:
    """Somebody at the other end, in a thread."""

    def __init__(self, body):
        self.result = self.error = None
        self._body = body
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def _work(self):
        try:
            self.result = self._body()
        except Exception as e:  # handed to the test
            self.error = e

    def end(self):
        self._thread.join(30)
        assert not self._thread.is_alive()
        return self


def receiving(kvm, link, **options):
    return Destination(lambda: live.receive(kvm, link, patience=Patience(5, 5, 2), **options))


def migrate(guest, ours, theirs, **options):
    """Return what the source raised, or None, and the destination."""
    there = receiving(guest.machine.kvm, theirs)
    error = None
    try:
        live.send(guest.machine, ours, **({"options": QUICK} | options))
    except NsvmError as e:
        error = e
    return error, there.end()


def expect_one_side(guest, error, there):
    """At most one side has the machine; the source goes on if it is the one."""
    if error is None or isinstance(error, HandoverUnknown):
        before = guest.counters()
        if there.result is not None:
            assert there.result.machine.memory.read(0x1000, 0x6000) == (
                guest.machine.memory.read(0x1000, 0x6000)
            )
            there.result.machine.close()
        else:
            assert isinstance(error, HandoverUnknown)
        time.sleep(0.01)
        assert guest.counters() == before, "the source runs on"
        guest.machine.resume()  # somebody has looked at the destination, and killed it
    else:
        assert there.result is None, "the destination has it too"
        assert "\n" not in str(error)
    guest.expect_unharmed()


def length_of_stream(guest):
    """Bytes that the source sends for a guest at rest, whose stream is the same each time."""
    ours, theirs = pair()
    there = receiving(guest.machine.kvm, theirs)
    sent = live.send(guest.machine, ours, options=QUICK)
    there.end().result.machine.close()
    guest.machine.resume()
    return sent.size_bytes


def cuts(whole):
    """Everywhere, a bit; and at every byte of what is said last."""
    step = max(1, whole // CUTS)
    return sorted({*range(0, whole, step), *range(whole - COMMIT_BYTES - 4, whole + 1)})


def test_the_link_is_cut_after_any_number_of_bytes_sent(guest):
    guest.stop()
    whole = length_of_stream(guest)
    outcomes = {}
    for cut in cuts(whole):
        ours, theirs = pair_cut(sends=cut)
        error, there = migrate(guest, ours, theirs)
        outcomes[cut] = type(error)
        if error is None:
            there.result.machine.close()
            guest.machine.resume()
        else:
            assert isinstance(error, LinkLost), (cut, whole, error)
            assert isinstance(there.error, LinkLost | StreamError)
        guest.start()
        guest.expect_unharmed()
        guest.stop()
    assert [cut for cut, outcome in outcomes.items() if outcome is type(None)] == [whole]


@pytest.mark.parametrize("cut", range(sum(SAID) + 1))
def test_the_link_is_cut_after_any_number_of_bytes_received(guest, cut):
    ours, theirs = pair_cut(receives=cut)
    error, there = migrate(guest, ours, theirs)
    if cut < sum(SAID[:3]):
        assert isinstance(error, LinkLost)
        assert there.result is None
    elif cut < sum(SAID):
        assert isinstance(error, HandoverUnknown)
        assert "this side stays paused" in str(error)
        assert there.result is not None or isinstance(there.error, LinkLost)
    else:
        assert error is None
    expect_one_side(guest, error, there)


def test_a_running_guest_survives_many_cuts_and_then_moves(guest):
    guest.stop()
    # While the guest runs, the page of STOP is zero and not sent.
    whole = length_of_stream(guest) - 2 * PAGE_SIZE
    guest.start()
    for cut in range(0, whole, whole // 15):
        ours, theirs = pair_cut(sends=cut)
        error, there = migrate(guest, ours, theirs)
        assert error is not None
        expect_one_side(guest, error, there)
    ours, theirs = pair()
    error, there = migrate(guest, ours, theirs)
    assert error is None
    expect_one_side(guest, error, there)


def test_nothing_is_left_of_failed_migrations(guest):
    def left():
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    before = left()
    for cut in (0, 30, 3000, 20_000):
        ours, theirs = pair_cut(sends=cut)
        error, there = migrate(guest, ours, theirs)
        assert error is not None
        expect_one_side(guest, error, there)
    assert left() == before


def test_a_destination_that_cannot_restore_refuses_with_the_reason(guest, monkeypatch):
    def refuse(writer, state):
        raise Refused("vcpu 0: nested: KVM_SET_NESTED_STATE on vcpu fd: EINVAL")

    monkeypatch.setattr(StateWriter, "write", refuse)
    ours, theirs = pair()
    error, there = migrate(guest, ours, theirs)
    assert type(error) is Refused
    assert str(error) == (
        "the destination refused: vcpu 0: nested: KVM_SET_NESTED_STATE on vcpu fd: EINVAL"
    )
    expect_one_side(guest, error, there)


def test_a_destination_that_fails_unexpectedly_refuses_too(guest, monkeypatch):
    monkeypatch.setattr("harness.migrate.transfer.expect_inside", lambda *_: 1 / 0)
    ours, theirs = pair()
    there = receiving(guest.machine.kvm, theirs)
    with pytest.raises(Refused, match="the destination refused: division by zero"):
        live.send(guest.machine, ours, options=QUICK)
    assert isinstance(there.end().error, ZeroDivisionError)
    guest.expect_unharmed()


# Destinations that are no good


def at_pages(link, then):
    """Be a destination up to the first pages."""
    sections = StreamReader(link).sections()
    assert next(sections).tag == b"HEAD"
    put(link, Say.WELCOME)
    # The first section with pages may well have all of them.
    assert link.read(1)
    then(link)


def at_the_end(link, then):
    for section in StreamReader(link).sections():
        if section.number == 0:
            put(link, Say.WELCOME)
        if section.tag == PREP and unpack_number(section) == 1:  # the VM's, after the vCPU's
            put(link, Say.PREPARED)
        if section.tag == DONE:
            then(link)


def after_commit(link, then):
    def go_on(link):
        put(link, Say.READY)
        expect(link, Say.COMMIT)
        then(link)

    at_the_end(link, go_on)


def send_to(guest, place, then, **options):
    ours, theirs = pair()

    def work():
        with theirs:
            place(theirs, then)

    there = Destination(work)
    try:
        live.send(guest.machine, ours, **({"options": QUICK} | options))
    finally:
        there.end()


def until_closed(link):
    link.drain(30)


def refuse(link):
    put(link, Say.REFUSED, "no room")
    link.drain(5)


@pytest.mark.parametrize("place", [at_pages, at_the_end])
def test_a_refusal_is_heard_wherever_it_comes(guest, place):
    slow = Options(bytes_per_s=20_000)
    with pytest.raises(Refused, match="the destination refused: no room"):
        send_to(guest, place, refuse, options=slow if place is at_pages else QUICK)
    guest.expect_unharmed()


def test_a_refusal_after_commit_gives_the_machine_back(guest):
    with pytest.raises(Refused, match="no room"):
        send_to(guest, after_commit, refuse)
    guest.expect_unharmed()


@pytest.mark.parametrize("place", [at_pages, at_the_end])
def test_nonsense_from_the_destination_is_an_error_of_one_line(guest, place):
    slow = Options(bytes_per_s=20_000)
    with pytest.raises(StreamError, match=r"sent a message of \d+ bytes"):
        send_to(
            guest,
            place,
            lambda link: (link.write(b"\xff" * 64), link.drain(5)),
            options=slow if place is at_pages else QUICK,
        )
    guest.expect_unharmed()


@pytest.mark.parametrize("say", [Say.RUNNING, Say.WELCOME, Say.COMMIT])
def test_the_wrong_word_is_an_error(guest, say):
    with pytest.raises(StreamError, match=f"said {say.value} where READY is due"):
        send_to(guest, at_the_end, lambda link: (put(link, say), link.drain(5)))
    guest.expect_unharmed()


@pytest.mark.parametrize(
    ("place", "limit", "what"),
    [
        (at_pages, {"stall_s": 0.2}, "sending memory"),
        (at_the_end, {"ready_s": 0.2}, "waiting for READY"),
    ],
)
def test_a_silent_destination_is_given_up(guest, monkeypatch, place, limit, what):
    # Else the link takes all of the machine.
    monkeypatch.setattr("harness.migrate.connections._UNIX_BUFFER_BYTES", 64 << 10)
    guest.machine.memory.write(0x20000, b"x" * 0xD0000)
    with pytest.raises(LinkLost, match=f"{what}: link to .* lost: nothing moved in time"):
        send_to(guest, place, lambda link: time.sleep(2), options=Options(few_pages=1000, **limit))
    guest.expect_unharmed()


def test_silence_after_commit_leaves_the_source_paused(guest):
    with pytest.raises(HandoverUnknown, match=r"may run, or not.*nothing moved in time"):
        send_to(guest, after_commit, lambda link: time.sleep(1), options=Options(commit_s=0.2))
    before = guest.counters()
    time.sleep(0.05)
    assert guest.counters() == before
    guest.machine.resume()
    guest.expect_unharmed()


@pytest.mark.parametrize("place", [at_pages, at_the_end])
def test_a_cancel_from_another_thread(guest, place):
    cancel = Cancel()
    slow = Options(bytes_per_s=20_000, ready_s=30)
    with pytest.raises(Cancelled, match="the migration was cancelled"):
        send_to(
            guest,
            place,
            lambda link: (cancel.set(), link.drain(10)),
            cancel=cancel,
            options=slow if place is at_pages else QUICK,
        )
    guest.expect_unharmed()


def test_a_cancel_after_commit_is_too_late(guest):
    cancel = Cancel()
    send_to(guest, after_commit, lambda link: (cancel.set(), put(link, Say.RUNNING)), cancel=cancel)
    guest.machine.resume()
    guest.expect_unharmed()


def test_a_cancelled_destination_refuses(guest):
    cancel = Cancel()
    ours, theirs = pair()
    there = receiving(guest.machine.kvm, theirs, cancel=cancel)
    cancel.set()
    with pytest.raises(Refused, match="the destination refused: the migration was cancelled"):
        live.send(guest.machine, ours, options=Options(few_pages=1000, bytes_per_s=10_000))
    assert isinstance(there.end().error, Cancelled)
    guest.expect_unharmed()


def test_what_the_sides_raise_is_raised_and_the_guest_goes_on(guest):
    ours, theirs = pair()
    there = receiving(guest.machine.kvm, theirs)
    with pytest.raises(ZeroDivisionError):
        live.send(guest.machine, ours, sides=lambda: {"a": 1 / 0}, options=QUICK)
    assert isinstance(there.end().error, LinkLost | StreamError)
    guest.expect_unharmed()


def test_a_slot_that_comes_meanwhile_ends_it(guest):
    def sides():
        guest.machine.memory.add(0x100_0000, 0x1000)
        return {}

    ours, theirs = pair()
    there = receiving(guest.machine.kvm, theirs)
    with pytest.raises(NsvmError, match="memory slots came or went"):
        live.send(guest.machine, ours, sides=sides, options=QUICK)
    there.end()
    guest.expect_unharmed()


# Another process, killed


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.2, 0.5, 0.9, 0.999])
def test_a_destination_that_is_killed(guest, tmp_path, fraction):
    guest.stop()
    # While the guest runs, the page of STOP is zero and not sent.
    at = int((length_of_stream(guest) - 2 * PAGE_SIZE) * fraction)
    guest.start()
    place = tmp_path / "socket"
    with subprocess.Popen([sys.executable, DESTINATION, "unix", place]) as process:
        link = connect_unix(place, 20)
        write = link.write

        def write_and_kill(data):
            if link.sent_bytes + len(data) > at and process.poll() is None:
                process.kill()
                process.wait()
            write(data)

        link.write = write_and_kill
        with pytest.raises(LinkLost, match="lost"):
            live.send(guest.machine, link, options=QUICK)
    guest.expect_unharmed()


def test_a_child_that_is_no_destination(guest):
    with child([sys.executable, "-c", "print('Permission denied')"]) as (link, _):  # noqa: SIM117
        with pytest.raises((LinkLost, StreamError)):
            live.send(guest.machine, link, options=QUICK)
    guest.expect_unharmed()
