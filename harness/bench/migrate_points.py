"""What it costs to take a vCPU's and a VM's state and put it into another VM, memory apart.

At every point where a machine can be stopped, against a C loop of the same ioctls for a plain vCPU
(migrate_loops.c): only a guest of the harness gets to L2, L3 and SMM. Runs inside a host. Standard
library only.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic_ns
from typing import Final

from harness.bench.inside import CSide, fitting_count
from harness.errors import HarnessError
from harness.facts import HostView, nested_svm, smm
from harness.migrate.difference import state_differences
from harness.migrate.orders import DEFAULT
from harness.migrate.state import capture, restore
from harness.migrate.transfer import load, save
from harness.proxy.machine import ProxyMachine
from kvm_ioctl.handles import Kvm

_MOST_ROUNDS: Final = 1 << 16
_NOTE: Final = "capture and restore; C does it with a plain vCPU"


@dataclass(frozen=True)
class Point:
    """Where a machine is stopped."""

    name: str
    depth: int = 1
    """Of the level that runs."""
    in_smm: bool = False

    def reach(self, machine: ProxyMachine) -> None:
        """Bring a machine there."""
        machine.level(self.depth).ping()
        if self.in_smm:
            machine.inject_smi().ping()

    def lacking(self) -> str:
        """Return why this host has no such point; "" if it has."""
        view = HostView()
        needs = [*([nested_svm] if self.depth > 1 else []), *([smm] if self.in_smm else [])]
        facts = {need.__name__: need(view) for need in needs}
        return "; ".join(f"{name}: {f.evidence}" for name, f in facts.items() if not f.holds)


POINTS: Final = (
    Point("state_l1"),
    Point("state_l2", 2),
    Point("state_l3", 3),
    Point("state_smm", in_smm=True),
)
POINT_NAMES: Final = tuple(point.name for point in POINTS)


def run_points(
    emit: Callable[..., None],
    names: list[str],
    repeat: int,
    c_side: CSide,
    kvm: Kvm,
    sample_s: float,
    count: int | None,
) -> None:
    """Run those of `POINTS` that are named; see `run_migrate_benchmarks`."""
    for point in POINTS:
        if point.name not in names:
            continue
        if why := point.lacking():
            emit("skipped", name=point.name, reason=why)
            continue
        rounds = count or fitting_count(lambda n: _in_c(c_side, n), sample_s, _MOST_ROUNDS)
        for number, (c_s, python_s) in enumerate(_measured(point, c_side, kvm, rounds, repeat)):
            emit(
                "pair",
                name=point.name,
                note=_NOTE,
                count=rounds,
                parts=[],
                ours={"done": rounds, "witness": number, "seconds": python_s},
                theirs={"done": rounds, "witness": number, "seconds": c_s},
            )


def _in_c(c_side: CSide, rounds: int) -> float:
    said = json.loads(c_side.ask("state", f"state {rounds}"))
    if said["done"] != rounds:
        raise HarnessError(f"state: C did {said['done']} of {rounds}")
    return float(said["ns"]) / 1e9


def _measured(
    point: Point, c_side: CSide, kvm: Kvm, rounds: int, repeat: int
) -> list[tuple[float, float]]:
    """Return C's seconds and Python's of each repetition, C first in every other one."""
    with ProxyMachine(kvm, smm=point.in_smm, irqchip=True) as machine:
        point.reach(machine)
        stream = io.BytesIO()
        save(machine, stream)
        stream.seek(0)
        loaded = load(kvm, stream)
        with loaded.machine as other:

            def in_python(count: int) -> float:
                start = monotonic_ns()
                for _ in range(count):
                    restore(other, capture(machine), DEFAULT)
                return (monotonic_ns() - start) / 1e9

            in_python(1)
            found = []
            for number in range(repeat):
                if number % 2:
                    python_s, c_s = in_python(rounds), _in_c(c_side, rounds)
                else:
                    c_s, python_s = _in_c(c_side, rounds), in_python(rounds)
                found.append((c_s, python_s))
            if differences := state_differences(capture(machine), capture(other)):
                raise HarnessError(f"{point.name}: not restored: {differences[0]}")
            return found
