"""The outer end of a prompt: requests, answers, ^C, and ends."""

import os
import signal
import threading
import time

import pytest
from agent_process import AgentProcess

from harness.errors import HostError, HostLost
from harness.host import conversation as module
from harness.host.conversation import Conversation
from harness.host.local import ProcessPipe
from harness.host.session import Session


@pytest.fixture
def agent():
    with AgentProcess() as agent:
        yield agent


@pytest.fixture
def said():
    return []


@pytest.fixture
def talk(agent, said):
    """Make a conversation whose texts are collected in `said`."""

    def on_event(event):
        if event["event"] == "emit":
            said.append(event["data"]["text"])

    def make(target="serve"):
        session = Session(ProcessPipe(agent.process), HostLost)
        return Conversation(session, f"conversation_targets:{target}", on_event)

    return make


def press_after(seconds):
    """Press ^C, as a terminal would do it."""
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    return timer


def test_answers_belong_to_their_requests(talk, said):
    with talk() as conversation:
        for name in ("one", "two"):
            assert conversation.ask(name)["done"] == name
    assert said == ["doing one", "doing two"]
    assert conversation.result.outcome == "raise"
    assert conversation.result.error["type"] == "SystemExit"


def test_interrupt_is_passed_on_and_breaks_nothing_here(talk, said):
    with talk() as conversation:
        timer = press_after(1.0)
        assert conversation.ask("wait")["done"] == "wait"
        timer.join()
        assert conversation.ask("more")["done"] == "more"
    assert said == ["doing wait", "interrupted", "doing more"]


def test_a_deadline_interrupts(talk, said):
    with talk() as conversation:
        started = time.monotonic()
        assert conversation.ask("wait", 0.3)["done"] == "wait"
        assert time.monotonic() - started < 20
    assert said == ["doing wait", "interrupted"]


@pytest.mark.parametrize("timeout_s", [0.2, None])
def test_what_ignores_it_is_given_up(talk, monkeypatch, timeout_s):
    monkeypatch.setattr(module, "GRACE_S", 0.5)
    with talk() as conversation:
        timer = press_after(1.0)
        with pytest.raises(HostError, match="no answer within 0 s of an interrupt"):
            conversation.ask("hang", timeout_s)
        timer.join()


def test_the_death_of_the_inner_end_is_said(talk):
    with talk() as conversation, pytest.raises(HostError, match="died: 3"):
        conversation.ask("die")


def look_for(conversation, seconds):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        conversation.look()
        time.sleep(0.01)


def test_the_end_of_the_host_is_said_without_a_request(talk, agent):
    with talk() as conversation:
        agent.process.kill()
        with pytest.raises(HostLost, match="the channel ended"):
            look_for(conversation, 30)


def test_what_fails_at_once_is_said(talk):
    with pytest.raises(HostError, match="ValueError: no good"), talk("fail"):
        pass


def test_what_never_gets_ready_has_a_deadline(talk, monkeypatch):
    monkeypatch.setattr(module, "START_S", 0.3)
    monkeypatch.setattr(module, "GRACE_S", 0.3)
    with pytest.raises(HostError), talk("never_ready"):
        pass


def test_the_signal_is_given_back(talk):
    before = signal.getsignal(signal.SIGINT)
    with talk() as conversation:
        assert signal.getsignal(signal.SIGINT) != before
        with conversation.interruptible(), pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) != signal.default_int_handler
    assert signal.getsignal(signal.SIGINT) == before
