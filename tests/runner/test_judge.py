"""From the end of a call, and what the kernel said meanwhile, to a verdict."""

import pytest

from harness.errors import HostLost
from harness.host.session import CallResult
from harness.report.verdict import Verdict
from harness.runner.judge import judge, judge_lost
from harness.scenarios.case import Case, Scenario

WARN = "WARNING: CPU: 0 PID: 68 at arch/x86/kvm/svm/nested.c:1168 nested_svm_vmexit+0x1/0x2"


def case(*benign):
    return Case(Scenario(lambda context: None, benign=benign), {})


def said(*lines):
    return [{"event": "kmsg", "level": 4, "text": line} for line in lines]


def returned(verdict="PASS", reason="", **more):
    return CallResult("return", value={"verdict": verdict, "reason": reason}, **more)


ERROR = {"type": "HarnessError", "message": "no scenario", "traceback": "Traceback: here"}


@pytest.mark.parametrize(
    ("result", "verdict", "reason"),
    [
        (returned(), "PASS", ""),
        (returned("FAIL", "x: 1, not 2"), "FAIL", "x: 1, not 2"),
        (returned("SKIP", "svm=0"), "SKIP", "svm=0"),
        (returned("ERROR", "no tracefs"), "ERROR", "no tracefs"),
        (CallResult("timeout", seconds=7.2), "FAIL", "did not end within its timeout (7 s)"),
        (CallResult("stuck"), "FAIL", "stuck in the kernel: SIGKILL did not end it"),
        (
            CallResult("died", raw={"status": -11}),
            "ERROR",
            "the scenario's process died (status -11)",
        ),
        (CallResult("raise", error=ERROR), "ERROR", "HarnessError: no scenario"),
        (CallResult("busy"), "ERROR", "busy: busy"),
    ],
)
def test_how_a_call_ended_is_its_verdict(result, verdict, reason):
    outcome = judge(result, case())
    assert (outcome.verdict.value, outcome.reason) == (verdict, reason)


@pytest.mark.parametrize("verdict", ["PASS", "SKIP", "ERROR", "FAIL"])
def test_a_splat_makes_anything_a_fail(verdict):
    outcome = judge(returned(verdict, "its own", kmsg=said("a line", WARN, "Call Trace:")), case())
    assert outcome.verdict is Verdict.FAIL
    assert outcome.reason == f"kernel: {WARN}"
    assert outcome.evidence["kernel log"] == f"a line\n{WARN}\nCall Trace:"


@pytest.mark.parametrize("verdict", ["PASS", "SKIP", "ERROR"])
def test_a_new_condemning_taint_makes_anything_a_fail(verdict):
    outcome = judge(returned(verdict, tainted=(1 << 12, 1 << 12 | 1 << 9)), case())
    assert outcome.verdict is Verdict.FAIL
    assert outcome.reason == "kernel: kernel tainted: W (warning)"


@pytest.mark.parametrize("tainted", [(1 << 9, 1 << 9), (0, 1 << 12), (0, 0)])
def test_an_old_or_harmless_taint_does_not(tainted):
    assert judge(returned(tainted=tainted), case()).verdict is Verdict.PASS


def test_a_line_that_the_scenario_means_does_not():
    result = returned(kmsg=said(WARN))
    assert judge(result, case("nested_svm_vmexit")).verdict is Verdict.PASS
    assert judge(result, case("something else")).verdict is Verdict.FAIL
    mixed = returned(kmsg=said(WARN, "BUG: x"))
    assert judge(mixed, case("nested_svm_vmexit")).reason == "kernel: BUG: x"


def test_evidence_is_all_that_there_is():
    result = CallResult(
        "stuck",
        kmsg=said("log"),
        output=["one", "two"],
        raw={"stacks": {"12": "[<0>] svm_vcpu_run", "13": "[<0>] futex"}},
    )
    assert judge(result, case()).evidence == {
        "kernel log": "log",
        "output": "one\ntwo",
        "kernel stacks": "task 12:\n[<0>] svm_vcpu_run\ntask 13:\n[<0>] futex",
    }
    assert judge(returned(), case()).evidence == {}
    assert judge(CallResult("raise", error=ERROR), case()).evidence == {
        "traceback": "Traceback: here"
    }
    traced = CallResult("return", value={"verdict": "FAIL", "reason": "", "trace": "Traceback"})
    assert judge(traced, case()).evidence == {"traceback": "Traceback"}


def test_a_lost_host_is_a_fail_with_its_last_words():
    outcome = judge_lost(HostLost("QEMU was ended by SIGKILL", "Kernel panic"), 1.5)
    assert outcome.verdict is Verdict.FAIL
    assert outcome.reason == "the host was lost: QEMU was ended by SIGKILL"
    assert outcome.evidence == {"console": "Kernel panic"}
    assert outcome.seconds == 1.5
    assert judge_lost(HostLost("x"), 0).evidence == {}
