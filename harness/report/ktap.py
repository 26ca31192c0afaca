"""KTAP, version 1, as the kernel's own tests speak it (Documentation/dev-tools/ktap.rst).

A known FAIL is ``ok ... # XFAIL``; what is not KVM's fault is ``not ok ... # ERROR``.
"""

from __future__ import annotations

from collections.abc import Iterator

from harness.report.run_record import CaseRecord
from harness.report.text import printable


def header(count: int) -> Iterator[str]:
    """Yield what goes before the first result: the version and the plan."""
    yield "KTAP version 1"
    yield f"1..{count}"


def result(number: int, case: CaseRecord, *, title: str = "") -> Iterator[str]:
    """Yield the lines of one outcome: why it is none to be glad of, and the result.

    `number` counts from 1; `title` is the case's id unless given.
    """
    lines = case.reason.splitlines()
    if case.word not in ("PASS", "SKIP"):
        yield from (f"# {printable(line)}" for line in lines)
    ok = "ok" if case.word in ("PASS", "XPASS", "KNOWN", "SKIP") else "not ok"
    # A # in the title would begin a directive.
    name = printable(title or case.case).replace("#", "\\#")
    yield f"{ok} {number} {name}{_directive(case, lines)}"


def _directive(case: CaseRecord, lines: list[str]) -> str:
    first = printable(lines[0]) if lines else ""
    match case.word:
        case "SKIP":
            return f" # SKIP {first}".rstrip()
        case "KNOWN":
            return f" # XFAIL known issue {case.known}"
        case "ERROR" | "MISS":
            return f" # ERROR {case.word}"
        case _:
            return ""
