"""Links: bytes both ways, ends, deadlines; and the messages that travel over them."""

import os
import subprocess
import sys
import threading
import time
import zlib

import pytest

from harness.migrate import handover
from harness.migrate.connections import (
    child,
    connect_tcp,
    connect_unix,
    listen_tcp,
    listen_unix,
    over_fds,
    pair,
)
from harness.migrate.errors import Cancelled, LinkLost, Refused, StreamError
from harness.migrate.handover import Message, Say
from harness.migrate.links import Cancel

PAGE = 4096
ECHO = "import os\nwhile data := os.read(0, 65536): os.write(1, data)"


@pytest.fixture
def ends():
    one, other = pair()
    with one, other:
        yield one, other


def exactly(link, size):
    data = b""
    while len(data) < size:
        data += link.read(size - len(data))
    return data


def test_bytes_go_both_ways(ends):
    one, other = ends
    one.write(b"there")
    other.write(b"and back")
    assert (exactly(other, 5), exactly(one, 8)) == (b"there", b"and back")
    assert (one.sent_bytes, one.received_bytes) == (5, 8)


def test_more_than_the_kernel_holds(ends):
    one, other = ends
    data = os.urandom(4 << 20)
    writer = threading.Thread(target=one.write, args=(data,))
    writer.start()
    assert exactly(other, len(data)) == data
    writer.join()


def test_what_was_read_ahead_is_not_lost(ends):
    one, other = ends
    data = os.urandom(100_000)
    one.write(data)
    found = other.read(7)
    assert other.received_bytes == len(found) == 7
    assert other.has_input()
    buffer = memoryview(bytearray(len(data)))
    while len(found) < len(data):
        size = min(len(data) - len(found), 60_000)
        other.fill([buffer[:size]])
        found += buffer[:size]
    assert found == data
    assert other.received_bytes == len(data)
    assert not other.has_input()


def test_a_buffer_gets_what_is_for_it_and_the_rest_stays(ends):
    one, other = ends
    one.write(b"for the buffer, and the rest")
    buffer = memoryview(bytearray(14))
    other.fill([buffer[:3], buffer[3:3], buffer[3:]])
    assert bytes(buffer) == b"for the buffer"
    assert other.received_bytes == 14
    assert other.has_input()
    assert other.read(100) == b", and the rest"


@pytest.mark.parametrize(("count", "size"), [(3000, 7), (700, PAGE), (2, 3 << 20)])
def test_many_pieces_into_many_buffers(ends, count, size):
    one, other = ends
    pieces = [os.urandom(size) for _ in range(count)]
    buffers = [memoryview(bytearray(size)) for _ in range(count)]
    writer = threading.Thread(target=one.write_all, args=(pieces,))
    writer.start()
    other.fill(buffers)
    writer.join()
    assert b"".join(buffers) == b"".join(pieces)
    assert one.sent_bytes == other.received_bytes == count * size


def test_the_end_is_a_lost_link_for_a_buffer_too(ends):
    one, other = ends
    one.close()
    with pytest.raises(LinkLost, match="the other end closed it"):
        other.fill([memoryview(bytearray(4))])


def test_the_end_is_a_lost_link(ends):
    one, other = ends
    other.close()
    with (
        one.during("testing"),
        pytest.raises(LinkLost, match=r"^testing: link to .* lost: the other end closed it$"),
    ):
        one.read(1)
    with pytest.raises(LinkLost, match="Broken pipe"):
        one.write(b"x")
    one.close()
    with pytest.raises(LinkLost, match="it is closed"):
        one.read(1)


def test_silence_ends(ends):
    started = time.monotonic()
    with (
        ends[0].during("listening", stall_s=0.1),
        pytest.raises(LinkLost, match=r"^listening: .*nothing moved in time$"),
    ):
        ends[0].read(1)
    assert 0.1 <= time.monotonic() - started < 5


def test_who_takes_nothing_is_lost(ends):
    with ends[0].during("sending", stall_s=0.1), pytest.raises(LinkLost, match="nothing moved"):
        ends[0].write(b"x" * (64 << 20))


def test_dribbling_does_not_keep_a_whole_deadline_off(ends):
    one, other = ends
    stop = threading.Event()

    def dribble():
        while not stop.wait(0.02):
            other.write(b"x")

    thread = threading.Thread(target=dribble)
    thread.start()
    try:
        with one.during("all of it", within_s=0.2), pytest.raises(LinkLost, match="in time"):
            exactly(one, 10_000)
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("work", [lambda link: link.read(1), lambda link: link.write(b"x" * 10**8)])
def test_a_wait_is_cancelled(ends, work):
    cancel = Cancel()
    timer = threading.Timer(0.1, cancel.set)
    timer.start()
    with ends[0].during("waiting", stall_s=30, cancel=cancel), pytest.raises(Cancelled):
        work(ends[0])
    timer.join()


def test_input_is_seen_without_taking_it(ends):
    one, other = ends
    assert not one.has_input()
    other.write(b"x")
    assert one.has_input(1)
    assert one.read(5) == b"x"
    other.close()
    assert one.has_input(1)


def test_pipes_are_a_link():
    (read_1, write_1), (read_2, write_2) = os.pipe(), os.pipe()
    with over_fds(read_1, write_2, "one") as one, over_fds(read_2, write_1, "other") as other:
        one.write(b"abc")
        assert exactly(other, 3) == b"abc"
        other.write(b"d")
        assert one.read(1) == b"d"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(read_1)


def test_unix_sockets(tmp_path):
    place = tmp_path / "socket"
    with listen_unix(place) as listener, connect_unix(place) as one, listener.accept() as other:
        one.write(b"x")
        assert other.read(1) == b"x"
    assert not place.exists()


def test_tcp():
    with (
        listen_tcp() as listener,
        connect_tcp("127.0.0.1", listener.port) as one,
        listener.accept() as other,
    ):
        other.write(b"x")
        assert one.read(1) == b"x"


def test_who_connects_waits_for_who_listens(tmp_path):
    place = tmp_path / "socket"
    links = []
    thread = threading.Thread(target=lambda: links.append(connect_unix(place, 10)))
    thread.start()
    time.sleep(0.1)
    with listen_unix(place) as listener, listener.accept(10):
        thread.join()
    [link] = links
    link.close()


def test_nobody_there_is_said_in_time(tmp_path):
    with pytest.raises(LinkLost, match=r"connecting to unix:.*: No such file or directory"):
        connect_unix(tmp_path / "none", 0.1)
    with listen_tcp() as listener, pytest.raises(LinkLost, match="nothing happened in time"):
        listener.accept(0.05)
    with pytest.raises(LinkLost, match=r"connecting to tcp:127.0.0.1:1: Connection refused"):
        connect_tcp("127.0.0.1", 1, 0.1)
    with (
        pytest.raises(LinkLost, match=r"listening on unix:.*: No such file"),
        listen_unix(tmp_path / "no" / "where"),
    ):
        pass


def test_a_child_talks_over_its_standard_streams():
    with child([sys.executable, "-c", ECHO]) as (link, process):
        data = os.urandom(1 << 20)
        thread = threading.Thread(target=link.write, args=(data,))
        thread.start()
        assert exactly(link, len(data)) == data
        thread.join()
    assert process.returncode == 0
    with pytest.raises(LinkLost, match="starting /none: No such file"), child(["/none"]):
        pass


def test_a_child_that_does_not_end_is_killed(monkeypatch):
    monkeypatch.setattr("harness.migrate.connections._CHILD_END_S", 0.2)
    with child([sys.executable, "-c", "import time; time.sleep(60)"]) as (_, process):
        pass
    assert process.returncode == -9


def test_prints_do_not_get_between_the_bytes():
    code = """
from harness.migrate.connections import standard_streams
link = standard_streams()
print("a message for people")
link.write(link.read(10))
"""
    done = subprocess.run([sys.executable, "-c", code], input=b"x", capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"x", b"a message for people\n")


# Messages


@pytest.mark.parametrize("say", Say)
def test_messages_arrive(ends, say):
    handover.put(ends[0], say, "because")
    assert handover.take(ends[1]) == Message(say, "because")


def test_a_long_reason_is_cut(ends):
    handover.put(ends[0], Say.REFUSED, "x" * 100_000)
    assert 1000 < len(handover.take(ends[1]).why) < 10_000


def test_a_refusal_is_raised_whatever_is_waited_for(ends):
    handover.put(ends[0], Say.REFUSED, "no room")
    with pytest.raises(Refused, match="no room"):
        handover.expect(ends[1], Say.READY)


def sealed(body):
    return len(body).to_bytes(4, "little") + zlib.crc32(body).to_bytes(4, "little") + body


@pytest.mark.parametrize(
    "data",
    [
        sealed(b""),
        sealed(b"{"),
        sealed(b"[]"),
        sealed(b'{"say": "HELLO"}'),
        sealed(b'{"say": ["READY"]}'),
        sealed(b'{"say": "READY", "why": 1}'),
        sealed(b'{"say": "READY", "what": 1}'),
        sealed(b"\xff\xfe"),
        sealed(b"[" * 60_000),
        b"\xff" * 8,
        sealed(b'{"say": "READY"}')[:-1] + b"x",
    ],
)
def test_nonsense_is_one_line(ends, data):
    ends[0].write(data)
    with pytest.raises(StreamError) as caught:
        handover.take(ends[1])
    assert "\n" not in str(caught.value)


def test_any_flipped_bit_of_a_message_is_found():
    good = Message(Say.COMMIT).encode()
    for bit in range(len(good) * 8):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        one, other = pair()
        with other:
            one.write(bad)
            one.close()
            with pytest.raises((StreamError, LinkLost)):
                handover.take(other)
