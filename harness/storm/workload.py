"""Work for the innermost of some nested levels: deterministic, endless, and able to be moved.

A step is a program of the innermost level. Between them the steps compute, write memory, fault, and
exit to the level outside for an instruction, an MSR and a missing nested page. What a step gave is
an entry of the transcript; two workloads of the same kind have the same transcript, wherever they
ran. Python's own part of it (`state`) is a step's number and whether one is under way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from harness.errors import NsvmError, ScenarioFailure
from harness.machine.vcpu import Kicked
from harness.proxy.cpu import Cpu
from harness.proxy.failure import GuestStopped
from harness.proxy.guest_level import GuestLevel
from harness.proxy.level import Level
from harness.proxy.machine import ProxyMachine
from harness.proxy.ops import Op, instruction
from harness.proxy.paging import PAGE, Pte
from harness.proxy.program import (
    Program,
    Result,
    atomic_add,
    copy,
    cpuid,
    fill,
    load,
    loop,
    rdmsr,
    simple,
    store,
)
from harness.proxy.vmexit import VmExit
from harness.svm.exit_codes import ExitCode
from harness.svm.msrs import Msr

MEMORY_MIB: Final = 16
TIMEOUT_S: Final = 60.0

_COUNTER, _BUFFER, _COPY, _MISSING, _UNMAPPED = (n * PAGE for n in range(5))
"""Pages of the level's scratch memory."""


class Cut(Exception):
    """A step was stopped where the machine can be moved; the next call goes on from there."""


class StateError(NsvmError):
    """A workload's state that is malformed; one line says why."""


@dataclass(frozen=True)
class Kind:
    """What a workload is like."""

    levels: int = 2
    npt: bool = True

    def to_json(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {"levels": self.levels, "npt": self.npt}


class Workload:
    """One machine's work, step by step."""

    def __init__(self, machine: ProxyMachine, kind: Kind) -> None:
        self.machine = machine
        self.kind = kind
        self.steps_done = 0
        self.transcript: list[str] = []
        """What the steps gave that ended here."""
        self._seen: list[str] = []
        """Exits of the step under way."""
        self._under_way = False

    @classmethod
    def begin(cls, machine: ProxyMachine, kind: Kind) -> Workload:
        """Launch the levels; no step has run."""
        workload = cls(machine, kind)
        level = workload.level
        if isinstance(level, GuestLevel):
            level.vmcb["intercept.cpuid"] = 1
            level.intercept_msr(Msr.MSR_LSTAR)
        level.tables.unmap(level.scratch + _UNMAPPED)
        level.ping()
        return workload

    @property
    def state(self) -> dict[str, Any]:
        """What must travel besides the machine and Python's knowledge of its levels."""
        return {
            **self.kind.to_json(),
            "steps_done": self.steps_done,
            "under_way": self._under_way,
            "seen": list(self._seen),
        }

    @classmethod
    def resume(cls, machine: ProxyMachine, state: Any) -> Workload:
        """Go on with what another workload's `state` says.

        Raises StateError: it is malformed.
        """
        try:
            workload = cls(machine, Kind(int(state["levels"]), bool(state["npt"])))
            workload.steps_done = int(state["steps_done"])
            workload._under_way = bool(state["under_way"])
            workload._seen = [str(seen) for seen in state["seen"]]
        except (KeyError, TypeError, ValueError) as e:
            raise StateError(f"workload: malformed state ({type(e).__name__}: {e})") from None
        return workload

    @property
    def level(self) -> Level:
        """The innermost level."""
        return self.machine.level(self.kind.levels, npt=self.kind.npt)

    def step(self) -> str:
        """Run one step, or the rest of one, to its end; return its entry of the transcript.

        Raises Cut: the vCPU was kicked, or `cut_after` said so; call again to go on.
        Raises ScenarioFailure: a guest did what it must not.
        """
        try:
            seen = self._go_on()
            while isinstance(seen, VmExit):
                self._answer(seen)
                seen = self._resume()
        except GuestStopped as e:
            if isinstance(e.event, Kicked):
                raise Cut from None
            raise
        entry = f"{self.steps_done}: {'; '.join([*self._seen, *map(_shown, seen)])}"
        self.steps_done += 1
        self._under_way = False
        self._seen = []
        self.transcript.append(entry)
        return entry

    def cut_after(self, runs: int) -> None:
        """Have the step that comes to so many runs of the vCPU raise Cut before the last one."""
        left = runs

        def count(cpu: Cpu) -> None:
            nonlocal left
            left -= 1
            if left <= 0:
                cpu.before_run = None
                raise Cut

        self.level.cpu.before_run = count

    def _go_on(self) -> list[Result] | VmExit:
        level = self.level
        if not self._under_way:
            self._under_way = True
            return level.start(self._program())
        if isinstance(level, GuestLevel) and level.exit is not None:
            return self._resume()
        return level.go_on()

    def _resume(self) -> list[Result] | VmExit:
        level = self.level
        if not isinstance(level, GuestLevel):
            raise ScenarioFailure(f"{level.name} exited, and has no host")
        return level.resume()

    def _program(self) -> Program:
        level = self.level
        make = _STEPS[self.steps_done % len(_STEPS)]
        if make is _touch_missing and isinstance(level, GuestLevel) and level.npt is not None:
            level.npt.protect(level.scratch + _MISSING, clear=Pte.P)
        return make(level, self.steps_done)

    def _answer(self, exit_: VmExit) -> None:
        """Do what the level outside is there for."""
        self._seen.append(f"{exit_.host.name} sees {exit_.name} {exit_.exit_info_1:#x}")
        level = exit_.guest
        if exit_.exit_code == ExitCode.SVM_EXIT_CPUID:
            exit_.vmcb["rax"] = self.steps_done
            exit_.skip(2)
        elif exit_.exit_code == ExitCode.SVM_EXIT_MSR:
            exit_.vmcb["rax"] = 0x1234_0000 + self.steps_done
            level.set_gprs(rdx=0)
            exit_.skip(2)
        elif exit_.exit_code == ExitCode.SVM_EXIT_NPF:
            level.nested_tables.protect(exit_.exit_info_2 & -PAGE, set_=Pte.P)
        else:
            raise ScenarioFailure(f"unexpected #VMEXIT of {exit_}")


def _shown(result: Result) -> str:
    if result.fault is not None:
        return f"{result.op.name} {result.fault}"
    if result.op.name == "CPUID":
        return f"CPUID {result.values[0]:#x}"
    return f"{result.op.name} {result.status.name}" + (
        f" {result.value:#x}" if result.ok and result.op.value else ""
    )


def _compute(level: Level, number: int) -> Sequence[Op]:
    return [*loop(50, [atomic_add(level.scratch + _COUNTER, number | 1)]), simple("NOP1")]


def _write(level: Level, number: int) -> Sequence[Op]:
    source, target = level.scratch + _BUFFER, level.scratch + _COPY
    return [fill(source, number & 0xFF, PAGE), copy(source, target, PAGE), load(target + 8)]


def _fault(level: Level, number: int) -> Sequence[Op]:
    # No UD2: KVM decodes the instruction of L2's #UD itself, and Linux 5.10 goes down over that
    # after a migration (nested-mmu-is-not-set-up-by-set-nested-state of the known issues).
    return [
        load(level.scratch + _UNMAPPED),
        store(level.scratch + _UNMAPPED, number),
        instruction("DIV")(rax=number, rcx=0, rdx=0),
    ]


def _exit_for_instruction(level: Level, number: int) -> Sequence[Op]:
    return [cpuid(0), atomic_add(level.scratch + _COUNTER, 1), cpuid(1)]


def _exit_for_msr(level: Level, number: int) -> Sequence[Op]:
    return [rdmsr(Msr.MSR_LSTAR), rdmsr(Msr.MSR_STAR), instruction("READ_CR4")()]


def _touch_missing(level: Level, number: int) -> Sequence[Op]:
    at = level.scratch + _MISSING
    return [atomic_add(at, 1), load(at)]


_STEPS: Final = (
    _compute,
    _exit_for_instruction,
    _write,
    _touch_missing,
    _fault,
    _exit_for_msr,
)
