"""The kernel's own selftests on a host: how each one ends, as a verdict.

They are peers of our scenarios: the same kernels with the same bugs, seen by other eyes.
"""

from __future__ import annotations

import base64
import re
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from harness.errors import HostLost, NsvmError
from harness.host.session import CallResult
from harness.probe.kmsg import splats
from harness.report.verdict import Outcome, Verdict
from harness.runner.hosts import HostPool

TIMEOUT_S = 180.0
"""For one selftest; the slowest takes 5 s in an emulated host, where nothing else is at work."""

KERNEL_LOG = "kernel log"

_OF_THE_CALL_S = 30.0
_SKIP = 4  # KSFT_SKIP, tools/testing/selftests/kselftest.h
_FAILED_ASSERT = "==== Test Assertion Failure ===="


def run_peers(
    pool: HostPool, programs: Mapping[str, Path], names: Iterable[str] | None = None
) -> dict[str, Outcome]:
    """Run selftests on one kernel, one after the other: all, or those named.

    One that fails runs again, on a machine of its own: only what fails twice is a FAIL.
    """
    outcomes = {}
    for name in programs if names is None else names:
        outcome = _run(pool, name, programs[name])
        if outcome.verdict in (Verdict.FAIL, Verdict.ERROR):
            pool.drop({})
            outcome = _run(pool, name, programs[name])
        if outcome.verdict in (Verdict.FAIL, Verdict.ERROR):
            # What it left in the kernel is not the next one's to find.
            pool.drop({})
        outcomes[name] = outcome
    return outcomes


def _run(pool: HostPool, name: str, program: Path) -> Outcome:
    try:
        _, session = pool.session({})
        result = session.call(
            "harness.repro.inside:run_program",
            timeout_s=TIMEOUT_S + _OF_THE_CALL_S,
            name=name,
            data=base64.b64encode(zlib.compress(program.read_bytes())).decode(),
            limit_s=TIMEOUT_S,
        )
    except HostLost as e:
        verdict = Verdict.ERROR if e.silent or e.unreachable else Verdict.FAIL
        return Outcome(verdict, f"the host was lost: {e}")
    except NsvmError as e:
        return Outcome(Verdict.ERROR, str(e))
    return judge(result)


def judge(result: CallResult) -> Outcome:
    """Return how a selftest ended: by its exit status, as kselftest reads it.

    What the kernel complains of meanwhile, no selftest sees; it is evidence, under KERNEL_LOG.
    """
    if result.outcome in ("timeout", "stuck"):
        return Outcome(Verdict.FAIL, f"{result.outcome}: it could not be killed", result.seconds)
    if result.outcome != "return":
        why = result.error.get("message", result.outcome)
        return Outcome(Verdict.ERROR, f"the call did not return: {why}", result.seconds)
    said = splats([event["text"] for event in result.kmsg])
    evidence = {KERNEL_LOG: said[0]} if said else {}
    return Outcome(*_of_status(result.value), result.seconds, evidence)


def passed(outcomes: Mapping[str, Outcome]) -> list[str]:
    """Return those that passed: only they can notice anything."""
    return [name for name, outcome in outcomes.items() if outcome.verdict is Verdict.PASS]


def notice(before: Mapping[str, Outcome], after: Mapping[str, Outcome]) -> dict[str, str]:
    """Return the selftests that noticed a bug, each with the first line of why.

    Those that fail with the bug and pass without; and those in which the kernel complains with the
    bug only, as whoever runs them may see in its log.
    """
    noticed = {}
    for name, outcome in after.items():
        if before[name].verdict is not Verdict.PASS:
            continue
        if outcome.verdict is Verdict.FAIL:
            noticed[name] = outcome.reason
        elif KERNEL_LOG in outcome.evidence and KERNEL_LOG not in before[name].evidence:
            noticed[name] = f"kernel log: {outcome.evidence[KERNEL_LOG]}"
    return noticed


def _of_status(value: Mapping[str, Any]) -> tuple[Verdict, str]:
    lines = [str(line) for line in value["lines"]]
    match value["status"]:
        case None:
            return Verdict.FAIL, f"did not end within {TIMEOUT_S:.0f} s"
        case 0:
            return Verdict.PASS, ""
        case status if status == _SKIP:
            return Verdict.SKIP, next((line for line in lines if "skip" in line.lower()), "")
        case status:
            return Verdict.FAIL, _failure(lines) or f"exit status {status}"


def _failure(lines: list[str]) -> str:
    """Return the assertion's place and condition; else the last line."""
    if _FAILED_ASSERT in lines:
        after = lines[lines.index(_FAILED_ASSERT) + 1 :]
        return " ".join(re.sub(r"\s+", " ", line).strip() for line in after[:1])
    return lines[-1] if lines else ""
