"""A block of text for a reply on a mailing list: the level of testing."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence

from harness.report.history import Kind, Line, expectation
from harness.report.reproduce import told_command

_WIDTH = 72

#: Words of `CaseRecord.word`, as a sentence has them.
_WORDS = {"PASS": "passed", "XPASS": "passed where an issue is known", "FAIL": "FAILED",
          "KNOWN": "failed as known", "SKIP": "not applicable", "ERROR": "ERROR of the lab",
          "MISS": "never ran"}  # fmt: skip


def level_of_testing(lines: Sequence[Line], max_age_s: float | None = None) -> str:
    """Return the block: hosts, kernels, counts, every failure that is not known, how to repeat."""
    text = ["Level of testing (nSVM harness, KVM nested SVM):", ""]
    for line in lines:
        text += [*_line(line, line.why_red(max_age_s)), ""]
    return "\n".join(map(printable, text))


def printable(text: str) -> str:
    """Return a text without what a terminal would obey."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def _line(line: Line, why: Sequence[str]) -> Iterator[str]:
    run, host = line.latest, line.latest.host
    yield f"* {run.kernel} on {line.host}" + (" -- not green" if why else "")
    for key in ("kernel_origin", "silicon"):
        if host.get(key):
            yield f"  {host[key]}"
    counts = Counter(case.word for case in line.now.values())
    told = [f"{counts[word]} {words}" for word, words in _WORDS.items() if counts[word]]
    yield from _wrapped(f"{_how_many(line)}: {', '.join(told) or 'none'}", "  ")
    levels = Counter(case.levels for case in line.now.values() if case.word in _RAN and case.levels)
    if levels:
        each = ", ".join(f"L{level} {count}" for level, count in sorted(levels.items()))
        yield f"  deepest guest: {each}"
    for reason in why:
        if not reason[0].isdigit():
            yield f"  {reason}"
    for case in line.now.values():
        if case.is_red:
            yield f"  {case.word} {case.case}"
            yield from _wrapped(expectation(case), "      ")
    fixed = line.of(Kind.FIXED)
    if fixed:
        yield f"  fixed since the run before: {len(fixed)}"
        yield from (f"    {change.now.case}" for change in fixed)
    if line.flaky:
        yield "  not always the same:"
        yield from (f"    {case}: {rate} failed" for case, rate in line.flaky.items())
    if repeat := told_command(run.argv):
        yield f"  $ {repeat}"
    if run.version:
        yield f"  harness {run.version} {run.revision}".rstrip()


def _how_many(line: Line) -> str:
    times = max((case.repeat for case in line.latest.cases), default=1)
    return f"{len(line.now)} cases" + (f", up to {times} times each" if times > 1 else "")


_RAN = ("PASS", "XPASS", "FAIL", "KNOWN")


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=indent, subsequent_indent=indent)
