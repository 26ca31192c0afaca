"""What is called inside a host for `nsvm race`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from harness.errors import HostError
from harness.facts import HostView, nested_svm
from harness.race.arena import By
from harness.race.fields import field_named
from harness.race.race import Tally, race
from kvm_ioctl.handles import Kvm

_CPUS = 2

Emit = Callable[..., None]


def run(
    emit: Emit, *, fields: Sequence[str], by: str, seconds: float, first: bool = False
) -> list[dict[str, Any]]:
    """Race for these fields in turn, `seconds` each; return a tally of each, see `Tally`.

    Raises HostError: there is no nested SVM, or there are no two CPUs to race on.
    """
    fact = nested_svm(HostView())
    if not fact.holds:
        raise HostError(f"a race needs nested SVM: {fact.evidence}")
    cpus = len(os.sched_getaffinity(0))
    if cpus < _CPUS:
        raise HostError(f"a race needs {_CPUS} CPUs, this process may use {cpus}")
    release = os.uname().release

    def tell(tally: Tally) -> None:
        emit("raced", field=tally.row.name, attempts=tally.attempts, hits=tally.hits)

    tallies = []
    for name in fields:
        with Kvm() as kvm:
            tally = race(kvm, field_named(name), By(by), seconds, first=first, tell=tell)
        tell(tally)
        tallies.append(tally.to_json(release))
    return tallies
