"""The C side as a process: scripts stand in for it where it misbehaves."""

import pytest

from harness.bench import inside
from harness.bench.inside import CSide
from harness.bench.loops import Work
from harness.errors import HostError


def script(text):
    return f"#!/bin/sh\n{text}\n".encode()


def test_requests_and_answers_are_lines():
    echo = 'while read -r loop count parts; do echo "ok $count ${#parts} 1500000000"; done'
    with CSide(script(echo)) as c_side:
        assert c_side.run("get_state", 3, ("regs", "msrs")) == Work(3, len("regs,msrs"), 1.5)
        assert c_side.run("api_version", 4) == Work(4, len("-"), 1.5)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("read -r line; echo error KVM_RUN: Bad address", "C side of run_exit: KVM_RUN: Bad addr"),
        ("read -r line", "C side of run_exit ended"),
    ],
)
def test_what_goes_wrong_is_the_hosts(text, why):
    with CSide(script(text)) as c_side, pytest.raises(HostError, match=why):
        c_side.run("run_exit", 1)


def test_no_answer_is_an_error_in_time(monkeypatch):
    monkeypatch.setattr(inside, "ANSWER_S", 0.2)
    with (
        CSide(script("exec sleep 60")) as c_side,
        pytest.raises(HostError, match="did not answer within"),
    ):
        c_side.run("run_exit", 1)


def test_what_cannot_be_executed_is_said():
    with pytest.raises(HostError, match="cannot be run"):
        CSide(b"\x7fELF, but no more than that")
