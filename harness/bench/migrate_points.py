"""What it costs to take a vCPU's and a VM's state and put it into another VM, memory apart.

At every point where a machine can be stopped, against a C loop of the same ioctls on the same state
(migrate_loops.c): only a guest of the harness gets to L2, L3 and SMM, but what KVM says of it there
can be put into any VM that does not run. Runs inside a host. Standard library only.
"""

from __future__ import annotations

import contextlib
import io
import json
import struct
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import monotonic_ns
from typing import Final

from harness.bench.inside import CSide, fitting_count
from harness.errors import HarnessError
from harness.facts import HostView, nested_svm, smm
from harness.migrate.difference import state_differences
from harness.migrate.orders import DEFAULT
from harness.migrate.state import MachineState, StateReader, StateWriter, capture
from harness.migrate.transfer import load, save
from harness.proxy.machine import ProxyMachine
from kvm_ioctl.asm_kvm import kvm_nested_state, kvm_vcpu_events
from kvm_ioctl.handles import Kvm

_MOST_ROUNDS: Final = 1 << 16
_NOTE: Final = "take a state and put it elsewhere, C the same one"
_HEADER: Final = struct.Struct("16sQ")
"""`struct part_header` of migrate_loops.c."""


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
        for number, (rounds, c_s, python_s) in enumerate(
            _measured(point, c_side, kvm, repeat, sample_s, count)
        ):
            emit(
                "pair",
                name=point.name,
                note=_NOTE,
                count=rounds,
                parts=[],
                ours={"done": rounds, "witness": number, "seconds": python_s},
                theirs={"done": rounds, "witness": number, "seconds": c_s},
            )


@dataclass(frozen=True)
class _InC:
    """The C side, with a state of ours."""

    c_side: CSide
    path: Path
    state: MachineState

    def seconds(self, rounds: int) -> float:
        """Take it and put it so often; return how long that takes.

        Raises HarnessError: it is not the same state afterwards.
        """
        said = json.loads(self.c_side.ask("state", f"state {rounds} {self.path}"))
        parts = self.state.vcpus[0]
        nested = parts.get("nested")
        flags = kvm_nested_state.from_bytes(nested).flags if nested else 0
        smm = kvm_vcpu_events.from_bytes(parts["events"]).smi.smm
        wanted = {"done": rounds, "nested_flags": flags, "smm": smm}
        if differing := {name: said[name] for name in wanted if said[name] != wanted[name]}:
            raise HarnessError(f"state: C has {differing}, not {wanted}")
        return float(said["ns"]) / 1e9


@contextlib.contextmanager
def _in_c(c_side: CSide, state: MachineState) -> Iterator[_InC]:
    """Give the C side a state, in a file for the time of the `with`."""
    parts = {**state.vcpus[0], **state.vm}
    with tempfile.NamedTemporaryFile(prefix="nsvm-state-") as file:
        for name, data in parts.items():
            file.write(_HEADER.pack(name.encode(), len(data)) + data)
        file.flush()
        yield _InC(c_side, Path(file.name), state)


def _measured(
    point: Point, c_side: CSide, kvm: Kvm, repeat: int, sample_s: float, count: int | None
) -> Iterator[tuple[int, float, float]]:
    """Yield rounds, C's seconds and Python's of each repetition, C first in every other one."""
    with ProxyMachine(kvm, smm=point.in_smm, irqchip=True) as machine:
        point.reach(machine)
        stream = io.BytesIO()
        state = save(machine, stream).state
        stream.seek(0)
        loaded = load(kvm, stream)
        with loaded.machine as other, _in_c(c_side, state) as in_c:
            reader, writer = StateReader(machine), StateWriter(other, DEFAULT)
            writer.begin(0, state.vcpus[0])

            def in_python(rounds: int) -> float:
                start = monotonic_ns()
                for _ in range(rounds):
                    writer.write(reader.read().state())
                return (monotonic_ns() - start) / 1e9

            in_python(1)
            rounds = count or fitting_count(in_c.seconds, sample_s, _MOST_ROUNDS)
            for number in range(repeat):
                if number % 2:
                    python_s, c_s = in_python(rounds), in_c.seconds(rounds)
                else:
                    c_s, python_s = in_c.seconds(rounds), in_python(rounds)
                yield rounds, c_s, python_s
            if differences := state_differences(capture(machine), capture(other)):
                raise HarnessError(f"{point.name}: not restored: {differences[0]}")
