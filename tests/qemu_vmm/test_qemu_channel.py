"""The channel that stays while QEMUs come and go: in order, whole, and waiting for no reader."""

import select
import socket
import threading
import time

import pytest

from harness.errors import HostError
from harness.qemu_vmm import channel as channel_module
from harness.qemu_vmm.channel import Channel

WAIT_S = 20.0


@pytest.fixture
def channel():
    made = Channel()
    yield made
    made.close()


@pytest.fixture
def pair():
    ends = []

    def made():
        ours, theirs = socket.socketpair()
        ends.extend((ours, theirs))
        return ours, theirs

    yield made
    for end in ends:
        end.close()


def received(channel, size):
    data = b""
    while len(data) < size:
        assert select.select([channel], [], [], WAIT_S)[0], f"waited in vain behind {data[-20:]}"
        if not (piece := channel.receive()):
            break
        data += piece
    return data


def test_what_comes_after_a_switch_comes_behind_what_was_there(channel, pair):
    first, guest = pair()
    second, moved = pair()
    channel.plug(first)
    guest.sendall(b"before ")
    moved.sendall(b"after")
    channel.plug(second)
    assert received(channel, 12) == b"before after"


def test_a_switch_does_not_wait_for_whoever_reads_and_loses_nothing(channel, pair):
    first, guest = pair()
    second, moved = pair()
    channel.plug(first)
    much = bytes(range(256)) * 8192
    # More than any socket holds; the guest talks on, though nobody reads.
    sender = threading.Thread(target=guest.sendall, args=(much,))
    sender.start()
    sender.join(WAIT_S)
    assert not sender.is_alive()
    began = time.monotonic()
    channel.plug(second)
    assert time.monotonic() - began < 5
    moved.sendall(b"end")
    assert received(channel, len(much) + 3) == much + b"end"


def test_what_is_sent_goes_to_the_last_one_plugged_in(channel, pair):
    first, guest = pair()
    second, moved = pair()
    channel.plug(first)
    channel.transmit(b"1")
    channel.plug(second)
    channel.transmit(b"2")
    assert (guest.recv(9), moved.recv(9)) == (b"1", b"2")


def test_nothing_is_sent_while_it_is_held(channel, pair):
    first, guest = pair()
    second, moved = pair()
    channel.plug(first)
    with channel.held():
        sender = threading.Thread(target=channel.transmit, args=(b"late",))
        sender.start()
        sender.join(0.3)
        assert sender.is_alive()
        channel.plug(second)
    sender.join(WAIT_S)
    assert moved.recv(9) == b"late"
    guest.setblocking(False)
    with pytest.raises(BlockingIOError):
        guest.recv(9)


def test_a_guest_that_does_not_take_what_was_sent_cannot_be_held(channel, pair, monkeypatch):
    monkeypatch.setattr(channel_module, "_QUIET_S", 0.3)
    first, _ = pair()
    channel.plug(first)
    channel.transmit(b"unread")
    with pytest.raises(HostError, match="did not read its channel"), channel.held():
        pass


def test_the_end_comes_behind_all_that_was_said(channel, pair):
    first, guest = pair()
    channel.plug(first)
    guest.sendall(b"last words")
    channel.end()
    assert received(channel, 99) == b"last words"


def test_without_qemu_nothing_can_be_sent(channel):
    with pytest.raises(OSError, match="no QEMU carries it"):
        channel.transmit(b"x")


def test_it_closes_though_nobody_ever_read(pair):
    channel = Channel()
    first, guest = pair()
    channel.plug(first)
    guest.sendall(bytes(1 << 16))
    began = time.monotonic()
    channel.close()
    assert time.monotonic() - began < 5
