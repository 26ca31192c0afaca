"""The outer end of the channel: results, order, silence, and the end of a host."""

import json
import socket
import threading
import time

import pytest
from agent_process import AgentProcess

from harness.errors import HostError, HostLost
from harness.host import session as session_module
from harness.host.local import ProcessPipe
from harness.host.qemu import SocketPipe
from harness.host.session import CallResult, Cancelled, Session


class Agent:
    """The other end of a session's socket: what it says is written down in the test."""

    def __init__(self, sock):
        self.socket = sock

    def say(self, *events):
        self.socket.sendall(b"".join(json.dumps(event).encode() + b"\n" for event in events))

    def heard(self):
        """Return the command lines that have arrived."""
        return [json.loads(line) for line in self.socket.recv(1 << 16).splitlines()]


@pytest.fixture
def pair():
    """A session, and the agent it talks to; a cause of death is the reason as it was given."""
    ours, theirs = socket.socketpair()
    theirs.settimeout(30)
    with ours, theirs:
        yield Session(SocketPipe(ours), HostLost, silence_s=0.2), Agent(theirs)


def end(call_id=1, outcome="return", **data):
    return {"event": "end", "id": call_id, "outcome": outcome, "tainted": [0, 512], **data}


def test_a_call_is_sent_as_one_command(pair):
    session, agent = pair
    agent.say(end())
    session.call("m:f", timeout_s=7, a=1, b="x")
    assert agent.heard() == [
        {"op": "call", "id": 1, "target": "m:f", "kwargs": {"a": 1, "b": "x"}, "timeout_s": 7}
    ]


def test_a_result_holds_all_that_was_said_in_order(pair):
    session, agent = pair
    said = [
        {"event": "begin", "id": 1, "pid": 7},
        {"event": "output", "id": 1, "text": "one"},
        {"event": "kmsg", "id": 1, "level": 4, "text": "log"},
        {"event": "emit", "id": 1, "kind": "note", "data": {"n": 1}},
        {"event": "output", "id": 1, "text": "two"},
        end(value=[1, 2], seconds=0.5),
    ]
    agent.say(*said)
    seen = []
    result = session.call("m:f", timeout_s=5, on_event=seen.append)
    assert seen == said
    assert (result.outcome, result.value, result.seconds) == ("return", [1, 2], 0.5)
    assert result.output == ["one", "two"]
    assert [event["text"] for event in result.kmsg] == ["log"]
    assert result.tainted == (0, 512)


def test_events_of_another_call_are_not_this_ones(pair):
    session, agent = pair
    agent.say(
        end(call_id=0, value="of a call before"),
        {"event": "output", "id": 0, "text": "not mine"},
        {"event": "beat"},
        end(value="mine"),
    )
    seen = []
    result = session.call("m:f", timeout_s=5, on_event=seen.append)
    assert (result.value, result.output, len(seen)) == ("mine", [], 1)


def test_calls_are_numbered_one_after_the_other(pair):
    session, agent = pair
    agent.say(end(1, value="first"), end(2, value="second"))
    assert [session.call("m:f", timeout_s=5).value for _ in range(2)] == ["first", "second"]


def test_a_busy_agent_is_an_outcome(pair):
    session, agent = pair
    agent.say({"event": "end", "id": 1, "outcome": "busy"})
    result = session.call("m:f", timeout_s=5)
    assert result.outcome == "busy"
    with pytest.raises(HostError, match="measuring: busy"):
        result.unwrap("measuring")


def test_an_event_in_pieces_is_put_together(pair):
    session, agent = pair
    line = json.dumps(end(value="é" * 40)).encode() + b"\n"

    def dribble():
        for number in range(len(line)):
            agent.socket.sendall(line[number : number + 1])

    thread = threading.Thread(target=dribble)
    thread.start()
    assert session.call("m:f", timeout_s=5).value == "é" * 40
    thread.join()


def test_silence_is_a_lost_host_within_the_deadline(pair):
    session, _ = pair
    started = time.monotonic()
    with pytest.raises(HostLost, match="no sign of life"):
        next(session.events(silence_s=0.3))
    assert 0.3 <= time.monotonic() - started < 10


def test_a_call_is_silent_at_its_own_limit_not_at_its_timeout(pair, monkeypatch):
    session, agent = pair
    monkeypatch.setattr(Session.events, "__defaults__", (0.3,))
    agent.say({"event": "begin", "id": 1, "pid": 7})
    with pytest.raises(HostLost, match="no sign of life"):
        session.call("m:f", timeout_s=1000)


def test_heartbeats_do_not_keep_a_call_waiting_for_ever(pair):
    session, agent = pair
    stop = threading.Event()

    def beat():
        while not stop.wait(0.05):
            agent.say({"event": "beat"})

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(HostLost, match="did not end within 0 s"):
            session.call("m:f", timeout_s=0.1)
        with pytest.raises(HostLost, match="no 'hello' within 0 s"):
            session.hello(timeout_s=0.3)
    finally:
        stop.set()
        thread.join()


def test_a_call_that_another_thread_cancels_ends_at_once(pair, monkeypatch):
    """Long before the host would be taken for lost."""
    session, agent = pair
    monkeypatch.setattr(session, "silence_s", 60)
    agent.say({"event": "begin", "id": 1})
    cancel = lambda event: threading.Timer(0.1, session.cancel).start()  # noqa: E731
    started = time.monotonic()
    with pytest.raises(Cancelled):
        session.call("m:f", timeout_s=60, on_event=cancel)
    assert time.monotonic() - started < 30


def test_what_was_said_before_the_end_is_not_lost(pair):
    session, agent = pair
    agent.say({"event": "output", "id": 1, "text": "last words"})
    agent.socket.shutdown(socket.SHUT_WR)
    seen = []
    with pytest.raises(HostLost, match="the channel ended"):
        session.call("m:f", timeout_s=1000, on_event=seen.append)
    assert [event["text"] for event in seen] == ["last words"]


def test_a_command_to_a_host_that_is_gone_is_a_lost_host(pair):
    session, agent = pair
    agent.socket.close()
    with pytest.raises(HostLost, match="the channel broke: Broken pipe"):
        session.abort()


def test_a_host_that_reads_nothing_does_not_hold_a_command_up(monkeypatch):
    monkeypatch.setattr("harness.host.qemu.SEND_S", 0.3)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        session = Session(SocketPipe(ours), HostLost)
        started = time.monotonic()
        with pytest.raises(HostLost, match="the channel broke: timed out"):
            session.send_bundle("x", bytes(16 << 20))
        assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("result", "text"),
    [
        (CallResult("raise", error={"type": "ValueError", "message": "no"}), "ValueError: no"),
        (CallResult("died", raw={"status": -9}), "died: -9"),
        (CallResult("timeout"), "timeout"),
        (CallResult("stuck"), "stuck"),
    ],
)
def test_unwrapping_anything_but_a_return_says_what_it_was(result, text):
    with pytest.raises(HostError) as caught:
        result.unwrap("measuring")
    assert str(caught.value) == f"measuring: {text}"


def test_unwrapping_a_return_is_its_value():
    assert CallResult("return", value=0).unwrap("x") == 0


def test_with_a_real_agent_results_come_in_order(monkeypatch):
    monkeypatch.setattr(session_module, "SILENCE_S", 20.0)
    with AgentProcess() as agent:
        session = Session(ProcessPipe(agent.process), HostLost)
        assert session.hello(20)["event"] == "hello"
        session.preload(["agent_targets"])
        for number in range(5):
            result = session.call("agent_targets:add", timeout_s=20, a=number, b=1)
            assert (result.outcome, result.value) == ("return", number + 1)
        result = session.call("agent_targets:talk", timeout_s=20, count=3)
        assert result.output == ["line 0", "line 1", "line 2", "and no end of line"]


def test_abort_from_within_an_event_reaches_the_running_call(tmp_path):
    lent = tmp_path / "lent"
    with AgentProcess() as agent:
        session = Session(ProcessPipe(agent.process), HostLost)

        def stop(event):
            if event["event"] == "emit":
                session.abort()

        target = "agent_targets:borrow"
        result = session.call(target, timeout_s=20, on_event=stop, path=str(lent))
        assert (result.outcome, result.error["type"]) == ("raise", "SystemExit")
        assert not lent.exists()
