"""Differences that have a name: what makes a machine answer otherwise, and is not the kernel's.

They are counted and told, and fail nothing. Whatever is not here is a finding.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from harness.model.operations import Value


@dataclass(frozen=True)
class Deviation:
    """One named difference, and how it is recognised."""

    id: str
    what: str
    source: str
    """The kernel's function or commit, or the emulator's."""
    operations: tuple[str, ...]
    """Kinds of operations, by expressions for whole names: `SetMsr`, or an instruction's."""
    field: str
    """An expression for the whole name of what differs."""
    expected: str = ".*"
    """An expression for the model's value, numbers in hexadecimal."""
    seen: str = ".*"
    """An expression for the machine's."""
    result: str = ".*"
    """An expression for the result that the machine gave."""
    emulated: bool | None = None
    """Only on emulated silicon, or only on real; None: on both."""
    ends: bool = False
    """What comes afterwards cannot be compared."""

    def matches(
        self, kind: tuple[str, str], expected: Value, seen: Value, result: str = ""
    ) -> bool:
        """Tell whether a difference is this one; `kind` is the operation's and the field's name."""
        operation, name = kind
        return (
            re.fullmatch(self.result, result) is not None
            and any(re.fullmatch(each, operation) for each in self.operations)
            and re.fullmatch(self.field, name) is not None
            and re.fullmatch(self.expected, _text(expected)) is not None
            and re.fullmatch(self.seen, _text(seen)) is not None
        )


def _text(value: Value) -> str:
    return hex(value) if type(value) is int else str(value)


DEVIATIONS: Final[tuple[Deviation, ...]] = (
    Deviation(
        "refused-by-cpu-state",
        "what a VMRUN that the CPU refused leaves of the guest's registers",
        "QEMU 7.2 target/i386 helper_vmrun(): registers are half loaded when it notices",
        (".*",),
        r"rip|rax|cr[034]|efer",
        result="fail entry",
        emulated=True,
        ends=True,
    ),
    Deviation(
        "l1-on-stale-root",
        "L2 clears EFER.SVME and L1 goes on, on nested page tables that are not its own: no end",
        "svm_set_efer(), svm_leave_nested() up to 6.12: see harness/crosscheck/hazards.py",
        ("WRMSR",),
        "result",
        expected="report",
        seen="hang",
        ends=True,
    ),
)
"""All that are known."""


def applicable(emulated: bool) -> tuple[Deviation, ...]:
    """Return those that can be met on silicon of this kind."""
    return tuple(each for each in DEVIATIONS if each.emulated in (None, emulated))


def recognise(
    deviations: Sequence[Deviation],
    kind: tuple[str, str],
    expected: Value,
    seen: Value,
    result: str,
) -> Deviation | None:
    """Return the deviation that a difference is, or None: a finding."""
    found = (each for each in deviations if each.matches(kind, expected, seen, result))
    return next(found, None)
