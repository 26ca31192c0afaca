"""Moving a machine within this process: through a whole stream, into a VM of its own."""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from dataclasses import dataclass

from harness.machine.machine import Machine
from harness.migrate.notes import Note
from harness.migrate.orders import DEFAULT
from harness.migrate.transfer import load, save


@dataclass(frozen=True)
class Moved:
    """What a move did."""

    pages: int
    size_bytes: int
    downtime_s: float
    """From when the vCPUs were held back to when they may run again."""
    notes: tuple[Note, ...]
    """What the kernel did not give or did not take."""


def move(machine: Machine, *, order: Sequence[str] = DEFAULT) -> Moved:
    """Exchange a machine's VM for a new one with the same state; whoever uses it goes on.

    The old VM is closed. On an error the machine is as it was.

    Raises Refused: KVM does not take what it gave.
    Raises MachineError: a vCPU does not come out of KVM_RUN, or its I/O does not end.
    """
    with machine.paused():
        started = time.monotonic()
        stream = io.BytesIO()
        saved = save(machine, stream)
        stream.seek(0)
        loaded = load(machine.kvm, stream, order=order)
        machine.exchange(loaded.machine)
        loaded.machine.close()
        downtime_s = time.monotonic() - started
    notes = (*saved.state.notes, *loaded.notes)
    return Moved(saved.pages, saved.size_bytes, downtime_s, notes)
