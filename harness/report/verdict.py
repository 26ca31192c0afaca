"""KernelCI's words for how a case ended."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class Verdict(Enum):
    """How a case, or a whole measurement, ended."""

    #: KVM did what the scenario claims.
    PASS = "PASS"
    #: KVM did what it must not.
    FAIL = "FAIL"
    #: Not applicable here; the reason is the evidence.
    SKIP = "SKIP"
    #: The harness or the lab broke.
    ERROR = "ERROR"
    #: It was to run and never did.
    MISS = "MISS"


#: Exit status of a run in which nothing ran, or all was skipped.
STATUS_NOTHING = 4


@dataclass(frozen=True)
class Outcome:
    """A verdict with its reason, in one line, and what backs it."""

    verdict: Verdict
    reason: str = ""
    seconds: float = 0.0
    #: Longer texts by title: traceback, kernel splat, console, output.
    evidence: dict[str, str] = field(default_factory=dict)
    #: Id of the known issue that a FAIL is, or that a PASS should have been.
    known: str = ""


def exit_status(verdicts: list[Verdict]) -> int:
    """Return the exit status of a run.

    0: all that ran passed; 1: something FAILed; 2: ERROR or MISS; 4: nothing ran or all was
    skipped.
    """
    if any(v in (Verdict.ERROR, Verdict.MISS) for v in verdicts):
        # A FAIL is news about KVM even in a run that is otherwise broken.
        return 1 if Verdict.FAIL in verdicts else 2
    if Verdict.FAIL in verdicts:
        return 1
    return 0 if Verdict.PASS in verdicts else STATUS_NOTHING


#: What `git bisect run` takes for "cannot be tested", and for "stop".
BISECT_SKIP, BISECT_ABORT = 125, 129


def bisect_status(status: int) -> int:
    """Return an exit status for `git bisect run`: 0 good, 1 bad, 125 cannot tell.

    `status` is `exit_status`'s. Whatever says nothing about KVM is 125: a broken lab, a host that
    does not come up, cases that were skipped.
    """
    return status if status in (0, 1) else BISECT_SKIP
