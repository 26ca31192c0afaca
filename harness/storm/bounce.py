"""A storm: one machine at work, handed to and fro between two processes, beside its twin.

The two take turns: who has the machine lets it work and sends it on live while it does. The process
that called has the twin, which nobody moves, and compares what the steps gave as they end; at last
the machine is sent to it, and memory and state are compared too.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from harness.errors import HostError, ScenarioFailure
from harness.machine.machine import Machine
from harness.migrate import live
from harness.migrate.connections import connect_unix, listen_unix
from harness.migrate.difference import memory_differences, state_differences
from harness.migrate.dirty import Tracking
from harness.migrate.links import Link
from harness.migrate.precopy import Options
from harness.migrate.state import MachineState, capture
from harness.proxy.checkpoint import remember, resume
from harness.proxy.machine import ProxyMachine
from harness.storm.figures import figures
from harness.storm.processes import Processes, Reporter
from harness.storm.workload import MEMORY_MIB, TIMEOUT_S, Cut, Kind, Workload
from kvm_ioctl.handles import Kvm

SILENCE_S: Final = 120.0
"""So long nothing may happen."""

RING_BYTES: Final = 64 << 10

_SHOWN: Final = 8
_LONGEST_WORK_S: Final = 0.05

Emit = Callable[..., None]


@dataclass(frozen=True)
class Plan:
    """What a storm is like."""

    moves: int
    kind: Kind = field(default_factory=Kind)
    seed: int = 0
    tracking: Tracking = Tracking.LOG

    def work_s(self, number: int) -> float:
        """How long the machine works in peace before it is moved for the n-th time (seconds)."""
        return random.Random(f"{self.seed} {number}").uniform(0, _LONGEST_WORK_S)

    @property
    def machine_options(self) -> dict[str, Any]:
        """Of the machine, see `ProxyMachine`."""
        ring = RING_BYTES if self.tracking is Tracking.RING else 0
        return {"memory_mib": MEMORY_MIB, "timeout_s": TIMEOUT_S, "dirty_ring_bytes": ring}


def storm(emit: Emit, plan: Plan) -> dict[str, Any]:
    """Let the storm blow; return what it did.

    Raises ScenarioFailure: a guest did what it must not, or KVM refused to go on.
    Raises HostError: a process died, or nothing happened for too long.
    """
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="nsvm-storm-") as directory, Kvm() as kvm:
        places = [Path(directory, name) for name in ("one", "other", "end")]
        parts = [_Process(plan, index, places).run for index in range(2)]
        with listen_unix(places[2]) as listener, Processes(parts, "storm") as children:

            def watch(until: Callable[[], bool]) -> None:
                children.watch(seen.take, until=until, silence_s=SILENCE_S)

            twin = Workload.begin(ProxyMachine(kvm, **plan.machine_options), plan.kind)
            with twin.machine:
                seen = _Seen(emit, plan, twin)
                watch(lambda: len(seen.moves) == plan.moves)
                with children.explaining(seen.take):
                    received = live.receive(kvm, listener.accept(SILENCE_S))
                with received.machine:
                    watch(lambda: seen.ended)
                    seen.compare(received.machine, received.state)
    return {**seen.report(), "seconds": round(time.monotonic() - started, 3)}


class _Seen:
    """What the two processes report, compared with the twin."""

    def __init__(self, emit: Emit, plan: Plan, twin: Workload) -> None:
        self.moves: list[Mapping[str, Any]] = []
        self.divergences: list[str] = []
        self.ended = False
        self._emit = emit
        self._plan = plan
        self._twin = twin

    def take(self, event: Mapping[str, Any]) -> None:
        """Take one report."""
        if "error" in event:
            what = f"storm, after {len(self.moves)} moves: {event['error']}"
            raise ScenarioFailure(what) if event["failure"] else HostError(what)
        if "move" in event:
            self.moves.append(event["move"])
            self._emit("moved", number=len(self.moves), of=self._plan.moves, **event["move"])
        if "step" in event:
            self._compare_step(event["step"])
        self.ended = self.ended or "ended" in event

    def _compare_step(self, entry: str) -> None:
        expected = self._twin.step()
        if entry != expected:
            self._diverged(f"a step gave {entry!r}, the twin's {expected!r}")

    def compare(self, machine: Machine, state: MachineState) -> None:
        """Compare the machine at its end with the twin."""
        with self._twin.machine.paused():
            found = [
                *memory_differences(self._twin.machine, machine),
                *state_differences(capture(self._twin.machine), state),
            ]
        if found:
            self._diverged("at the end, " + "; ".join(map(str, found[:_SHOWN])))

    def _diverged(self, how: str) -> None:
        self.divergences.append(f"after {len(self.moves)} moves: {how}")
        self._emit("diverged", how=self.divergences[-1])

    def report(self) -> dict[str, Any]:
        """Return the storm in numbers."""
        return {
            "moves": len(self.moves),
            "levels": self._plan.kind.levels,
            "nested_paging": self._plan.kind.npt,
            "tracking": self._plan.tracking.value,
            "seed": self._plan.seed,
            "steps": self._twin.steps_done,
            "divergences": len(self.divergences),
            "first_divergences": self.divergences[:_SHOWN],
            "in_mid_step": sum(move["in_mid_step"] for move in self.moves),
            "in_guest_mode": sum(move["in_guest_mode"] for move in self.moves),
            "run_pending": sum(move["run_pending"] for move in self.moves),
            "downtime_s": distribution([move["downtime_s"] for move in self.moves]),
            "bytes": distribution([move["bytes"] for move in self.moves]),
            "rounds": distribution([move["rounds"] for move in self.moves]),
            "total_bytes": sum(move["bytes"] for move in self.moves),
        }


def distribution(values: list[float]) -> dict[str, float]:
    """Return the least, median, 90th and 99th percentile and most of some values."""
    if not values:
        return {}
    if len(values) == 1:
        values = values * 2
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    named = {"min": min(values), "median": cuts[49], "p90": cuts[89], "p99": cuts[98]}
    return {name: round(value, 6) for name, value in {**named, "max": max(values)}.items()}


class _Process:
    """One of the two processes that hand the machine to each other."""

    def __init__(self, plan: Plan, index: int, places: list[Path]) -> None:
        self._plan = plan
        self._index = index
        self._places = places

    def run(self, report: Reporter) -> None:
        self._report = report
        mine, other, end = self._index, 1 - self._index, 2
        workload = None
        with Kvm() as kvm, listen_unix(self._places[mine]) as listener:
            if mine == 0:
                machine = ProxyMachine(kvm, **self._plan.machine_options)
                workload = Workload.begin(machine, self._plan.kind)
            for number in range(self._plan.moves):
                if workload is None:
                    workload = self._receive(kvm, listener.accept(SILENCE_S))
                else:
                    self._send(workload, number, self._places[other])
                    workload = None
            if workload is not None:
                self._finish(workload, self._places[end])

    def _receive(self, kvm: Kvm, link: Link) -> Workload:
        ring = self._plan.machine_options["dirty_ring_bytes"]
        received = live.receive(kvm, link, dirty_ring_bytes=ring)
        machine = resume(received.machine, received.sides["proxies"])
        return Workload.resume(machine, received.sides["workload"])

    def _send(self, workload: Workload, number: int, place: Path) -> None:
        machine = workload.machine
        work = machine.in_thread(workload.level, lambda _: self._work(workload))
        time.sleep(self._plan.work_s(number))
        sent = live.send(
            machine,
            connect_unix(place),
            sides=lambda: {"proxies": remember(machine), "workload": workload.state},
            stop=lambda: work.stop(SILENCE_S),
            options=Options(tracking=self._plan.tracking),
        )
        sent.abandon()
        machine.close()
        self._report(
            move={**figures(sent), "in_mid_step": int(workload.state["under_way"])},
        )

    def _work(self, workload: Workload) -> None:
        """Run steps until the vCPU is kicked."""
        while True:
            try:
                entry = workload.step()
            except Cut:
                return
            self._report(step=entry)

    def _finish(self, workload: Workload, place: Path) -> None:
        """Bring the step under way to its end, and send the machine to where the twin is."""
        if workload.state["under_way"]:
            self._report(step=workload.step())
        live.send(workload.machine, connect_unix(place)).abandon()
        workload.machine.close()
        self._report(ended=True)
