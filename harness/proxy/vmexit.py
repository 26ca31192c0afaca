"""An exit of a guest that its host was given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from harness.proxy.failure import ProxyFailure
from harness.proxy.layout import proxy_gprs
from harness.proxy.program import Result
from harness.proxy.vmcb_view import VmcbView
from harness.svm.exit_codes import ExitCode, describe
from harness.svm.vmcb import EventInj

if TYPE_CHECKING:
    from harness.proxy.guest_level import GuestLevel
    from harness.proxy.level import Level

INSTRUCTION_LENGTHS: Final = {
    ExitCode.SVM_EXIT_RDTSC: 2,
    ExitCode.SVM_EXIT_RDPMC: 2,
    ExitCode.SVM_EXIT_PUSHF: 1,
    ExitCode.SVM_EXIT_POPF: 1,
    ExitCode.SVM_EXIT_CPUID: 2,
    ExitCode.SVM_EXIT_RSM: 2,
    ExitCode.SVM_EXIT_SWINT: 2,
    ExitCode.SVM_EXIT_INVD: 2,
    ExitCode.SVM_EXIT_PAUSE: 2,
    ExitCode.SVM_EXIT_HLT: 1,
    ExitCode.SVM_EXIT_INVLPG: 3,
    ExitCode.SVM_EXIT_INVLPGA: 3,
    ExitCode.SVM_EXIT_MSR: 2,
    ExitCode.SVM_EXIT_VMRUN: 3,
    ExitCode.SVM_EXIT_VMMCALL: 3,
    ExitCode.SVM_EXIT_VMLOAD: 3,
    ExitCode.SVM_EXIT_VMSAVE: 3,
    ExitCode.SVM_EXIT_STGI: 3,
    ExitCode.SVM_EXIT_CLGI: 3,
    ExitCode.SVM_EXIT_SKINIT: 3,
    ExitCode.SVM_EXIT_RDTSCP: 3,
    ExitCode.SVM_EXIT_ICEBP: 1,
    ExitCode.SVM_EXIT_WBINVD: 2,
    ExitCode.SVM_EXIT_MONITOR: 3,
    ExitCode.SVM_EXIT_MWAIT: 3,
    ExitCode.SVM_EXIT_XSETBV: 3,
    ExitCode.SVM_EXIT_RDPRU: 3,
}
"""Bytes of the instruction that exits so, without prefixes, where there is only one length."""


@dataclass(frozen=True)
class VmExit:
    """#VMEXIT: what `host` found in the VMCB after its VMRUN."""

    host: Level
    guest: GuestLevel
    """The level that `host` runs; one further inside may have caused the exit."""
    vmcb: VmcbView
    """The whole VMCB, as it is in memory now; to be read and changed."""
    exit_code: int
    exit_info_1: int
    exit_info_2: int
    exit_int_info: EventInj

    @classmethod
    def of(cls, host: Level, guest: GuestLevel, result: Result) -> VmExit:
        """Return the exit behind a finished ENTER_GUEST.

        Raises GuestFault: VMRUN raised an exception.
        """
        result.regs  # noqa: B018 - raises GuestFault
        vmcb = VmcbView(host.cpu.machine.memory, guest.entered_vmcb)
        return cls(
            host,
            guest,
            vmcb,
            vmcb["exit_code"],
            vmcb["exit_info_1"],
            vmcb["exit_info_2"],
            EventInj(vmcb["control.exit_int_info"]),
        )

    @property
    def name(self) -> str:
        """The kernel's name of the exit code."""
        return describe(self.exit_code)

    @property
    def gprs(self) -> proxy_gprs:
        """The guest's registers but RAX and RSP, which the VMCB has; a copy."""
        return self.guest.gprs

    def skip(self, length: int | None = None) -> None:
        """Move the guest's RIP past the instruction that exited.

        Args:
            length: its bytes; by default next_rip if the CPU gives one, exit_info_2 of a port
                access, or the instruction's length where there is only one.

        Raises ProxyFailure: the length is not known.

        """
        if length is not None:
            self.vmcb["rip"] += length
        elif self.vmcb["next_rip"]:
            self.vmcb["rip"] = self.vmcb["next_rip"]
        elif self.exit_code == ExitCode.SVM_EXIT_IOIO:
            self.vmcb["rip"] = self.exit_info_2
        elif self.exit_code in ExitCode._value2member_map_ and (
            (known := INSTRUCTION_LENGTHS.get(ExitCode(self.exit_code))) is not None
        ):
            self.vmcb["rip"] += known
        else:
            raise ProxyFailure(f"{self}: how long is the instruction?")

    def __str__(self) -> str:
        return (
            f"{self.guest.name} to {self.host.name}: {self.name}, "
            f"exit_info_1={self.exit_info_1:#x}, exit_info_2={self.exit_info_2:#x}, "
            f"rip={self.vmcb['rip']:#x}"
        )


class UnexpectedVmExit(ProxyFailure):
    """A guest exited where it was to finish its program."""

    def __init__(self, exit_: VmExit) -> None:
        super().__init__(f"unexpected #VMEXIT of {exit_}\n{exit_.vmcb.summary()}")
        self.exit = exit_


class MissingVmExit(ProxyFailure):
    """A guest finished its program where it was to exit."""

    def __init__(self, guest: str, results: list[Result]) -> None:
        shown = ", ".join(map(str, results[-4:]))
        super().__init__(f"{guest} did not exit, it finished its program: {shown}")
        self.results = results
