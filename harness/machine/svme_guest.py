"""Drives guest `svme`: walks its vCPUs from stage to stage and reads their reports."""

from __future__ import annotations

from harness.machine.addresses import Gpa
from harness.machine.console import PortOut
from harness.machine.guest_abi import (
    STAGE_PORT,
    Command,
    Option,
    Stage,
    cpu_area,
    cpu_area_gpa,
    report,
)
from harness.machine.machine import Machine
from harness.machine.vcpu import Event, UnexpectedStop

_FINAL = (Stage.FAULT, Stage.NO_SVM, Stage.DONE)
"""Stages that `advance` does not pass over on its way to another one."""


class SvmeGuest:
    """The guest `svme` in a machine; vCPUs are named by index."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def advance(self, index: int, *, to: Stage, timeout_s: float = 10.0) -> report:
        """Run a vCPU until it reports a stage, over any stages before it; return its report.

        Stages passed on the way are left with Command.CONTINUE. The time is for each of them.

        Raises UnexpectedStop: it ended, faulted or stopped for another reason.
        Raises VcpuTimeout: it did not stop in time.
        """
        while True:
            stage = self.next_stage(index, timeout_s=timeout_s)
            if stage is to:
                return self.report(index)
            if stage in _FINAL:
                text = f"stage {to.name} (its report: {self.report(index)})"
                raise UnexpectedStop(index, text, PortOut(STAGE_PORT, 1, stage))

    def next_stage(self, index: int, *, timeout_s: float = 10.0) -> Stage:
        """Run a vCPU until its next stage and return that.

        Raises UnexpectedStop: it stopped for another reason.
        Raises VcpuTimeout: it did not stop in time.
        """
        event = self.machine.vcpus[index].run(timeout_s)
        stage = stage_of(event)
        if stage is None:
            raise UnexpectedStop(index, "a stage", event)
        return stage

    def command(self, index: int, command: Command) -> None:
        """Say what a vCPU shall do when it goes on from its stage."""
        gpa = Gpa(cpu_area_gpa(index) + report.command.offset)
        self.machine.memory.write_int(gpa, 4, command)

    def set_options(self, index: int, options: Option) -> None:
        """Set a vCPU's options; to be done before it first runs L2."""
        gpa = Gpa(cpu_area_gpa(index) + report.options.offset)
        self.machine.memory.write_int(gpa, 4, options)

    def report(self, index: int) -> report:
        """Return a copy of a vCPU's report as it is now."""
        return self.machine.memory.read_struct(report, Gpa(cpu_area_gpa(index)))

    def vmcb12_gpa(self, index: int) -> Gpa:
        """Return the address of a vCPU's vmcb12."""
        return Gpa(cpu_area_gpa(index) + cpu_area.vmcb12.offset)

    def hsave_gpa(self, index: int) -> Gpa:
        """Return the address of a vCPU's host save area (VM_HSAVE_PA)."""
        return Gpa(cpu_area_gpa(index) + cpu_area.hsave.offset)


def stage_of(event: Event) -> Stage | None:
    """Return the stage that an event reports, or None if it is another event."""
    if isinstance(event, PortOut) and event.port == STAGE_PORT:
        try:
            return Stage(event.value)
        except ValueError:
            return None
    return None
