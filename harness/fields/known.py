"""Warnings of kernels that cells are known to provoke: reviewed, and no verdict any more."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class KnownWarning:
    """A line of the kernel's log that is explained."""

    issue: str
    """Its id in `harness/known_issues.toml`, which has mechanism and evidence."""
    pattern: re.Pattern[str]
    fields: tuple[str, ...]
    """Those whose cells provoke it."""


KNOWN_WARNINGS: Final = (
    KnownWarning(
        "root-without-memory-warns",
        re.compile(r"WARNING: .* nested_svm_vmexit\+"),
        ("control.nested_cr3", "control.nested_ctl"),
    ),
)


def issue_of(line: str, field: str) -> str | None:
    """Return the id of the known issue behind a line of the log, while a field was tried."""
    for known in KNOWN_WARNINGS:
        if field in known.fields and known.pattern.search(line):
            return known.issue
    return None
