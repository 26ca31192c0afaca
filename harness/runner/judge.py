"""From how a call ended, and what the kernel said meanwhile, to a verdict."""

from __future__ import annotations

from harness.errors import HostLost
from harness.host.session import CallResult
from harness.probe.kmsg import new_taints, splats
from harness.report.verdict import Outcome, Verdict
from harness.scenarios.case import Case


def judge(result: CallResult, case: Case) -> Outcome:
    """Return the outcome of a case whose call came back.

    A kernel splat or a condemning taint makes it a FAIL whatever the scenario itself saw.
    """
    said = splats([event["text"] for event in result.kmsg], case.scenario.benign)
    tainted = new_taints(*result.tainted)
    evidence = _evidence(result)
    if said or tainted:
        what = said[0] if said else f"kernel tainted: {', '.join(tainted)}"
        return Outcome(Verdict.FAIL, f"kernel: {what}", result.seconds, evidence)
    verdict, reason = _own_verdict(result)
    return Outcome(verdict, reason, result.seconds, evidence)


def _own_verdict(result: CallResult) -> tuple[Verdict, str]:
    match result.outcome:
        case "return":
            return Verdict(result.value["verdict"]), result.value["reason"]
        case "timeout":
            return Verdict.FAIL, f"did not end within its timeout ({result.seconds:.0f} s)"
        case "stuck":
            return Verdict.FAIL, "stuck in the kernel: SIGKILL did not end it"
        case "died":
            return Verdict.ERROR, f"the scenario's process died (status {result.raw['status']})"
        case other:
            detail = result.error.get("message", other)
            return Verdict.ERROR, f"{result.error.get('type', other)}: {detail}"


def _evidence(result: CallResult) -> dict[str, str]:
    evidence = {}
    if isinstance(result.value, dict) and result.value.get("trace"):
        evidence["traceback"] = result.value["trace"]
    elif result.error.get("traceback"):
        evidence["traceback"] = result.error["traceback"]
    if result.kmsg:
        evidence["kernel log"] = "\n".join(event["text"] for event in result.kmsg)
    if result.output:
        evidence["output"] = "\n".join(result.output)
    if result.raw.get("stacks"):
        stacks = result.raw["stacks"]
        evidence["kernel stacks"] = "\n".join(f"task {t}:\n{s}" for t, s in stacks.items())
    return evidence


def judge_lost(lost: HostLost, seconds: float) -> Outcome:
    """Return the outcome of a case during which the host died: a FAIL, with its last words.

    An emulated host that hung without a word is the emulation's fault, and no verdict on KVM;
    neither is a lab machine that cannot be reached any more.
    """
    evidence = {"console": lost.console} if lost.console else {}
    verdict = Verdict.ERROR if lost.silent or lost.unreachable else Verdict.FAIL
    return Outcome(verdict, f"the host was lost: {lost}", seconds, evidence)
