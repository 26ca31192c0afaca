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

A journey that yields a thread of a vCPU (`machine.in_thread`) is moved for as long as that runs.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from harness.errors import ScenarioFailure
from harness.machine.threads import VcpuThread
from harness.migrate.difference import (
    EXCUSED,
    Difference,
    memory_differences,
    state_differences,
)
from harness.migrate.errors import Refused
from harness.migrate.move import move
from harness.migrate.notes import Note
from harness.migrate.orders import DEFAULT
from harness.migrate.state import MachineState, capture, msr_indices
from harness.proxy.cpu import Cpu
from harness.proxy.layout import INSTANCE_SIZE, TRAP_STACK_TOP
from harness.proxy.machine import ProxyMachine
from harness.proxy.program import Result
from harness.scenarios.context import Context
from harness.scenarios.l2 import TIMEOUT_S, proxy_machine

MEMORY_MIB: Final = 16
"""What a machine of a few levels needs; moving more takes longer."""

MOST_MOVES: Final = 12
"""While a thread runs; after so many it may run to its end in peace."""

_SHOWN: Final = 12
_JOIN_S: Final = 60.0
_POLL_S: Final = 0.01

Log = Callable[[str, object], None]
Stop = VcpuThread[Any] | None
Stops = Iterator[Stop]
Trip = Iterator[None]
"""What a journey returns that yields no thread."""
Journey = Callable[[ProxyMachine, Log], Stops]
Mover = Callable[[ProxyMachine], Sequence[Note]]


def move_in_process(machine: ProxyMachine, order: Sequence[str] = DEFAULT) -> Sequence[Note]:
    """Move a machine through a stream into another VM of this process."""
    return move(machine, order=order).notes


class Traveller:
    """One of the two: a machine on its journey."""

    def __init__(self, name: str, machine: ProxyMachine, journey: Journey) -> None:
        self.name = name
        self.machine = machine
        self.log: list[tuple[str, object]] = []
        self.thread: Stop = None
        """What runs where it stopped last."""
        self._journey = journey(self.machine, self._note)
        self._msrs = msr_indices(self.machine.kvm)

    def go_on(self) -> bool:
        """Live on to the next place where the machine may be moved; False: it is at the end.

        Raises ScenarioFailure: the journey's, saying which of the two it is.
        """
        try:
            self.thread = next(self._journey)
        except StopIteration:
            return False
        except ScenarioFailure as e:
            raise ScenarioFailure(f"{self.name}, after {self._shown_log()}: {e}") from e
        return True

    def go_to_the_end(self) -> None:
        """Live on to the end; threads are waited for."""
        while self.go_on():
            self.join()

    def join(self) -> None:
        """Wait for the end of what runs; what it raised is raised where the journey joins it.

        Raises ScenarioFailure: it does not end.
        """
        deadline = time.monotonic() + _JOIN_S
        while self.thread is not None and self.thread.running:
            if time.monotonic() > deadline:
                raise ScenarioFailure(f"{self.name}: its thread runs for more than {_JOIN_S:g} s")
            time.sleep(_POLL_S)

    def state(self) -> MachineState:
        """Take the machine's state where it stands."""
        with self.machine.paused():
            return capture(self.machine, self._msrs)

    def _note(self, what: str, seen: object) -> None:
        self.log.append((what, _plain(seen)))

    def _shown_log(self) -> str:
        return f"{self.log[-1][0]!r}" if self.log else "nothing"


_INTERRUPTED_RIP: Final = re.compile(
    rf"memory at 0x[0-9a-f]*{(TRAP_STACK_TOP - 5 * 8) % INSTANCE_SIZE:04x}"
)
"""Where RIP is in the frame of an exception or interrupt: SS, RSP, RFLAGS and CS are above it."""


class Twins:
    """The one that stays, and those that are compared with it."""

    def __init__(
        self,
        context: Context,
        journey: Journey,
        *,
        mover: Mover,
        excused: Sequence[str],
        options: dict[str, Any],
    ) -> None:
        self.context = context
        self.moves = Moves(context, mover)
        self._journey = journey
        self._options: dict[str, Any] = {"memory_mib": MEMORY_MIB, "timeout_s": TIMEOUT_S} | options
        self._allowed = (*EXCUSED, *excused)
        machine = proxy_machine(context, **self._options)
        self.stays = Traveller("the twin that stays", machine, journey)

    @contextmanager
    def traveller(self, name: str = "the twin that is moved") -> Iterator[Traveller]:
        """Have another one, at the start of the journey."""
        with ProxyMachine(self.context.kvm, **self._options) as machine:
            yield Traveller(name, machine, self._journey)

    def expect_same_state(self, goes: Traveller, where: str) -> None:
        """Fail the scenario unless both are in the same state now."""
        found = state_differences(self.stays.state(), goes.state(), self._allowed)
        self._expect_none(where, found)

    def expect_same_end(self, goes: Traveller) -> None:
        """Fail the scenario unless both saw the same and have the same memory and state."""
        for one, other in zip(self.stays.log, goes.log, strict=False):
            self.context.expect(f"the moved twin's {one[0]}", other, one)
        self.context.expect("entries of the moved twin's log", len(goes.log), len(self.stays.log))
        found = memory_differences(self.stays.machine, goes.machine)
        self._expect_none("memory", [each for each in found if not _is_of_a_tick(each)])
        self.expect_same_state(goes, "the end")

    def _expect_none(self, where: str, found: Sequence[Difference]) -> None:
        shown = "; ".join(map(str, found[:_SHOWN]))
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        what = f"difference between the twins (stays, moved) at {where}"
        self.context.expect(what, shown + more, "", str)


def _is_of_a_tick(difference: Difference) -> bool:
    """Tell whether two interrupts came one NOP apart, by the RIP that is left on a dead stack.

    A tick of the emulated host between STI and NOP ends the interrupt shadow (known issue
    quirk-vmrun-ignores-interrupt-shadow), in either twin.
    """
    one, other = difference.one, difference.other
    if not (isinstance(one, int) and isinstance(other, int) and abs(one - other) == 1):
        return False
    return _INTERRUPTED_RIP.fullmatch(difference.what) is not None


class Moves:
    """Moves machines, counts how often, and records what the kernel would not give or take."""

    def __init__(self, context: Context, mover: Mover) -> None:
        self.count = 0
        self._context = context
        self._mover = mover
        self._noted: set[Note] = set()

    def move(self, machine: ProxyMachine) -> None:
        """Move a machine.

        Raises ScenarioFailure: KVM does not take what it gave.
        """
        self.count += 1
        try:
            notes = self._mover(machine)
        except Refused as e:
            raise ScenarioFailure(f"move {self.count}: {e}") from e
        if new := [note for note in notes if note not in self._noted]:
            self._noted.update(new)
            self._context.note("state that does not travel", notes=[str(note) for note in new])

    def while_running(self, goes: Traveller) -> None:
        """Move a machine again and again for as long as its thread runs."""
        before = self.count
        while goes.thread is not None and goes.thread.running:
            self.move(goes.machine)
            if self.count - before == MOST_MOVES:
                break
        goes.join()


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
    twins = Twins(context, journey, mover=mover, excused=excused, options=options)
    moves = twins.moves
    with twins.traveller() as goes:
        if everywhere:
            for cpu in goes.machine.cpus:
                cpu.before_run = lambda cpu: moves.move(cpu.machine)
        _live_through(twins, goes)
    context.expect("moved at all", moves.count > 0, True)
    return moves.count


def _live_through(twins: Twins, goes: Traveller) -> None:
    journey = "the moved machine's journey"
    for stop in itertools.count(1):
        stays_goes_on, goes_on = twins.stays.go_on(), goes.go_on()
        twins.context.expect(journey, _journey(goes_on), _journey(stays_goes_on), str)
        if not goes_on:
            break
        if goes.thread is not None:
            twins.moves.while_running(goes)
            twins.stays.join()
            continue
        twins.expect_same_state(goes, f"stop {stop}, before it")
        twins.moves.move(goes.machine)
        twins.expect_same_state(goes, f"stop {stop}, after it")
    twins.expect_same_end(goes)


def _journey(goes_on: bool) -> str:
    return "goes on" if goes_on else "is over"


def expect_twins_of_each_cut(
    context: Context,
    journey: Journey,
    *,
    mover: Mover = move_in_process,
    excused: Sequence[str] = (),
    **options: Any,
) -> int:
    """Fail the scenario unless a machine that is moved once, wherever, ends as its twin.

    It lives through the journey once for every KVM_RUN, and is moved before that one only.

    Returns:
        How many KVM_RUNs there were.

    """
    twins = Twins(context, journey, mover=mover, excused=excused, options=options)
    runs = _CutAt(twins.moves, None)
    runs.watch(twins.stays)
    twins.stays.go_to_the_end()
    for number in range(1, runs.seen + 1):
        cut = _CutAt(twins.moves, number)
        with twins.traveller(f"the twin that is moved at run {number}") as goes:
            cut.watch(goes)
            goes.go_to_the_end()
            twins.expect_same_end(goes)
    context.expect("moves", twins.moves.count, runs.seen)
    return runs.seen


class _CutAt:
    """Moves a machine before one of its runs."""

    def __init__(self, moves: Moves, number: int | None) -> None:
        self.seen = 0
        self._moves = moves
        self._number = number

    def watch(self, traveller: Traveller) -> None:
        """Count a machine's runs from now on."""
        for cpu in traveller.machine.cpus:
            cpu.before_run = self._before_run

    def _before_run(self, cpu: Cpu) -> None:
        self.seen += 1
        if self.seen == self._number:
            self._moves.move(cpu.machine)


def _plain(seen: object) -> object:
    """Return what can be compared of something seen."""
    if isinstance(seen, Result):
        return (str(seen.op), seen.status.name, seen.values, str(seen.fault or ""))
    if isinstance(seen, list | tuple):
        return [_plain(item) for item in seen]
    return seen if isinstance(seen, int | bytes) else str(seen)
