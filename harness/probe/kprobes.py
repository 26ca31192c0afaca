"""Function events: probes on the entry and return of kernel functions, recorded by one instance.

Documentation/trace/kprobetrace.rst.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from harness.errors import HostError
from harness.probe.tracefs import TRACEFS, TraceInstance, write


class Kprobes:
    """The function events that belong to one trace instance."""

    def __init__(self, trace: TraceInstance, label: str = "") -> None:
        """Prepare; `label` tells them from others of this process."""
        self._trace = trace
        self._group = f"nsvm{label}_{os.getpid()}"
        self._defined: list[str] = []

    def define(self, kind: str, name: str, functions: Sequence[str], fields: str = "") -> str:
        """Define an event on the first of `functions` that this kernel has; return which.

        Trying costs less than looking a name up in /proc/kallsyms.

        Args:
            kind: p for entry, r for return.
            name: of the event.
            functions: names that it has had, newest first.
            fields: to record, as kprobe_events takes them.

        Raises HostError: this kernel has none of them, or no such events at all.

        """
        control = TRACEFS / "kprobe_events"
        if not control.exists():
            raise HostError("this kernel has no kprobe events (CONFIG_KPROBE_EVENTS)")
        refusals = []
        for function in functions:
            definition = f"{kind}:{self._group}/{name} {function} {fields}".rstrip()
            try:
                write(control, definition + "\n", append=True)
            except HostError as e:
                refusals.append(str(e))
                continue
            self._defined.append(f"{self._group}/{name}")
            return function
        raise HostError(f"no function event on {' or '.join(functions)}: {refusals[-1]}")

    def enable(self) -> None:
        """Start recording all of them."""
        for event in self._defined:
            self._trace.enable(event)

    def remove(self) -> None:
        """Remove them; the instance must be gone first: an enabled one cannot be removed."""
        while self._defined:
            write(TRACEFS / "kprobe_events", f"-:{self._defined.pop(0)}\n", append=True)
