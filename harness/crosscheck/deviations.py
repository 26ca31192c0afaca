"""Differences that have a name: what makes a machine answer otherwise, and is not the kernel's.

They are counted and told, and fail nothing. Whatever is not here is a finding.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from harness.model.operations import Value
from harness.model.seen import STALE_ROOT

_NOTHING: Final[Mapping[str, Value]] = {}


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
    predicted: str = ""
    """What the model must have predicted beside (`Outcome.seen`); empty: nothing."""
    emulated: bool | None = None
    """Only on emulated silicon, or only on real; None: on both."""
    ends: bool = False
    """What comes afterwards cannot be compared."""

    def matches(
        self,
        kind: tuple[str, str],
        expected: Value,
        seen: Value,
        result: str = "",
        predicted: Mapping[str, Value] = _NOTHING,
    ) -> bool:
        """Tell whether a difference is this one; `kind` is the operation's and the field's name."""
        operation, name = kind
        return (
            (not self.predicted or bool(predicted.get(self.predicted)))
            and re.fullmatch(self.result, result) is not None
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
        "what a VMRUN that the CPU refused leaves of the guest's registers and GIF",
        "QEMU 7.2 target/i386 helper_vmrun(): registers are half loaded when it notices, or int_ctl"
        " is not yet: do_vmexit() writes 0 back, and V_GIF is in it",
        (".*",),
        r"rip|rax|cr[034]|efer|gif|nested\.flags",
        result="fail entry",
        emulated=True,
        ends=True,
    ),
    Deviation(
        "l1-on-stale-root",
        "L2 without nested paging clears EFER.SVME, and KVM has dropped L1's root since L1 ran: L1"
        " goes on by what vmcb01 still points to: no end",
        "svm_set_efer(), svm_leave_nested() up to 6.12: see harness/model/roots.py",
        ("WRMSR",),
        "result",
        expected="report",
        seen="hang",
        predicted=STALE_ROOT,
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
    predicted: Mapping[str, Value] = _NOTHING,
) -> Deviation | None:
    """Return the deviation that a difference is, or None: a finding.

    Args:
        deviations: those that are known.
        kind: the operation's and the field's name.
        expected: the model's value.
        seen: the machine's.
        result: the machine's.
        predicted: all that the model said (`Outcome.seen`).

    """
    told = (kind, expected, seen, result, predicted)
    found = (each for each in deviations if each.matches(*told))
    return next(found, None)
