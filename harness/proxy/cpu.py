"""One vCPU and the levels on it: runs it from report to report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from harness.machine.console import PortOut
from harness.machine.errors import MachineError
from harness.machine.hang import VcpuTimeout
from harness.machine.vcpu import Event, MachineVcpu
from harness.proxy.failure import ProxyFailure, crashed, describe, stopped
from harness.proxy.guest_level import GuestLevel
from harness.proxy.layout import INSTANCE_SIZE, PROXY_PORT, Report
from harness.proxy.level import Level
from harness.proxy.ops import EnterFlag
from harness.proxy.smm import SMI_COMMAND_PORT, SmmLevel
from harness.proxy.vmexit import VmExit

if TYPE_CHECKING:
    from harness.proxy.machine import ProxyMachine


class Cpu:
    """A vCPU's levels, and which of them is current."""

    def __init__(self, machine: ProxyMachine, runner: MachineVcpu) -> None:
        self.machine = machine
        self.runner = runner
        self.current: Level | None = None
        """The level that spoke last; it stands at its report and has nothing to do."""
        self.before_run: Callable[[Cpu], None] | None = None
        """Called before every run of the vCPU, when it stands between two; to move the machine."""
        self.answers_smi_port = machine.smm_wired
        """Whether a write to SMI_COMMAND_PORT raises an SMI."""
        self.port_writes: list[PortOut] = []
        """Writes to ports that nobody owns, in order."""
        self._levels: dict[int, Level] = {}
        self._smm: SmmLevel | None = None
        self.l1 = Level(self, None, machine.page_tables())
        if machine.smm_wired:
            self._smm = SmmLevel(self)

    @property
    def smm(self) -> SmmLevel:
        """The SMI handler.

        Raises MachineError: the machine was made without SMM.
        """
        if self._smm is None:
            raise MachineError("this machine has no SMM: make it with smm=True")
        return self._smm

    @property
    def current_name(self) -> str:
        """The current level's name."""
        return self.current.name if self.current else "L1 (not started)"

    def register(self, level: Level) -> None:
        """Take a new level's reports."""
        self._levels[level.instance.gpa] = level

    def make_guest(
        self, host: Level, *, npt: bool, name: str | None, enter_flags: EnterFlag
    ) -> GuestLevel:
        """Make a level in a VMCB of a host; `Level.launch` is the way to ask for one."""
        return GuestLevel(host, npt=npt, name=name, enter_flags=enter_flags)

    def levels(self) -> Iterator[Level]:
        """Yield all levels, outermost first."""
        yield from self._levels.values()

    def inject_smi(self) -> SmmLevel:
        """Send an SMI and run until the handler is entered."""
        smm = self.smm
        smm.interrupted = self.current
        self.runner.vcpu.smi()
        level, _ = self.wait_report(self.machine.timeout_s)
        while level is not smm:
            # Entered only once the interrupted level may take it.
            level, _ = self.wait_report(self.machine.timeout_s)
        return smm

    def advance(self, timeout_s: float) -> Level | VmExit:
        """Run until a level is done, or until an exit that its host did not handle by itself.

        Raises ProxyFailure: a level crashed or reported nonsense.
        Raises VcpuTimeout: nothing was reported in time.
        """
        while True:
            level, report = self.wait_report(timeout_s)
            if isinstance(level, SmmLevel) and report is Report.START:
                level.answer()
                continue
            guest = level.entered
            if guest is None or report is not Report.DONE:
                return level
            level.entered = None
            exit_ = VmExit.of(level, guest, level.instance.results()[0])
            if guest.leaving(exit_) or not guest.handled(exit_):
                return exit_
            level.submit_entry(guest)

    def wait_report(self, timeout_s: float) -> tuple[Level, Report]:
        """Run until a level reports; it is the current one then.

        Raises ProxyFailure: a level crashed or reported nonsense.
        Raises GuestStopped: KVM_RUN came back with something else.
        """
        while True:
            event = self._run(timeout_s)
            if isinstance(event, PortOut) and event.port == PROXY_PORT:
                return self._decode(event.value)
            if isinstance(event, PortOut):
                self.port_writes.append(event)
                if event.port == SMI_COMMAND_PORT and self.answers_smi_port:
                    self.smm.interrupted = self.current
                    self.runner.vcpu.smi()
                continue
            raise stopped(self, event)

    def _run(self, timeout_s: float) -> Event:
        self.machine.drop_stale_shadows()
        if self.before_run is not None:
            self.before_run(self)
        try:
            return self.runner.run(timeout_s)
        except VcpuTimeout as e:
            raise ProxyTimeout(f"{e}\n{describe(self)}") from e

    def _decode(self, value: int) -> tuple[Level, Report]:
        gpa, report = value & -INSTANCE_SIZE, value % INSTANCE_SIZE
        level = self._levels.get(gpa)
        if level is None or report not in Report._value2member_map_:
            raise ProxyFailure(
                f"vCPU {self.runner.index}: a report {value:#x} of no level\n{describe(self)}"
            )
        self.current = level
        level.started = True
        if report == Report.CRASH:
            raise crashed(self)
        return level, Report(report)


class ProxyTimeout(ProxyFailure):
    """Nothing was reported in time."""
