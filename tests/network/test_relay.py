"""Lines between two hosts, over a wire."""

import base64
import os
import queue

import pytest

from harness.errors import HostLost
from harness.network import relay as relays
from harness.network.relay import Relay
from harness.network.shape import LinkShape

DEADLINE_S = 60
DATA = os.urandom(200_000)


def line(data):
    return base64.b64encode(data).decode()


class Ends:
    """A relay between two hosts that keep what they are given."""

    def __init__(self, between):
        self.one, self.other = queue.Queue(), queue.Queue()
        self.relay = Relay(between, self.one.put, self.other.put)


def all_of(lines):
    """All that comes until the end."""
    found = b""
    while data := base64.b64decode(lines.get(timeout=DEADLINE_S)):
        found += data
    return found


@pytest.fixture
def between(lay):
    with lay(LinkShape.parse("delay=5ms,loss=1%")) as laid:
        yield laid


def test_what_one_host_says_the_other_one_hears(between):
    ends = Ends(between)
    with ends.relay as relay:
        for at in range(0, len(DATA), 30_000):
            relay.from_one(line(DATA[at : at + 30_000]))
        relay.from_other(line(b"yes"))
        relay.from_one("")
        assert all_of(ends.other) == DATA
        # The end of one direction is not that of the other.
        assert base64.b64decode(ends.one.get(timeout=DEADLINE_S)) == b"yes"
        relay.from_other(line(b"and no"))
        relay.from_other("")
        assert all_of(ends.one) == b"and no"
    assert ends.one.empty()
    assert ends.other.empty()


def test_a_partition_ends_both_directions(between, monkeypatch):
    monkeypatch.setattr(relays, "STALL_S", 4.0)
    ends = Ends(between)
    with ends.relay as relay:
        between.partition()
        relay.from_one(line(b"lost"))
        assert all_of(ends.other) == b""
        assert all_of(ends.one) == b""
        # Of no use, and no error: the host has been told.
        relay.from_one(line(b"lost, too"))
        relay.from_other("")


@pytest.mark.parametrize("nonsense", ["no base64", "!", "YQ", "YWI=YQ"])
def test_nonsense_ends_the_connection_for_both(between, nonsense):
    ends = Ends(between)
    with ends.relay as relay:
        relay.from_one(line(b"so far"))
        relay.from_one(nonsense)
        relay.from_one(line(b"not this"))
        assert all_of(ends.other) == b"so far"
        assert all_of(ends.one) == b""


def test_a_host_that_is_lost_is_somebody_elses_error(between):
    def lose(text):
        raise HostLost("it is gone")

    other = queue.Queue()
    with Relay(between, lose, other.put) as relay:
        relay.from_other(line(b"x"))
        relay.from_one(line(b"y"))
        relay.from_one("")
        assert all_of(other) == b"y"


def test_leaving_ends_what_is_under_way(between):
    ends = Ends(between)
    with ends.relay:
        pass
    assert all_of(ends.one) == all_of(ends.other) == b""
