"""Framing on the agent's channel: however the bytes arrive, the commands are the same."""

import json
import os
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.host.agent import Channel

payloads = st.binary(max_size=300) | st.sampled_from([b"", b"\n", b'{"op":"hello"}\n', b"\n\n{"])
commands = st.lists(
    st.just({"op": "hello"})
    | st.builds(lambda n: {"op": "call", "id": n, "target": "a:b"}, st.integers(0, 9))
    | st.builds(lambda data: {"op": "bundle", "name": "x", "data": data}, payloads),
    max_size=6,
)


def encoded(command):
    if command["op"] != "bundle":
        return json.dumps(command).encode() + b"\n"
    line = {"op": "bundle", "name": command["name"], "size": len(command["data"])}
    return json.dumps(line).encode() + b"\n" + command["data"]


def decoded(chunks):
    """Return what a channel makes of bytes that arrive in exactly these chunks."""
    waiting = [chunk for chunk in chunks if chunk]

    def read(fd, size):
        if not waiting:
            return b""
        chunk, waiting[0] = waiting[0][:size], waiting[0][size:]
        if not waiting[0]:
            del waiting[0]
        return chunk

    channel, found, real = Channel(-1, -1), [], os.read
    os.read = read
    try:
        while True:
            found += [{k: v for k, v in c.items() if k != "size"} for c in channel.commands()]
    except EOFError:
        return found
    finally:
        os.read = real


@given(commands, st.lists(st.integers(0, 4000), max_size=8))
def test_commands_are_the_same_however_they_arrive(sent, cuts):
    stream = b"".join(map(encoded, sent))
    places = sorted({min(cut, len(stream)) for cut in cuts})
    edges = zip([0, *places], [*places, len(stream)], strict=True)
    assert decoded([stream[start:end] for start, end in edges]) == sent


@given(commands)
def test_commands_that_arrive_byte_by_byte(sent):
    stream = b"".join(map(encoded, sent))
    assert decoded([stream[n : n + 1] for n in range(len(stream))]) == sent


@pytest.fixture
def ends():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, Channel(theirs.fileno(), theirs.fileno())


def test_a_channel_that_closes_is_an_end(ends):
    ours, channel = ends
    ours.shutdown(socket.SHUT_WR)
    with pytest.raises(EOFError, match="the channel was closed"):
        channel.commands()


def test_a_channel_that_closes_within_a_bundle_is_an_end(ends):
    ours, channel = ends
    ours.sendall(b'{"op":"bundle","name":"x","size":10}\nabc')
    ours.shutdown(socket.SHUT_WR)
    with pytest.raises(EOFError, match="within a bundle"):
        channel.commands()


def test_half_a_command_waits_for_its_other_half(ends):
    ours, channel = ends
    ours.sendall(b'{"op":"hel')
    assert channel.commands() == []
    ours.sendall(b'lo"}\n{"op":')
    assert channel.commands() == [{"op": "hello"}]


@given(st.dictionaries(st.text(), st.text() | st.integers() | st.none()))
def test_an_event_is_one_line(event):
    reader, writer = os.pipe()
    try:
        Channel(-1, writer).send(event)
        data = os.read(reader, 1 << 20)
    finally:
        os.close(reader)
        os.close(writer)
    assert data.endswith(b"\n")
    assert data.count(b"\n") == 1
    assert json.loads(data) == event
