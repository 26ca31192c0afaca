"""The agent, served over pipes: what becomes of calls, and of what they say."""

import os
import signal
import socket
import threading
import time
import zipfile

import pytest
from agent_process import AgentProcess, of_kind, text_of

from harness.host import agent as agent_module
from harness.host.session import SILENCE_S


@pytest.fixture(scope="module")
def shared_agent():
    with AgentProcess() as agent:
        yield agent


@pytest.fixture
def agent():
    with AgentProcess() as agent:
        yield agent


def wait_until(condition, what, deadline_s=30):
    until = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < until, what
        time.sleep(0.01)


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] != "Z"


# Ends of a call


def test_hello_says_what_the_kernel_says(shared_agent):
    shared_agent.send("hello")
    [hello] = shared_agent.until("hello")
    assert hello["release"] == os.uname().release
    assert hello["version"] == os.uname().version
    assert hello["cpus"] == os.cpu_count()
    assert hello["bundle"] == ""
    for name, value in hello["params"].items():
        module, _, parameter = name.partition(".")
        with open(f"/sys/module/{module}/parameters/{parameter}") as file:
            assert value == file.read().strip()


def test_a_call_returns_its_value(shared_agent):
    begin, end = shared_agent.end_of("add", a=2, b=40)
    assert begin["event"] == "begin"
    assert (end["outcome"], end["value"]) == ("return", 42)
    assert end["id"] == begin["id"] == 1
    assert 0 <= end["seconds"] < 30
    assert end["tainted"][0] == end["tainted"][1]


def test_a_call_that_raises_says_what_and_where(shared_agent):
    end = shared_agent.end_of("fail")[-1]
    assert end["outcome"] == "raise"
    assert end["error"]["type"] == "ValueError"
    assert end["error"]["bases"][:2] == ["ValueError", "Exception"]
    assert end["error"]["message"] == "no good"
    assert "in fail" in end["error"]["traceback"]


@pytest.mark.parametrize("target", ["agent_targets:no_such_function", "no_such_module:function"])
def test_a_call_of_nothing_raises_too(shared_agent, target):
    shared_agent.send("call", id=5, target=target, kwargs={}, timeout_s=30)
    end = shared_agent.until("end")[-1]
    assert end["outcome"] == "raise"
    assert "no_such" in end["error"]["message"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
def test_a_call_that_dies_by_a_signal_names_it(shared_agent, number):
    end = shared_agent.end_of("kill_itself", number=int(number))[-1]
    assert (end["outcome"], end["status"]) == ("died", -number)


def test_a_fatal_signal_leaves_a_traceback(shared_agent):
    events = shared_agent.end_of("kill_itself", number=int(signal.SIGSEGV))
    assert "Segmentation fault" in text_of(events)
    assert "in kill_itself" in text_of(events)


def test_a_call_that_exits_is_one_that_died(shared_agent):
    end = shared_agent.end_of("leave", status=0)[-1]
    assert (end["outcome"], end["status"]) == ("died", 0)


def test_a_value_that_json_does_not_know_is_shown(shared_agent):
    end = shared_agent.end_of("unlikely_value")[-1]
    assert (end["outcome"], end["value"]) == ("return", {"path": repr(object)})


def test_an_overdue_call_is_ended_with_its_stack_in_the_output(shared_agent):
    started = time.monotonic()
    events = shared_agent.end_of("loop_for_ever", timeout_s=0.3)
    assert events[-1]["outcome"] == "timeout"
    assert "in loop_for_ever" in text_of(events)
    assert 0.3 <= time.monotonic() - started < 20


def test_an_overdue_call_that_ignores_everything_is_killed(shared_agent, tmp_path):
    file = tmp_path / "pid"
    end = shared_agent.end_of("ignore_everything", timeout_s=0.3, pid_file=str(file))[-1]
    assert end["outcome"] == "timeout"
    assert not is_alive(int(file.read_text()))


def test_the_agent_goes_on_after_each_of_these(agent):
    for target, outcome in [("fail", "raise"), ("write_half_an_event", "died")]:
        assert agent.end_of(target)[-1]["outcome"] == outcome
    assert agent.end_of("loop_for_ever", timeout_s=0.1)[-1]["outcome"] == "timeout"
    assert agent.end_of("add", a=1, b=1)[-1]["value"] == 2


def test_half_an_event_of_a_dead_child_is_shown_as_it_is(shared_agent):
    events = shared_agent.end_of("write_half_an_event")
    assert (events[-1]["outcome"], events[-1]["status"]) == ("died", 7)
    assert '{"event":"emit","ki' in text_of(events)


def test_somebody_left_behind_does_not_keep_a_call_from_ending(shared_agent):
    started = time.monotonic()
    end = shared_agent.end_of("leave_somebody_behind")[-1]
    os.kill(end["value"], signal.SIGKILL)
    assert end["outcome"] == "return"
    # It would have held on for ten seconds.
    assert time.monotonic() - started < 6


def test_a_call_that_sigkill_does_not_end_is_stuck(monkeypatch):
    """A child in an uninterruptible sleep, which here is one whose signals are lost on the way."""
    monkeypatch.setattr(agent_module.signal, "pidfd_send_signal", lambda fd, number: None)
    monkeypatch.setattr(agent_module, "_DUMP_S", 0.1)
    monkeypatch.setattr(agent_module, "_REAP_S", 0.1)
    monkeypatch.setattr(agent_module, "_CLEAN_UP_S", 0.1)
    ours, theirs = socket.socketpair()
    thread = threading.Thread(
        target=agent_module.serve, args=(theirs.fileno(), theirs.fileno()), daemon=True
    )
    with ours, theirs, ours.makefile("rwb") as file:
        ours.settimeout(30)
        thread.start()
        file.write(
            b'{"op":"call","id":1,"target":"agent_targets:loop_for_ever","kwargs":{},'
            b'"timeout_s":0.2}\n'
        )
        file.flush()
        events = []
        while not of_kind(events, "end"):
            events.append(agent_module.json.loads(file.readline()))
        [begin], [end] = of_kind(events, "begin"), of_kind(events, "end")
        try:
            assert end["outcome"] == "stuck"
            assert set(end["stacks"]) <= {str(begin["pid"])}
        finally:
            os.kill(begin["pid"], signal.SIGKILL)
            os.waitpid(begin["pid"], 0)
        ours.shutdown(socket.SHUT_RDWR)
        thread.join(30)
        assert not thread.is_alive()


# What is said meanwhile


def test_output_and_events_arrive_whole_and_in_order(shared_agent):
    events = shared_agent.end_of("talk", count=200)
    lines = [event["text"] for event in of_kind(events, "output")]
    assert lines == [*(f"line {n}" for n in range(200)), "and no end of line"]
    assert [event["data"]["number"] for event in of_kind(events, "emit")] == list(range(200))
    assert {event["kind"] for event in of_kind(events, "emit")} == {"note"}
    assert events[-1]["event"] == "end"


def test_what_is_said_arrives_while_the_call_runs(shared_agent, tmp_path):
    go = tmp_path / "go"
    shared_agent.call("say_and_wait", go=str(go))
    seen = shared_agent.until("emit")
    while not of_kind(seen, "output"):
        seen += shared_agent.until("output")
    assert not of_kind(seen, "end")
    go.touch()
    assert shared_agent.until("end")[-1]["outcome"] == "return"


def test_the_kernel_log_arrives_with_its_level(shared_agent):
    if not os.access("/dev/kmsg", os.W_OK | os.R_OK):
        pytest.skip("/dev/kmsg is not ours to write")
    text = f"nsvm harness test {os.getpid()}"
    shared_agent.end_of("log", text="<4>" + text + " one")
    events = shared_agent.end_of("log", text="<4>" + text + " two")
    said = [event for event in of_kind(events, "kmsg") if text in event["text"]]
    # Not the line of the call before: that was another window.
    assert [(event["level"], event["text"]) for event in said] == [(4, f"{text} two")]


def test_without_a_kernel_log_calls_run_all_the_same(monkeypatch):
    def refuse(path, flags):
        raise FileNotFoundError(2, "No such file or directory", path)

    monkeypatch.setattr(agent_module.os, "open", refuse)
    assert agent_module.Kmsg().records() == []


def test_overwritten_log_records_are_said_not_hidden(monkeypatch):
    answers = [
        OSError(32, "Broken pipe"),
        b"6,1,5000000,-;a line\n SUBSYSTEM=x\n",
        BlockingIOError(),
    ]

    def read(fd, size):
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(agent_module.os, "read", read)
    monkeypatch.setattr(agent_module.os, "lseek", lambda *arguments: 0)
    monkeypatch.setattr(agent_module.os, "open", lambda *arguments: 3)
    assert agent_module.Kmsg().records() == [
        {"level": 4, "text": "(kernel log records were overwritten)"},
        {"level": 6, "text": "a line", "at_us": 5000000},
    ]


def test_an_idle_agent_gives_signs_of_life(shared_agent):
    beats = of_kind([next(shared_agent.events()) for _ in range(2)], "beat")
    assert len(beats) == 2
    # Else a session would take it for dead.
    assert agent_module._BEAT_S < SILENCE_S / 4


# One call at a time, each in a process of its own


def test_a_second_call_is_told_busy(shared_agent, tmp_path):
    go = tmp_path / "go"
    shared_agent.call("say_and_wait", go=str(go))
    shared_agent.call("add", call_id=2, a=1, b=1)
    end = shared_agent.until("end")[-1]
    assert (end["id"], end["outcome"]) == (2, "busy")
    go.touch()
    end = shared_agent.until("end")[-1]
    assert (end["id"], end["outcome"]) == (1, "return")


def test_what_a_call_changes_ends_with_it(shared_agent):
    assert shared_agent.end_of("state")[-1]["value"] == 1
    assert shared_agent.end_of("state")[-1]["value"] == 1


def test_a_call_cannot_read_the_channel(shared_agent):
    assert shared_agent.end_of("read_input", timeout_s=5)[-1]["value"] == ""


def test_preloaded_modules_are_imported_once_and_before_any_call(agent):
    agent.send("preload", modules=["agent_targets"])
    agent.until("preloaded")
    for _ in range(2):
        assert agent.end_of("importer")[-1]["value"] == agent.process.pid
    assert agent.end_of("state")[-1]["value"] == 1


# Aborting and closing


def test_abort_runs_context_managers(agent, tmp_path):
    lent = tmp_path / "lent"
    agent.call("borrow", path=str(lent))
    agent.until("emit")
    assert lent.exists()
    agent.send("abort")
    end = agent.until("end")[-1]
    assert (end["outcome"], end["error"]["type"]) == ("raise", "SystemExit")
    assert not lent.exists()


def test_abort_without_a_call_is_nothing(agent):
    agent.send("abort")
    assert agent.end_of("add", a=1, b=2)[-1]["value"] == 3


def test_closing_the_channel_ends_the_agent_and_its_call_cleans_up(agent, tmp_path):
    lent = tmp_path / "lent"
    agent.call("borrow", path=str(lent))
    pid = of_kind(agent.until("emit"), "begin")[0]["pid"]
    agent.close()
    agent.process.wait(30)
    # All of it is over when the agent is: what follows finds the machine as it was.
    assert not lent.exists()
    assert not is_alive(pid)


def test_closing_the_channel_ends_even_a_call_that_ignores_it(agent, tmp_path):
    file = tmp_path / "pid"
    agent.call("ignore_everything", pid_file=str(file))
    agent.until("emit")
    agent.close()
    agent.process.wait(30)
    pid = int(file.read_text())
    wait_until(lambda: not is_alive(pid), "the call's process outlived the agent")


def test_a_killed_agents_call_cleans_up_and_ends(agent, tmp_path):
    lent = tmp_path / "lent"
    agent.call("borrow", path=str(lent), last_words=0)
    pid = of_kind(agent.until("emit"), "begin")[0]["pid"]
    agent.process.kill()
    wait_until(lambda: not is_alive(pid), "the call's process outlived the agent")
    assert not lent.exists()


def test_power_off_ends_the_agent(agent):
    agent.send("power_off")
    assert agent.process.wait(30) == 0


# Code that is sent


def test_a_bundle_is_importable_and_named(tmp_path):
    archive = tmp_path / "sent.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("sent_module.py", "def f(emit):\n    return 'sent'\n")
    data = archive.read_bytes()
    with AgentProcess(bundles=tmp_path / "bundles") as agent:
        agent.send("bundle", data, name="abc", size=len(data))
        assert agent.until("bundled")[-1]["name"] == "abc"
        agent.send("hello")
        assert agent.until("hello")[-1]["bundle"] == "abc"
        agent.send("call", id=1, target="sent_module:f", kwargs={}, timeout_s=30)
        assert agent.until("end")[-1]["value"] == "sent"


def test_commands_glued_behind_a_bundle_are_not_lost(tmp_path):
    with AgentProcess(bundles=tmp_path) as agent:
        agent.write(b'{"op":"bundle","name":"x","size":3}\na\nb{"op":"hello"}\n')
        assert agent.until("hello")[-1]["bundle"] == "x"
    assert (tmp_path / "x.zip").read_bytes() == b"a\nb"
