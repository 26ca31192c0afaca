"""A cross-check inside a host: sequence after sequence, and what is made of a difference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Final, Protocol

from harness.crosscheck.bench import BareBench
from harness.crosscheck.checker import Checked, Difference, Machine, Model, check
from harness.crosscheck.coverage import Coverage, KnobsAsked
from harness.crosscheck.deviations import Deviation
from harness.crosscheck.explain import Turn, explained_by
from harness.crosscheck.hazards import NOT_DONE, STALE_ROOT
from harness.crosscheck.shrink import Budget, shrink
from harness.crosscheck.silicon import cpu_facts
from harness.errors import HarnessError
from harness.model.facts import CpuFacts
from harness.model.knobs import Knobs
from harness.model.model import Model as KvmModel
from harness.model.operations import Init, Operation
from kvm_ioctl.handles import Kvm

SHRINK_TRIES: Final = 300
SHRINK_S: Final = 40.0
_HANG_TRIES: Final = 25
"""Each of them takes a deadline of KVM_RUN."""


class OpenMachine(Machine, Protocol):
    """A machine with an end."""

    def close(self) -> None: ...  # noqa: D102


@dataclass(frozen=True)
class Finding:
    """A difference without a name, as small as it got."""

    operations: tuple[Operation, ...]
    difference: Difference
    explained_by: tuple[Turn, ...]
    checked: Checked
    reproducible: bool
    """The same sequence showed it again on a fresh machine."""


@dataclass
class Times:
    """Where the time went, in seconds."""

    model_s: float = 0.0
    kernel_s: float = 0.0
    """In ioctls on the machine's descriptors, the Python around each one included."""
    harness_s: float = 0.0
    """All else: machines made and closed, what is seen taken apart, comparing."""


@dataclass
class Campaign:
    """Makes models and machines, and runs sequences on pairs of them."""

    knobs: Knobs
    make_model: Callable[[Knobs], Model]
    make_machine: Callable[[Sequence[Operation]], OpenMachine]
    deviations: Sequence[Deviation] = ()
    coverage: Coverage = field(default_factory=Coverage)
    asked: set[str] = field(default_factory=set)
    """Knobs that decided something."""
    times: Times = field(default_factory=Times)
    hazards: Counter[str] = field(default_factory=Counter)
    """What was kept off, by the names of `hazards.HAZARDS`."""

    def run(self, operations: Sequence[Operation]) -> Checked:
        """Run one sequence on a fresh pair, and count what it covers."""
        started = perf_counter()
        # What asks for an attribute gets it; that is all that a model does with its knobs.
        asked: Any = KnobsAsked(self.knobs, self.asked)
        machine = self.make_machine(operations)
        try:
            self.coverage.begin()
            checked = check(
                operations,
                self.make_model(asked),
                machine,
                deviations=self.deviations,
                on_step=lambda step, operation, outcome: self.coverage.step(operation, outcome),
            )
        finally:
            machine.close()
        self._account(machine, checked, perf_counter() - started)
        self.hazards[STALE_ROOT] += getattr(machine, "cured", 0)
        self.hazards[NOT_DONE] += checked.not_done
        return checked

    def again(self, operations: Sequence[Operation]) -> Checked:
        """Run a sequence on a fresh pair, and count nothing."""
        machine = self.make_machine(operations)
        try:
            return check(
                operations, self.make_model(self.knobs), machine, deviations=self.deviations
            )
        finally:
            machine.close()

    def finding(self, operations: Sequence[Operation], checked: Checked) -> Finding:
        """Make a difference small and ask which knob explains it; `checked` has one."""
        if checked.difference is None:
            raise HarnessError("there is no difference to make small")
        first = checked.difference
        shown = tuple(operations[: first.step + 1])
        hang = "hang" in (first.seen, first.expected)
        tries = _HANG_TRIES if hang else SHRINK_TRIES

        def shows(candidate: Sequence[Operation]) -> bool:
            return self._shows(candidate, first)

        reproducible = shows(shown)
        if reproducible:
            shown = shrink(shown, shows, Budget(tries, SHRINK_S))
            checked = self.again(shown)
            reproducible = checked.difference is not None
        turns = self.explained_by(shown, checked)
        # One that comes and goes: the first time is what there is to tell.
        return Finding(shown, checked.difference or first, tuple(turns), checked, reproducible)

    def explained_by(self, operations: Sequence[Operation], checked: Checked) -> list[Turn]:
        """Return the knobs that, turned, make the model agree with what a machine answered."""
        return explained_by(
            operations, checked.outcomes, self.knobs, self.make_model, self.deviations
        )

    def _shows(self, operations: Sequence[Operation], wanted: Difference) -> bool:
        found = self.again(operations).difference
        return found is not None and found.kind == wanted.kind

    def _account(self, machine: OpenMachine, checked: Checked, whole_s: float) -> None:
        clock = getattr(machine, "clock", None)
        kernel_s = 0.0 if clock is None else clock.kernel_s
        self.times.model_s += checked.model_s
        self.times.kernel_s += kernel_s
        self.times.harness_s += whole_s - checked.model_s - kernel_s


def on_kvm(
    kvm: Kvm,
    knobs: Knobs,
    deviations: Sequence[Deviation],
    memory_probe: Callable[[], int] | None = None,
) -> Campaign:
    """Return a campaign on this host's KVM.

    Raises Unsupported: KVM offers guests no SVM.
    """
    return Campaign(
        knobs,
        model_maker(facts_here(kvm)),
        lambda operations: BareBench(
            kvm,
            memory_probe=memory_probe,
            hsave_page=knobs.l1_state == "hsave page",
            lapic=any(isinstance(each, Init) for each in operations),
        ),
        deviations,
    )


def facts_here(kvm: Kvm) -> CpuFacts:
    """Return the facts of a bench's vCPU on this host.

    Raises Unsupported: KVM offers guests no SVM.
    """
    with BareBench(kvm) as bench:
        return cpu_facts(bench.cpuid())


def model_maker(facts: CpuFacts) -> Callable[[Knobs], Model]:
    """Return what makes a model of a CPU."""
    return lambda knobs: KvmModel(knobs, facts)
