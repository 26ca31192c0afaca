"""Two ends in one process: bytes, pages from mapping to mapping, and nothing left behind."""

import pytest
from counting_guest import counting

from harness.errors import HarnessError
from harness.machine.errors import MachineError
from harness.machine.memory import PAGE_SIZE
from harness.migrate import handover, live, same_process, transfer
from harness.migrate.dirty import DirtyTracker
from harness.migrate.errors import Cancelled, LinkLost, Refused, StreamError
from harness.migrate.links import Cancel
from harness.migrate.live_move import hand_over
from harness.migrate.memory_image import Batch, Memory, bits_of_pages, copy_batch, copy_bits
from harness.migrate.precopy import Options
from harness.migrate.shape import backings_of
from kvm_ioctl.request import KvmError

ONE = Batch(0, ((0, 1),))


def memory_of(*values):
    return Memory(bytearray(b"".join(bytes([value]) * PAGE_SIZE for value in values)))


class Taker:
    """Takes pages as a destination does."""

    def __init__(self, memory):
        self.memory = memory

    def bring(self, batch, memory):
        copy_batch(self.memory, memory, batch)

    def bring_bits(self, backing, pages, memory):
        copy_bits(self.memory, memory, pages)


# Without a machine


def test_the_destination_works_while_the_source_waits():
    source, destination = same_process.ends()
    seen = []

    def work():
        seen.append(destination.read(3))
        destination.write(b"and back")
        yield
        seen.append(destination.read(100))
        destination.write(b"!")
        return "done"

    source.work = work()
    source.write_all([b"th", memoryview(b"ere")])
    assert seen == []
    assert (source.read(100), seen) == (b"and back", [b"the"])
    with pytest.raises(HarnessError, match="has not taken"):
        source.received  # noqa: B018 - raises
    assert (source.read(1), seen) == (b"!", [b"the", b"re"])
    assert source.received == "done"
    assert (source.sent_bytes, source.received_bytes) == (5, 9)
    assert (destination.sent_bytes, destination.received_bytes) == (9, 5)


def test_a_buffer_is_filled_from_pieces():
    source, destination = same_process.ends()
    source.write(b"ab")
    source.write(b"cdef")
    buffers = [memoryview(bytearray(3)), memoryview(bytearray(2))]
    destination.fill(buffers)
    assert [bytes(buffer) for buffer in buffers] == [b"abc", b"de"]
    assert destination.read(9) == b"f"


def test_a_destination_that_asks_for_more_than_there_is_has_lost_its_source():
    _, destination = same_process.ends()
    with pytest.raises(LinkLost, match="link to the source lost: nothing can come"):
        destination.read(1)


def test_a_destination_that_ends_without_a_word_is_lost():
    source, _ = same_process.ends()
    with pytest.raises(LinkLost, match="link to the destination lost: the destination has ended"):
        source.read(1)

    def work():
        yield
        raise ZeroDivisionError

    source.work = work()
    with pytest.raises(LinkLost, match="has ended"):
        source.read(1)
    assert isinstance(source.error, ZeroDivisionError)


def test_who_is_closed_or_cancelled_does_nothing_more():
    source, destination = same_process.ends()
    destination.taker = Taker(memory_of(0, 0))
    cancel = Cancel()
    cancel.set()
    with source.during("testing", cancel=cancel):
        for do in (lambda: source.write(b"x"), lambda: source.bring(ONE, memory_of(1))):
            with pytest.raises(Cancelled):
                do()
    destination.close()
    with pytest.raises(LinkLost, match="there is no place for pages"):
        source.bring(ONE, memory_of(1))
    source.close()
    with pytest.raises(LinkLost, match="it is closed"):
        source.write(b"x")


def test_pages_are_copied_past_the_stream():
    source, destination = same_process.ends()
    memory = memory_of(0, 0, 0, 0, 0, 0)
    destination.taker = Taker(memory)
    source.bring(Batch(0, ((1, 2), (5, 1))), memory_of(9, 1, 1, 9, 9, 2))
    source.bring_bits(0, {0: 0b010100}, memory_of(9, 9, 3, 9, 4, 9))
    assert bytes(memory.view) == bytes(memory_of(0, 1, 3, 0, 4, 2).view)
    assert source.sent_bytes == 5 * PAGE_SIZE
    assert not destination.has_input()


# With one

needs_kvm = pytest.mark.kvm


@pytest.fixture
def guest(kvm):
    with counting(kvm) as guest:
        yield guest


@needs_kvm
def test_all_memory_arrives_without_another_thread(guest, monkeypatch):
    monkeypatch.setattr("threading.Thread.start", lambda thread: pytest.fail("a thread"))
    guest.machine.memory.write(0x30000, b"abc" * 2000)
    handed = hand_over(guest.machine)
    with handed.received.machine as there:
        [ours], [theirs] = backings_of(guest.machine), backings_of(there)
        assert ours[:] == theirs[:]
        assert theirs[0x30000:0x30006] == b"abcabc"
        assert handed.sent.size_bytes > handed.received.pages * PAGE_SIZE
    guest.machine.resume()


@needs_kvm
@pytest.mark.parametrize(
    ("module", "name"),
    [
        (transfer.StateWriter, "write"),
        (transfer.StateWriter, "begin"),
        (transfer, "BlankMachine"),
        (transfer.Loader, "rehearse"),
    ],
)
def test_what_the_destination_cannot_do_is_a_refusal_and_the_source_goes_on(
    guest, monkeypatch, module, name
):
    def refuse(*_, **__):
        raise Refused("not today")

    monkeypatch.setattr(module, name, refuse)
    with pytest.raises(Refused, match=r"^the destination refused: not today$"):
        hand_over(guest.machine)
    guest.expect_unharmed()


@needs_kvm
def test_a_source_that_fails_leaves_no_machine_behind(guest, monkeypatch):
    closed = []
    close = transfer.BlankMachine.close
    monkeypatch.setattr(
        transfer.BlankMachine, "close", lambda self: (closed.append(self), close(self))
    )

    def stop():
        raise MachineError("it does not stop")

    source, destination = same_process.ends()
    source.work = live.receiving(guest.machine.kvm, destination)
    with pytest.raises(MachineError, match="does not stop"):
        live.send(guest.machine, source, stop=stop)
    assert len(closed) == 1
    guest.expect_unharmed()


@needs_kvm
def test_nothing_is_left_to_be_read_when_the_machine_is_stopped(guest, monkeypatch):
    rehearsed, left = [], []
    rehearse = transfer.Loader.rehearse
    monkeypatch.setattr(
        transfer.Loader, "rehearse", lambda self: (rehearsed.append(self), rehearse(self))
    )
    source, destination = same_process.ends()
    source.work = live.receiving(guest.machine.kvm, destination)
    live.send(guest.machine, source, stop=lambda: left.append(destination.has_input()))
    source.received.machine.close()
    guest.machine.resume()
    assert (left, len(rehearsed)) == ([False], 1)


@needs_kvm
@pytest.mark.parametrize(("backing", "page"), [(0, 1 << 30), (7, 0)])
def test_pages_outside_memory_are_refused(guest, monkeypatch, backing, page):
    seen = []

    def bring_wrong_ones(loader, *_):
        memory = memory_of(1)
        with pytest.raises(StreamError, match=f"mapping {backing} are outside memory"):
            bring_bits(loader, backing, bits_of_pages([page]), memory)
        with pytest.raises(StreamError, match=f"mapping {backing} are outside memory"):
            loader.bring(Batch(backing, ((page, 1),)), memory)
        seen.append(loader)
        raise Refused("enough")

    bring_bits = transfer.Loader.bring_bits
    monkeypatch.setattr(transfer.Loader, "bring_bits", bring_wrong_ones)
    with pytest.raises(Refused):
        hand_over(guest.machine)
    assert seen
    guest.expect_unharmed()


@needs_kvm
def test_tracking_that_cannot_be_ended_changes_nothing_once_the_machine_is_gone(guest, monkeypatch):
    leave = DirtyTracker.__exit__

    def leave_and_fail(tracker, *_):
        leave(tracker)
        raise KvmError(5, "KVM_SET_USER_MEMORY_REGION", "vm")

    monkeypatch.setattr(DirtyTracker, "__exit__", leave_and_fail)
    handed = hand_over(guest.machine)
    handed.received.machine.close()
    guest.machine.resume()

    def stop():
        raise MachineError("it does not stop")

    source, destination = same_process.ends()
    source.work = live.receiving(guest.machine.kvm, destination)
    with pytest.raises(KvmError):
        live.send(guest.machine, source, stop=stop)


@needs_kvm
def test_a_destination_that_fails_after_commit_lets_the_source_go_on(guest, monkeypatch):
    expect = live.expect

    def expect_and_fail(link, say):
        expect(link, say)
        if say is handover.Say.COMMIT:
            raise StreamError("not like this")

    monkeypatch.setattr(live, "expect", expect_and_fail)
    with pytest.raises(Refused, match=r"^the destination refused: not like this$"):
        hand_over(guest.machine)
    guest.expect_unharmed()


@needs_kvm
def test_a_limit_holds_for_pages_past_the_stream(guest):
    guest.machine.memory.write(0x20000, b"x" * 0x40000)
    handed = hand_over(guest.machine, options=Options(bytes_per_s=1 << 20, most_rounds=1))
    handed.received.machine.close()
    assert handed.sent.rounds[0].seconds > 0.2
    guest.machine.resume()
