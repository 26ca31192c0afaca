"""What a failure is called: the same failure has the same signature, before and after.

That is the first line of the reason (the first field that differs, the first expectation that did
not hold, or the kernel's own words) without what differs from one time to the next.
"""

from __future__ import annotations

import re

from harness.report.run_record import CaseRecord

#: What changes without the failure being another one, and what stands in its place.
_VOLATILE = tuple(
    (re.compile(pattern), instead)
    for pattern, instead in (
        # The kernel's: [   12.345678], CPU: 0 PID: 110 Comm: python3, nested.c:957, +0x6d1/0x740
        (r"\[ *\d+\.\d{6}\] ?", ""),
        (r"\b(CPU|PID|UID|Comm): \S+", r"\1: *"),
        (r"(\w+\.[chS]):\d+", r"\1:*"),
        (r"\+0x[0-9a-f]+/0x[0-9a-f]+", ""),
        # Pointers, time stamps, and addresses in guests, which are others in another build of the
        # guest images; flags and exit codes are shorter.
        (r"\b0x[0-9a-f]{5,16}\b", "*"),
        (r"\b[0-9a-f]{16}\b", "*"),
        # Durations.
        (r"\b\d+(\.\d+)? (s|ms)\b", r"* \2"),
    )
)


def first_line(reason: str) -> str:
    """Return what a failure says first."""
    return reason.strip().partition("\n")[0]


def signature(case: CaseRecord) -> str:
    """Return the name of an outcome that is not PASS or SKIP; with the verdict in front."""
    text = first_line(case.reason)
    for pattern, instead in _VOLATILE:
        text = pattern.sub(instead, text)
    return f"{case.verdict.value}: {text}"


def splat(case: CaseRecord, text: str, *, lines: int = 60) -> str:
    """Return the kernel's report that made a case FAIL, out of its log; empty if none did.

    At most so many lines, and no further than the mark that ends a report.
    """
    prefix = "kernel: "
    if not case.reason.startswith(prefix):
        return ""
    log = text.splitlines()
    said = first_line(case.reason.removeprefix(prefix))
    start = next((number for number, line in enumerate(log) if said in line), None)
    if start is None:
        return said
    # The line with "cut here" goes before it.
    start = max(0, start - 1) if start and "cut here" in log[start - 1] else start
    found = log[start : start + lines]
    end = next((n for n, line in enumerate(found) if "end trace" in line), len(found) - 1)
    return "\n".join(found[: end + 1])
