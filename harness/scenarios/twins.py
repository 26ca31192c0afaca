"""Twins: two machines that live through the same, one of which is moved.

What they live through is a *journey*: a generator that is given a machine and a log, and that
yields wherever the machine may be moved. What it logs, the state at every yield, and memory at the
end must be the same for both::

    def l2_counts(machine, log):
        l2 = machine.l1.launch()
        log("before", l2.run(loop(100, [atomic_add(l2.scratch, 1)])))
        yield  # it may be moved here
        log("after", l2.run(load(l2.scratch)))

    expect_twins(context, l2_counts)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from harness.migrate.difference import (
    EXCUSED,
    Difference,
    memory_differences,
    state_differences,
)
from harness.migrate.move import move
from harness.migrate.notes import Note
from harness.migrate.orders import DEFAULT
from harness.migrate.state import MachineState, capture, msr_indices
from harness.proxy.cpu import Cpu
from harness.proxy.machine import ProxyMachine
from harness.proxy.program import Result
from harness.scenarios.context import Context
from harness.scenarios.l2 import proxy_machine

MEMORY_MIB: Final = 16
"""What a machine of a few levels needs; moving more takes longer."""

_SHOWN: Final = 12

Log = Callable[[str, object], None]
Journey = Callable[[ProxyMachine, Log], Iterator[None]]
Mover = Callable[[ProxyMachine], Sequence[Note]]


def move_in_process(machine: ProxyMachine, order: Sequence[str] = DEFAULT) -> Sequence[Note]:
    """Move a machine through a stream into another VM of this process."""
    return move(machine, order=order).notes


class Traveller:
    """One of the two: a machine on its journey."""

    def __init__(self, context: Context, journey: Journey, options: dict[str, Any]) -> None:
        self.machine = proxy_machine(context, **({"memory_mib": MEMORY_MIB} | options))
        self.log: list[tuple[str, object]] = []
        self._journey = journey(self.machine, self._note)
        self._msrs = msr_indices(self.machine.kvm)

    def go_on(self) -> bool:
        """Live on to the next place where the machine may be moved; False: it is at the end."""
        return next(self._journey, self) is not self

    def state(self) -> MachineState:
        """Take the machine's state where it stands."""
        with self.machine.paused():
            return capture(self.machine, self._msrs)

    def _note(self, what: str, seen: object) -> None:
        self.log.append((what, _plain(seen)))


def expect_twins(
    context: Context,
    journey: Journey,
    *,
    mover: Mover = move_in_process,
    everywhere: bool = False,
    excused: Sequence[str] = (),
    **options: Any,
) -> int:
    """Fail the scenario unless a machine that is moved ends as its twin that is not.

    Args:
        context: of the scenario.
        journey: what both live through.
        mover: how one is moved, at every yield.
        everywhere: move it before every KVM_RUN too.
        excused: expressions for values that may differ besides `EXCUSED`.
        options: of the machines, see `ProxyMachine`.

    Returns:
        How often it was moved.

    """
    moves = _Moves(context, mover)
    stays, goes = (Traveller(context, journey, options) for _ in range(2))
    if everywhere:
        for cpu in goes.machine.cpus:
            cpu.before_run = moves.before_run
    allowed = (*EXCUSED, *excused)
    while stays.go_on():
        if not goes.go_on():
            context.expect("the moved machine's journey", "over", "as long as its twin's", str)
        place = f"stop {moves.stops}"
        _expect_same(
            context, f"{place}, before it", state_differences(stays.state(), goes.state(), allowed)
        )
        moves.stop(goes.machine)
        _expect_same(
            context, f"{place}, after it", state_differences(stays.state(), goes.state(), allowed)
        )
    context.expect("the moved machine's journey", "longer" if goes.go_on() else "over", "over", str)
    _expect_same_logs(context, stays.log, goes.log)
    _expect_same(context, "memory", memory_differences(stays.machine, goes.machine))
    _expect_same(context, "the end", state_differences(stays.state(), goes.state(), allowed))
    context.expect("moved at all", moves.count > 0, True)
    return moves.count


class _Moves:
    """Moves a machine, counts how often, and records what the kernel would not give or take."""

    def __init__(self, context: Context, mover: Mover) -> None:
        self.count = self.stops = 0
        self._context = context
        self._mover = mover
        self._noted: set[Note] = set()

    def stop(self, machine: ProxyMachine) -> None:
        """Move at a yield."""
        self.stops += 1
        self._move(machine)

    def before_run(self, cpu: Cpu) -> None:
        """Move before a run."""
        self._move(cpu.machine)

    def _move(self, machine: ProxyMachine) -> None:
        self.count += 1
        for note in self._mover(machine):
            if note not in self._noted:
                self._noted.add(note)
                self._context.note("state that does not travel", note=str(note))


def _expect_same(context: Context, where: str, found: Sequence[Difference]) -> None:
    shown = "; ".join(map(str, found[:_SHOWN]))
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    context.expect(f"difference between the twins at {where}", shown + more, "", str)


def _expect_same_logs(
    context: Context, stays: list[tuple[str, object]], goes: list[tuple[str, object]]
) -> None:
    for one, other in zip(stays, goes, strict=False):
        context.expect(f"the moved twin's {one[0]}", other, one)
    context.expect("entries of the moved twin's log", len(goes), len(stays))


def _plain(seen: object) -> object:
    """Return what can be compared of something seen."""
    if isinstance(seen, Result):
        return (str(seen.op), seen.status.name, seen.values, str(seen.fault or ""))
    if isinstance(seen, list | tuple):
        return [_plain(item) for item in seen]
    return seen if isinstance(seen, int | bytes) else str(seen)
