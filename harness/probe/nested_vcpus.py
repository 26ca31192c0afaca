"""Probe: which vCPUs have nested state at the moment, by KVM's own calls.

Unlike the probes that count pages it does not look at the page allocator, which a busy host calls
all the time; so it may stay armed for as long as a guest lives.
"""

from __future__ import annotations

from typing import Final

from harness.model.allocation import NESTED_BLOCKS, Policy
from harness.probe.interruption import Borrowed
from harness.probe.kprobes import Kprobes
from harness.probe.tracefs import TraceEvent, TraceInstance

_BUFFER_KIB: Final = 64

BYTES_PER_VCPU: Final = sum(block.size_bytes for block in NESTED_BLOCKS[Policy.ON_DEMAND])
"""As the model has it, and the other probes find it."""


class NestedVcpus(Borrowed):
    """Knows the vCPUs of this process, and of its later children, that have nested state."""

    def __init__(self) -> None:
        self._trace = TraceInstance("nested", buffer_kib=_BUFFER_KIB)
        self._events = Kprobes(self._trace, "nested")
        self._having: set[str] = set()

    def _borrow(self) -> None:
        self._trace.__enter__()
        # Both are called for vCPUs that have it, or have none, already.
        for name in ("allocate", "free"):
            self._events.define("p", name, (f"svm_{name}_nested",), "svm=%di:x64")
        self._events.enable()

    def _give_back(self) -> None:
        self._trace.__exit__(None, None, None)
        self._events.remove()

    def count(self) -> int:
        """Return how many vCPUs have nested state."""
        for event in self._trace.take():
            self._account(event)
        return len(self._having)

    def _account(self, event: TraceEvent) -> None:
        vcpu = event.fields["svm"]
        if event.name == "allocate":
            self._having.add(vcpu)
        else:
            self._having.discard(vcpu)
