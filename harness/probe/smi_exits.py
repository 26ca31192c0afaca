"""Probe: #VMEXITs with which KVM tells L1 that an SMI came while its guest ran.

Of a hypervisor that intercepts SMIs, as KVM does itself (INTERCEPT_SMI in init_vmcb), an SMI ends
the guest's run (nested_svm_check_events), and is taken in L1 then.
"""

from __future__ import annotations

from typing import Final

from harness.probe.interruption import Borrowed
from harness.probe.tracefs import TraceInstance, write
from harness.svm.exit_codes import ExitCode

_EVENT: Final = "kvm/kvm_nested_vmexit_inject"
_BUFFER_KIB: Final = 256


class SmiExits(Borrowed):
    """Counts them, of all VMs of the machine, while armed."""

    def __init__(self) -> None:
        self._trace = TraceInstance("smi", buffer_kib=_BUFFER_KIB, all_tasks=True)

    def _borrow(self) -> None:
        self._trace.__enter__()
        of_smis = f"exit_code == {int(ExitCode.SVM_EXIT_SMI)}"
        write(self._trace.path / "events" / _EVENT / "filter", of_smis)
        self._trace.enable(_EVENT)

    def _give_back(self) -> None:
        self._trace.__exit__(None, None, None)

    def count(self) -> int:
        """Return how many there were since the last call."""
        return len(self._trace.take())
