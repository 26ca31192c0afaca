"""What a running call is sent: text for its standard input, and SIGINT."""

import signal
import time

import pytest
from agent_process import AgentProcess, of_kind, text_of

from harness.errors import HostLost
from harness.host.local import ProcessPipe
from harness.host.session import Session


@pytest.fixture
def agent():
    with AgentProcess() as agent:
        yield agent


def start(agent, target, timeout_s=30, **kwargs):
    """Start a call of agent_input_targets that has a standard input."""
    target = f"agent_input_targets:{target}"
    agent.send("call", id=1, target=target, kwargs=kwargs, timeout_s=timeout_s, stdin=True)


def test_a_call_reads_what_it_is_sent_as_it_comes(agent):
    start(agent, "echo_until", last="stop")
    for text in ("one\n", "tw", "o\nthr", "ee\n"):
        agent.send("input", text=text)
    assert [agent.until("emit")[-1]["data"]["line"] for _ in range(3)] == ["one", "two", "three"]
    agent.send("input", text="zwölf\n")
    assert agent.until("emit")[-1]["data"]["line"] == "zwölf"
    agent.send("input", text="stop\n")
    assert agent.until("end")[-1]["value"] == 5


def test_more_than_a_pipe_holds_waits_in_the_agent_which_goes_on(agent, tmp_path):
    go = tmp_path / "go"
    start(agent, "read_when_told", go=str(go), size=3_000_000)
    agent.until("begin")
    for _ in range(3):
        agent.send("input", text="x" * 1_000_000)
    # The call has read nothing yet, and the agent answers all the same.
    agent.send("hello")
    assert agent.until("hello")[-1]["event"] == "hello"
    go.touch()
    assert agent.until("end")[-1]["value"] == 3_000_000


def test_input_for_a_call_that_closed_it_is_dropped(agent, tmp_path):
    go = tmp_path / "go"
    start(agent, "close_input", go=str(go))
    agent.until("emit")
    agent.send("input", text="x" * 1_000_000)
    agent.send("hello")
    agent.until("hello")
    go.touch()
    assert agent.until("end")[-1]["outcome"] == "return"


def test_input_without_a_call_that_reads_it_is_nothing(agent, tmp_path):
    agent.send("input", text="to nobody\n")
    agent.call("add", a=1, b=2)
    agent.send("input", text="to a call without input\n")
    assert agent.until("end")[-1]["value"] == 3
    start(agent, "echo_until", last="stop")
    agent.send("input", text="stop\n")
    # None of the text before has reached it.
    assert agent.until("end")[-1]["value"] == 1


def test_the_end_of_the_agent_ends_the_input(agent, tmp_path):
    said = tmp_path / "said"
    start(agent, "read_to_the_end", file=str(said))
    agent.until("emit")
    agent.process.kill()
    agent.process.wait(30)
    deadline = time.monotonic() + 30
    while not (said.exists() and said.read_text()):
        assert time.monotonic() < deadline, "the call still waits for input"
        time.sleep(0.01)
    assert said.read_text() == "end"


def test_interrupt_is_a_keyboard_interrupt_that_can_be_caught(agent):
    start(agent, "count_interrupts", wanted=2)
    for _ in range(2):
        agent.until("emit")
        agent.send("interrupt")
    assert agent.until("end")[-1]["value"] == 2


def test_interrupt_ends_a_call_that_does_not_catch_it(agent):
    agent.call("loop_for_ever")
    agent.until("emit")
    agent.send("interrupt")
    end = agent.until("end")[-1]
    assert (end["outcome"], end["error"]["type"]) == ("raise", "KeyboardInterrupt")


def test_interrupt_reaches_a_call_of_an_agent_that_ignores_it():
    """A shell without job control starts what it runs in the background so."""
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        agent = AgentProcess()
    finally:
        signal.signal(signal.SIGINT, previous)
    with agent:
        agent.call("loop_for_ever")
        agent.until("emit")
        agent.send("interrupt")
        assert agent.until("end")[-1]["error"]["type"] == "KeyboardInterrupt"


def test_interrupt_without_a_call_is_nothing(agent):
    agent.send("interrupt")
    assert agent.end_of("add", a=1, b=2)[-1]["value"] == 3


def test_a_session_converses_with_a_call():
    with AgentProcess() as agent:
        session = Session(ProcessPipe(agent.process), HostLost)
        lines = []

        def answer(event):
            if event["event"] == "begin":
                session.send_input("one\n")
            elif event["event"] == "emit":
                lines.append(event["data"]["line"])
                session.send_input("stop\n")

        result = session.converse(
            "agent_input_targets:echo_until", timeout_s=30, on_event=answer, last="stop"
        )
        assert (result.value, lines) == (2, ["one"])


def test_a_session_interrupts_a_call():
    with AgentProcess() as agent:
        session = Session(ProcessPipe(agent.process), HostLost)

        def stop(event):
            if event["event"] == "emit":
                session.interrupt()

        target = "agent_input_targets:count_interrupts"
        result = session.converse(target, timeout_s=30, on_event=stop, wanted=3)
        assert result.value == 3


def test_what_such_a_call_prints_is_output_as_ever(agent):
    start(agent, "print_input")
    agent.send("input", text="some words\n")
    events = agent.until("end")
    assert text_of(events) == "read: some words"
    assert of_kind(events, "end")[0]["outcome"] == "return"
