"""The order in which a vCPU's parts are restored: those of known tools, and any other.

What must work is what `harness.migrate.orders.CONSTRAINTS` allow; of the rest it is noted which
order breaks what, on which kernel: the notes with `what` "order" are one row each.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from harness.errors import ScenarioFailure
from harness.facts import nested_svm, smm
from harness.migrate import orders
from harness.migrate.difference import state_differences
from harness.migrate.errors import Refused
from harness.migrate.notes import Note
from harness.migrate.state import MachineState, capture, msr_indices
from harness.migrate.transfer import load, save
from harness.proxy.apic import Apic
from harness.proxy.cpu import Cpu
from harness.proxy.guest_level import GuestLevel
from harness.proxy.machine import ProxyMachine
from harness.proxy.ops import Policy
from harness.proxy.program import UD, nop, rdmsr, read_dr, simple, store, write_dr
from harness.proxy.program import load as load_word
from harness.scenarios.case import scenario
from harness.scenarios.context import Context
from harness.scenarios.l2 import proxy_machine
from harness.scenarios.migration_stops import STOP_PORT, change_events, run_to_port
from harness.scenarios.twins import Log, Trip, expect_twins, move_in_process
from harness.svm.msrs import Msr
from kvm_ioctl.asm_kvm import kvm_vcpu_events

VECTOR: Final = 0x41
HANG_S: Final = 4.0
_MEMORY_MIB: Final = 8
_SHOWN: Final = 4
_LONGEST: Final = 300

Afterwards = Callable[[], object]
"""What a machine does after the stop; it may be done again by another in the same state."""


def _prepared_l2(machine: ProxyMachine) -> GuestLevel:
    Apic(machine.l1).enable()
    machine.l1.run([write_dr(0, 0x1000), write_dr(3, 0x3000)])
    l2 = machine.l1.launch(msrpm=[Msr.MSR_STAR])
    l2.set_policy(VECTOR, Policy.COUNT)
    l2.do(simple("UD2"))
    l2.set_policy(UD, Policy.COUNT)
    l2.instance.clear_vectors()
    return l2


def _in_l1(machine: ProxyMachine) -> Afterwards:
    l1 = machine.l1
    l1.run([write_dr(0, 0x1000), write_dr(3, 0x3000), simple("CLGI")])
    return lambda: [
        l1.run([read_dr(0), read_dr(3), rdmsr(Msr.MSR_VM_HSAVE_PA), simple("STGI"), nop()])
    ]


def _in_l1_with_svm(machine: ProxyMachine) -> Afterwards:
    machine.l1.enable_svm()
    return _in_l1(machine)


def _in_l2(machine: ProxyMachine) -> Afterwards:
    l2 = _prepared_l2(machine)
    machine.interrupt(VECTOR)
    return lambda: [
        l2.run([load_word(l2.scratch), simple("STI_NOP_CLI"), nop()]),
        l2.counted(VECTOR),
        # Not in L2: KVM would have to skip these, see `migrate_emulates`.
        machine.l1.run([read_dr(0), read_dr(3), rdmsr(Msr.MSR_LSTAR)]),
    ]


def _in_l2_with_an_exception(machine: ProxyMachine) -> Afterwards:
    def pending(events: kvm_vcpu_events) -> None:
        events.exception.pending, events.exception.nr = 1, UD
        events.nmi.masked = events.nmi.pending = 1

    l2 = _prepared_l2(machine)
    change_events(machine, pending)
    return lambda: [l2.run(nop()), l2.counted(UD), l2.counted(2)]


# sti; out %al, $STOP_PORT; nop; cli
_STI_OUT: Final = bytes((0xFB, 0xE6, STOP_PORT, 0x90, 0xFA))


def _in_l2_after_its_shadow(machine: ProxyMachine) -> Afterwards:
    l2 = _prepared_l2(machine)
    l2.instance.send([l2.exec_op(_STI_OUT), nop()])
    run_to_port(machine)
    machine.interrupt(VECTOR)
    return lambda: [l2.go_on(), l2.counted(VECTOR)]


def _in_smm_from_l2(machine: ProxyMachine) -> Afterwards:
    l2 = _prepared_l2(machine)
    handler = machine.inject_smi()
    handler.run(store(handler.scratch, 5))
    return lambda: [handler.run(load_word(handler.scratch)), handler.rsm().name, l2.run(nop())]


POINTS: Final[dict[str, Callable[[ProxyMachine], Afterwards]]] = {
    "l1": _in_l1_with_svm,
    "l2": _in_l2,
    "l2_shadow": _in_l2_after_its_shadow,
    "l2_exception": _in_l2_with_an_exception,
    "smm_from_l2": _in_smm_from_l2,
}


@scenario(
    needs=[nested_svm, smm], axes={"order": tuple(orders.NAMED), "point": tuple(POINTS)}, levels=2
)
def test_migrate_in_the_order_of_a_tool(context: Context, order: str, point: str) -> None:
    """A machine that is restored in the order of a known tool ends as its twin."""

    def journey(machine: ProxyMachine, log: Log) -> Trip:
        afterwards = POINTS[point](machine)
        yield
        log("afterwards", afterwards())

    mover = partial(move_in_process, order=orders.NAMED[order])
    expect_twins(context, journey, mover=mover, smm=True, irqchip=True)


@dataclass(frozen=True)
class _Tried:
    """What became of a machine that was restored in some order."""

    refused: str = ""
    differences: tuple[str, ...] = ()
    notes: tuple[Note, ...] = ()
    seen: str = ""

    def against(self, wanted: _Tried) -> str:
        """Return in words what is worse than with the other, or ""."""
        if self.refused or self.differences:
            return self.refused or "state: " + "; ".join(self.differences[:_SHOWN])
        if more := set(self.notes) - set(wanted.notes):
            return "not taken: " + "; ".join(map(str, more))
        return "" if self.seen == wanted.seen else f"goes on otherwise: {self.seen[:_LONGEST]}"


class _Trial:
    """A machine at a stop, from which it can be restored and go on any number of times."""

    def __init__(self, context: Context, point: str) -> None:
        self.machine = proxy_machine(
            context, memory_mib=_MEMORY_MIB, smm=True, irqchip=True, timeout_s=HANG_S
        )
        self._msrs = msr_indices(self.machine.kvm)
        self._afterwards = POINTS[point](self.machine)
        self._stream = io.BytesIO()
        with self.machine.paused():
            self._state = save(self.machine, self._stream).state
        self._python = _Bookmark(self.machine.cpus[0])
        self.unmoved = self._go_on()
        """What the machine itself saw as it went on."""

    def with_order(self, order: Sequence[str]) -> _Tried:
        """Restore the machine in an order and let it go on."""
        self._stream.seek(0)
        try:
            loaded = load(self.machine.kvm, self._stream, order=order)
        except Refused as e:
            return _Tried(refused=f"refused: {e}")
        self.machine.exchange(loaded.machine)
        loaded.machine.close()
        self._python.restore()
        differences = state_differences(self._state, self._now())
        return _Tried(
            differences=tuple(map(str, differences)), notes=tuple(loaded.notes), seen=self._go_on()
        )

    def _now(self) -> MachineState:
        with self.machine.paused():
            return capture(self.machine, self._msrs)

    def _go_on(self) -> str:
        try:
            return str(self._afterwards())
        except ScenarioFailure as e:
            return str(e).partition("\n")[0]


class _Bookmark:
    """What Python knows of where levels are."""

    def __init__(self, cpu: Cpu) -> None:
        self._cpu = cpu
        self._current = cpu.current
        self._levels = [(it, it.entered, it.instance.sent) for it in cpu.levels()]

    def restore(self) -> None:
        """Have Python know that again."""
        self._cpu.current = self._current
        for level, entered, sent in self._levels:
            level.entered, level.instance.sent = entered, sent
            if isinstance(level, GuestLevel):
                level.exit = None


@scenario(needs=[nested_svm, smm], axes={"point": tuple(POINTS)}, levels=2, timeout_s=600)
def test_migrate_with_every_part_in_any_place(context: Context, point: str) -> None:
    """The parts of a vCPU may be restored in any order that the known constraints allow."""
    trial = _Trial(context, point)
    wanted = trial.with_order(orders.DEFAULT)
    context.expect(f"the default order at {point}", wanted.against(wanted), "", str)
    if wanted.seen != trial.unmoved:
        # That is for `migrate_in_the_order_of_a_tool` to complain of.
        context.note("no order", point=point, result=wanted.seen[:_LONGEST])
        return
    for constraint, order in orders.breaking():
        worse = trial.with_order(order).against(wanted)
        _note(context, point, order, worse, against=str(constraint))
    broken = [it for it in orders.covering() if _is_broken(context, trial, wanted, point, it)]
    if broken:
        # Which part is it that must not be elsewhere?
        alone = [it for part in orders.DEFAULT[1:] for it in orders.moved(part)]
        broken += [
            it
            for it in alone
            if not orders.broken_by(it) and _is_broken(context, trial, wanted, point, it)
        ]
    said = "; ".join(" ".join(order) for order in broken)
    context.expect("orders that keep all constraints and fail", said, "", str)


def _is_broken(
    context: Context, trial: _Trial, wanted: _Tried, point: str, order: Sequence[str]
) -> bool:
    worse = trial.with_order(order).against(wanted)
    _note(context, point, order, worse)
    return bool(worse)


def _note(context: Context, point: str, order: Sequence[str], worse: str, **more: str) -> None:
    breaks = [str(constraint) for constraint in orders.broken_by(order)]
    context.note(
        "order", point=point, order=" ".join(order), breaks=breaks, result=worse or "same", **more
    )
