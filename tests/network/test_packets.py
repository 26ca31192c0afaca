"""What happens to a packet, without any network: the clock is a number here."""

import random

import pytest

from harness.network.packets import Direction
from harness.network.shape import LinkShape

MANY = 10_000


@pytest.fixture
def direction():
    return Direction(random.Random(1))


def sent(direction, text, count=MANY, size=1000):
    """Take numbered packets at time 0; return the numbers and times at which they come out."""
    shape = LinkShape.parse(text)
    for number in range(count):
        direction.take(number.to_bytes(4, "little") + bytes(size - 4), shape, 0.0)
    found = []
    while (at := direction.next_at) is not None:
        found += [(int.from_bytes(p[:4], "little"), at) for p in direction.due(at)]
    return found


def test_the_rate_is_kept_and_adds_to_the_delay(direction):
    found = sent(direction, "rate=8mbit,delay=10ms", 100)
    assert [number for number, _ in found] == list(range(100))
    assert [at for _, at in found] == pytest.approx([0.010 + 0.001 * n for n in range(1, 101)])


def test_a_link_that_was_idle_saves_nothing_up(direction):
    sent(direction, "rate=8mbit,delay=0s", 1)
    direction.take(bytes(1000), LinkShape.parse("rate=8mbit"), 5.0)
    assert direction.next_at == pytest.approx(5.001)


@pytest.mark.parametrize(("share", "least", "most"), [("10%", 0.88, 0.92), ("100%", 0, 0)])
def test_packets_are_lost(direction, share, least, most):
    found = sent(direction, f"loss={share},limit={MANY}")
    assert least * MANY <= len(found) <= most * MANY


def test_packets_are_duplicated(direction):
    found = sent(direction, f"duplicate=10%,limit={2 * MANY}")
    assert 1.08 * MANY < len(found) < 1.12 * MANY
    assert {number for number, _ in found} == set(range(MANY))


def test_packets_overtake_those_that_are_delayed(direction):
    found = sent(direction, f"delay=10ms,reorder=10%,limit={MANY}")
    early = [number for number, at in found if at == 0]
    assert 0.08 * MANY < len(early) < 0.12 * MANY
    assert {at for number, at in found if number not in set(early)} == {0.01}


def test_jitter_varies_the_delay_both_ways(direction):
    times = [at for _, at in sent(direction, f"delay=10ms,jitter=5ms,limit={MANY}")]
    assert 0.005 <= min(times) < 0.006
    assert 0.014 < max(times) <= 0.015


def test_no_more_packets_wait_than_may(direction):
    assert [number for number, _ in sent(direction, "delay=1ms,limit=7")] == list(range(7))


def test_nothing_gets_through_a_cut(direction):
    cut = LinkShape.parse("duplicate=100%").cut()
    for _ in range(MANY):
        direction.take(b"x", cut, 0.0)
    assert direction.next_at is None


def test_a_packet_waits_for_its_time(direction):
    direction.take(b"x", LinkShape.parse("delay=10ms"), 1.0)
    assert direction.due(1.009) == []
    assert direction.due(1.011) == [b"x"]
    assert direction.due(1.011) == []
