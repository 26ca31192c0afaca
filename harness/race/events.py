"""KVM's trace events of VMRUN, one for each that passes the checks."""

from __future__ import annotations

from typing import Final

from harness.errors import HarnessError, HostError
from harness.probe.interruption import Borrowed
from harness.probe.tracefs import TRACEFS, TraceInstance

_EVENTS: Final = {"kvm_nested_vmenter": "nested_rip", "kvm_nested_vmrun": "nrip"}
"""The event by the names that kernels give it (since 6.1; before), and its field for L2's RIP."""


class VmrunEvents(Borrowed):
    """Records the events of this process's vCPUs; a context manager.

    Raises HostError: no tracefs, or no permission to use it.
    """

    def __init__(self) -> None:
        self._trace = TraceInstance("race")
        self._field = ""

    def _borrow(self) -> None:
        self._trace.__enter__()
        name = self._event()
        self._field = _EVENTS[name]
        self._trace.enable(f"kvm/{name}")

    def _give_back(self) -> None:
        self._trace.__exit__(None, None, None)

    def take(self, count: int) -> list[int]:
        """Return L2's RIP of the events since the last call, in order.

        Raises HarnessError: there are not as many as there were VMRUNs.
        """
        rips = [int(event.fields[self._field], 16) for event in self._trace.take()]
        if len(rips) != count:
            raise HarnessError(f"{len(rips)} trace events of {count} VMRUNs")
        return rips

    @staticmethod
    def _event() -> str:
        for name in _EVENTS:
            if (TRACEFS / "events/kvm" / name).is_dir():
                return name
        raise HostError(f"{TRACEFS}/events/kvm: no event of VMRUN, {' or '.join(_EVENTS)}")
