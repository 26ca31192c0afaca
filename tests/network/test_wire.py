"""Wires: what they do to a TCP connection, and that nothing is left of them."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from kernel_view import DEADLINE_S, Watched, holders, this_machine

from harness.host.bundle import tree_root
from harness.network import wire as wires
from harness.network.devices import device_names
from harness.network.namespaces import Namespace, NetworkError
from harness.network.shape import LinkShape
from harness.network.wire import ADDRESSES, wire

DATA = os.urandom(256 << 10)


@pytest.fixture
def lay(shaper):
    return lambda text: wire(LinkShape.parse(text), shaper)


@pytest.fixture(autouse=True)
def untouched(shaper):
    """The machine's own network is the same afterwards."""
    before = this_machine()
    yield
    assert this_machine() == before


def sent_over(between, data=DATA):
    """Send over a new connection; return what came, how long it took, and segments sent again."""
    one, other = between.connect()
    with one, other:
        other.settimeout(DEADLINE_S)
        started = time.monotonic()
        thread = threading.Thread(target=lambda: (one.sendall(data), one.shutdown(socket.SHUT_WR)))
        thread.start()
        came = b""
        while piece := other.recv(1 << 16):
            came += piece
        seconds = time.monotonic() - started
        thread.join()
        again = tcp_info(one)["total_retrans"]
    return came, seconds, again


def tcp_info(connected):
    """Some of struct tcp_info, <linux/tcp.h>: eight bytes, then numbers of 32 bits."""
    info = connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    places = {"rtt_us": 15, "total_retrans": 23}
    return {
        name: int.from_bytes(info[8 + 4 * n : 12 + 4 * n], "little") for name, n in places.items()
    }


def test_a_link_without_a_shape_is_fast(lay):
    with lay("delay=0s") as between:
        came, seconds, _ = sent_over(between)
    assert came == DATA
    assert seconds < 2  # at 1 Mbit/s it would be


def test_the_rate_is_kept(lay):
    with lay("rate=2mbit") as between:
        came, seconds, _ = sent_over(between)
    assert came == DATA
    wire_s = len(DATA) * 8 / 2e6
    assert wire_s * 0.95 < seconds < wire_s * 3


def test_packets_are_delayed_both_ways(lay):
    with lay("delay=50ms") as between:
        one, other = between.connect()
        with one, other:
            assert 0.099 < tcp_info(one)["rtt_us"] / 1e6 < 1


def test_lost_packets_are_sent_again(lay):
    with lay("loss=5%") as between:
        came, _, again = sent_over(between)
    assert came == DATA
    assert again > 0


@pytest.mark.parametrize(
    "shape", ["duplicate=20%", "delay=5ms,jitter=3ms", "delay=5ms,reorder=20%"]
)
def test_packets_that_come_twice_or_late_do_no_harm(lay, shape):
    with lay(shape) as between:
        assert sent_over(between)[0] == DATA


def test_a_partition_lets_nothing_through_until_it_heals(lay):
    with lay("delay=1ms") as between:
        one, other = between.connect()
        with one, other:
            between.partition()
            between.shape = LinkShape.parse("duplicate=50%")
            one.sendall(b"x")
            other.settimeout(1)
            with pytest.raises(TimeoutError):
                other.recv(1)
            between.heal()
            other.settimeout(DEADLINE_S)
            assert other.recv(1) == b"x"


def test_there_is_no_connection_over_a_partition(lay):
    with lay("delay=1ms") as between:
        between.partition()
        with pytest.raises(NetworkError, match="connecting over the wire: timed out"):
            between.connect(timeout_s=1)
        between.heal()
        one, other = between.connect()
        one.close()
        other.close()


def test_a_link_can_be_changed(lay):
    with lay("rate=2mbit") as between:
        between.shape = LinkShape()
        assert sent_over(between)[1] < len(DATA) * 8 / 2e6


def test_wires_are_strangers_to_each_other(lay):
    with lay("delay=1ms") as one, lay("delay=1ms") as other:
        with (
            one.ends[1].run(lambda: socket.create_server((ADDRESSES[1], 4000))),
            pytest.raises(ConnectionRefusedError),
        ):
            other.ends[0].run(lambda: socket.create_connection((ADDRESSES[1], 4000), timeout=10))
        inside = one.ends[0].run(lambda: os.readlink("/proc/thread-self/ns/net"))
        assert inside != os.readlink("/proc/self/ns/net")


# Leftovers


class Mistake(Exception):
    """Of whoever uses a wire."""


@pytest.mark.parametrize("end", ["return", "exception", "undelivered"])
def test_nothing_is_left(lay, end):
    with Watched() as watched:
        with contextlib.suppress(Mistake), lay("delay=1ms") as between:
            inodes = [os.fstat(where.fd).st_ino for where in between.ends]
            for where in between.ends:
                watched.add(where.fd)
            one, other = between.connect()
            with one, other:
                if end == "undelivered":
                    between.partition()
                    one.sendall(DATA[:4096])
                if end == "exception":
                    raise Mistake
        watched.expect_gone()
    assert [holders(inode) for inode in inodes] == [[], []]


def test_nothing_is_left_of_one_that_could_not_be_laid(shaper, monkeypatch):
    def refuse(where, address):
        kept.append(where.fd)
        watched.add(where.fd)
        raise NetworkError("no address today")

    kept = []
    with Watched() as watched:
        monkeypatch.setattr(wires.devices, "set_up", refuse)
        with pytest.raises(NetworkError, match="no address today"), wire(LinkShape(), shaper):
            pass
        assert kept
        watched.expect_gone()


_HOLDS_ONE = """
import json, os, signal, sys
from harness.network.shape import LinkShape
from harness.network.wire import Shaper, wire

signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
with wire(LinkShape(delay_s=0.001), Shaper[sys.argv[1]]) as between:
    sockets = between.connect()
    print(json.dumps([[where.fd, os.fstat(where.fd).st_ino] for where in between.ends]), flush=True)
    signal.pause()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_by_a_process_that_is_killed(shaper, number):
    command = [sys.executable, "-c", _HOLDS_ONE, shaper.name]
    with Watched() as watched, ended(subprocess.Popen(command, **_PIPED)) as process:
        ends = json.loads(process.stdout.readline())
        for fd, _ in ends:
            theirs = os.open(f"/proc/{process.pid}/fd/{fd}", os.O_RDONLY)
            watched.add(theirs)
            os.close(theirs)
        assert len(watched.alive()) == 2
        assert all(holders(inode) for _, inode in ends)
        process.send_signal(number)
        process.wait(DEADLINE_S)
        watched.expect_gone()
    assert [holders(inode) for _, inode in ends] == [[], []]


_PIPED = {"stdout": subprocess.PIPE, "cwd": tree_root()}


@contextlib.contextmanager
def ended(process):
    with process:
        try:
            yield process
        finally:
            process.kill()


def test_what_fails_inside_a_namespace_is_raised_outside(shaper):
    with Namespace() as where:
        assert device_names(where) == ["lo"]
        with pytest.raises(ZeroDivisionError):
            where.run(lambda: 1 // 0)


def test_a_shaper_that_died_is_named(shaper, monkeypatch):
    if shaper is not wires.Shaper.PACKETS:
        pytest.skip("netem is no process")
    started = []
    start = wires._start
    monkeypatch.setattr(wires, "_start", lambda fds: started.append(start(fds)) or started[0])
    with wire(LinkShape(), shaper) as between:
        started[0].kill()
        started[0].wait()
        with pytest.raises(NetworkError, match="the process that shapes"):
            between.partition()
