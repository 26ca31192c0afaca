"""The kernel's own selftests: their exit status read as a verdict, and who noticed a bug."""

import base64
import zlib

import pytest

from harness.host.session import CallResult
from harness.report.verdict import Outcome, Verdict
from harness.repro.inside import run_program
from harness.repro.peers import KERNEL_LOG, judge, notice, passed

ASSERTION = ["==== Test Assertion Failure ====", "  x86_64/smm_test.c:193: stage == 1", "  pid=1"]
WARN = "WARNING: CPU: 0 PID: 80 at arch/x86/kvm/x86.c:12183 kvm_vcpu_reset+0x83/0x5b0 [kvm]"


def result(status=0, lines=(), kmsg=(), outcome="return"):
    value = {"status": status, "lines": list(lines)}
    kernel = [{"event": "kmsg", "level": 4, "text": text} for text in kmsg]
    return CallResult(outcome, value=value, kmsg=kernel)


@pytest.mark.parametrize(
    ("given", "verdict", "reason"),
    [
        ({}, Verdict.PASS, ""),
        ({"status": 4, "lines": ["1..0 # SKIP no VMX"]}, Verdict.SKIP, "1..0 # SKIP no VMX"),
        ({"status": 254, "lines": ASSERTION}, Verdict.FAIL, "x86_64/smm_test.c:193: stage == 1"),
        ({"status": 1}, Verdict.FAIL, "exit status 1"),
        ({"status": None}, Verdict.FAIL, "did not end within 180 s"),
        ({"outcome": "stuck"}, Verdict.FAIL, "stuck: it could not be killed"),
        ({"outcome": "raise"}, Verdict.ERROR, "the call did not return: raise"),
    ],
)
def test_the_exit_status_is_a_verdict(given, verdict, reason):
    outcome = judge(result(**given))
    assert (outcome.verdict, outcome.reason) == (verdict, reason)


def test_a_complaint_of_the_kernel_is_no_fail_but_noticed():
    outcome = judge(result(kmsg=[WARN]))
    assert outcome.verdict is Verdict.PASS
    assert notice({"t": Outcome(Verdict.PASS)}, {"t": outcome}) == {"t": f"kernel log: {WARN}"}
    complained = Outcome(Verdict.PASS, evidence={KERNEL_LOG: WARN})
    assert notice({"t": complained}, {"t": outcome}) == {}


@pytest.mark.parametrize(
    ("before", "after", "noticed"),
    [
        ("PASS", "FAIL", {"t": "why"}),
        ("PASS", "PASS", {}),
        ("PASS", "ERROR", {}),
        ("FAIL", "FAIL", {}),
        ("SKIP", "FAIL", {}),
    ],
)
def test_who_fails_with_the_bug_only_noticed_it(before, after, noticed):
    outcomes = [{"t": Outcome(Verdict[word], "why")} for word in (before, after)]
    assert notice(*outcomes) == noticed
    assert passed(outcomes[0]) == (["t"] if before == "PASS" else [])


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo one; echo two >&2; exit 4", {"status": 4, "lines": ["one", "two"]}),
        ("echo begun; exec sleep 60", {"status": None, "lines": ["begun"]}),
    ],
)
def test_a_program_that_was_sent_runs_and_ends(script, expected):
    data = base64.b64encode(zlib.compress(f"#!/bin/sh\n{script}\n".encode())).decode()
    ended = run_program(lambda *a, **k: None, name="program", data=data, limit_s=1.0)
    assert ended == expected
