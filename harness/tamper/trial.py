"""One cell on a VM of its own, beside the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from harness.crosscheck.bench import BareBench
from harness.crosscheck.checker import (
    NOT_DONE,
    UNKNOWN,
    Machine,
    differing,
    is_end,
    operation_kind,
    shown,
)
from harness.crosscheck.deviations import Deviation, applicable, recognise
from harness.crosscheck.notation import in_words
from harness.model.facts import CpuFacts
from harness.model.knobs import Knobs
from harness.model.model import Model
from harness.model.operations import Operation, Outcome
from harness.svm.msrs import Cr0
from harness.tamper.cells import AFTER_L1, AFTER_L2, Cell
from harness.tamper.quirks import quirks_of
from harness.tamper.rows import LOADED, NOT_PREDICTED, STATE, Row, Signature, Step, signature
from kvm_ioctl.handles import Kvm

_MOST_DIFFERENCES: Final = 12
_REPORT: Final = "report"
_TOLD: Final = (*STATE, "smm", "rax", "vmcb_a.control.exit_code")
"""Told of every step, with what RSM has loaded."""


@dataclass(frozen=True)
class Trial:
    """What cells are tried on, and what they are compared with."""

    kvm: Kvm
    knobs: Knobs
    facts: CpuFacts
    emulated: bool = False
    """The CPU is QEMU's: its named deviations count for none."""
    complaints: Callable[[], Sequence[str]] = tuple
    """Gives what the kernel has complained of since it was last asked."""

    def row(self, cell: Cell) -> Row:
        """Run a cell in a VM of its own; return what came of it.

        Raises Unsupported: KVM offers guests no SVM.
        """
        self.complaints()
        with BareBench(self.kvm, cure=False) as bench:
            known = (*applicable(self.emulated), *quirks_of(cell, self.emulated))
            row = beside(cell, bench, Model(self.knobs, self.facts), known)
        log = self.complaints()
        return replace(row, log=tuple(log)) if log else row


def beside(cell: Cell, machine: Machine, model: Model, deviations: Sequence[Deviation] = ()) -> Row:
    """Return what a cell comes to on a fresh machine, compared with a fresh model."""
    going = _Going(machine, model, deviations)
    going.run(cell)
    return going.row(cell)


def predicted(cell: Cell, knobs: Knobs, facts: CpuFacts) -> Signature:
    """Return what the model says of a cell, without a machine."""
    going = _Going(None, Model(knobs, facts), ())
    going.run(cell)
    return signature(going.predicted, going.steps)


@dataclass
class _Going:
    """A cell on its way: the same operations on the bench and on the model."""

    bench: Machine | None
    """None: the model goes by itself."""
    model: Model
    deviations: Sequence[Deviation]
    steps: list[Step] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    known: list[str] = field(default_factory=list)
    outcome: str = ""
    predicted: str = ""
    _knows: bool = True
    _last: Outcome = field(default_factory=lambda: Outcome(""))
    _said: Outcome = field(default_factory=lambda: Outcome(""))
    _excused: set[str] = field(default_factory=set)

    def run(self, cell: Cell) -> None:
        """Do all of it; a shutdown, an error or a hang ends it."""
        for operation in cell.into_smm():
            if not self._do(operation):
                self.outcome, self.predicted = self._ended(), self._said_ended()
                return
        for operation in (*cell.tampering, *cell.rsm()):
            if not self._do(operation):
                break
        self.outcome, self.predicted = self._where(self._last), self._where_said()
        self._go_on()

    def _go_on(self) -> None:
        """Leave L2 by #VMEXIT, and execute one instruction in L1."""
        if self._last.result == _REPORT and self._last.seen.get("guest_mode"):
            self._do(AFTER_L2)
        if self._last.result == _REPORT and not self._last.seen.get("guest_mode"):
            self._do(AFTER_L1)

    def _do(self, operation: Operation) -> bool:
        """Do one operation on both; return whether there is a next one."""
        said = self._predict(operation)
        self._said = said
        self._last = said if self.bench is None else self.bench.apply(operation)
        if self.bench is not None and said.result != NOT_PREDICTED:
            self._compare(operation, said)
        told = {n: v for n, v in self._last.seen.items() if n in _TOLD or n.startswith(LOADED)}
        self.steps.append(Step(in_words(operation), self._last.result, said.result, told))
        return not is_end(self._last.result) and self._last.result not in _NO_MORE

    def _predict(self, operation: Operation) -> Outcome:
        if self._knows and not self.model.over:
            said = self.model.apply(operation)
            if said.result != UNKNOWN:
                return said
        self._knows = False
        return Outcome(NOT_PREDICTED)

    def _compare(self, operation: Operation, said: Outcome) -> None:
        for name, expected, seen in differing(said, self._last):
            if name in self._excused or len(self.differences) >= _MOST_DIFFERENCES:
                continue
            # Once is enough: what is wrong mostly stays so.
            self._excused.add(name)
            kind = (operation_kind(operation), name)
            deviation = recognise(
                self.deviations, kind, expected, seen, self._last.result, said.seen
            )
            if deviation is not None:
                self.known.append(deviation.id)
                continue
            self.differences.append(
                f"{in_words(operation)}: {name}: the model says {shown(expected)},"
                f" the machine {shown(seen)}"
            )
        if said.result != self._last.result:
            # They are at different places now.
            self._knows = False

    def _ended(self) -> str:
        return f"before RSM: {self._last.result}"

    def _said_ended(self) -> str:
        return f"before RSM: {self._said.result}"

    def _where_said(self) -> str:
        if self._said.result == NOT_PREDICTED:
            return NOT_PREDICTED
        return self._where(self._said)

    @staticmethod
    def _where(last: Outcome) -> str:
        """Return where the vCPU is, and how the KVM_RUN after RSM ended if not by a report."""
        if last.result in _NO_MORE or is_end(last.result):
            return last.result
        where = "L2" if last.seen.get("guest_mode") else "L1"
        cr0 = last.seen.get("cr0")
        if isinstance(cr0, int) and not Cr0(cr0).PE:
            where += " in real mode"
        return where if last.result == _REPORT else f"{where}: {last.result}"

    def row(self, cell: Cell) -> Row:
        """Return what came of it."""
        return Row(
            cell.name,
            cell.group,
            self.outcome,
            self.predicted,
            tuple(self.differences),
            tuple(self.known),
            steps=tuple(self.steps),
        )


_NO_MORE: Final = ("internal error", "fail entry", NOT_DONE)
