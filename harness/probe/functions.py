"""Probe: function events on KVM's allocate and free functions and on the allocator below them.

Kprobes bracket `svm_allocate_nested` and `svm_free_nested`; between entry and return on the same
thread, each call of the page allocator is counted by its `order` argument and its result. Nothing
here depends on the allocator's trace points or on stack unwinding.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from harness.errors import HarnessError
from harness.machine.guest_abi import PAGE_SIZE
from harness.probe.interruption import Borrowed
from harness.probe.kprobes import Kprobes
from harness.probe.tracefs import TraceEvent, TraceInstance

#: The allocator's innermost common function, newest name first: (gfp, order, ...) -> page.
_ALLOC = ("__alloc_frozen_pages_noprof", "__alloc_pages_noprof", "__alloc_pages",
          "__alloc_pages_nodemask")  # fmt: skip
#: (page, order). `free_pages` takes an address and ends here too.
_FREE = ("___free_pages", "__free_pages")


@dataclass
class _Bracket:
    """What one thread is inside of."""

    function: str = ""
    order: int = 0


@dataclass
class FunctionProbe(Borrowed):
    """Counts pages that pass between KVM's allocate/free functions and the page allocator."""

    name: str = "functions"
    total: int = 0
    #: Calls of `svm_allocate_nested` that allocated, and of `svm_free_nested` that freed.
    allocations: int = 0
    frees: int = 0
    _trace: TraceInstance = field(default_factory=lambda: TraceInstance("functions"))
    _brackets: dict[int, _Bracket] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._events = Kprobes(self._trace)

    def _borrow(self) -> None:
        self._trace.__enter__()
        self._events.define("p", "enter_alloc", ("svm_allocate_nested",))
        self._events.define("r", "leave_alloc", ("svm_allocate_nested",))
        self._events.define("p", "enter_free", ("svm_free_nested",))
        self._events.define("r", "leave_free", ("svm_free_nested",))
        allocator = self._events.define("p", "page_alloc", _ALLOC, "order=%si:u32")
        self._events.define("r", "page_alloced", (allocator,), "page=$retval:x64")
        self._events.define("p", "page_free", _FREE, "order=%si:u32")
        self._events.enable()

    def _give_back(self) -> None:
        self._trace.__exit__(None, None, None)
        self._events.remove()

    def _account(self, event: TraceEvent) -> None:
        bracket = self._brackets.setdefault(event.tid, _Bracket())
        if event.name.startswith("enter_"):
            bracket.function = event.name[6:]
        elif event.name.startswith("leave_"):
            bracket.function = ""
        elif event.name == "page_alloc":
            bracket.order = int(event.fields["order"])
        elif event.name == "page_alloced" and bracket.function == "alloc":
            if int(event.fields["page"], 0):
                self.total += PAGE_SIZE << bracket.order
                self.allocations += 1
        elif event.name == "page_free" and bracket.function:
            # svm_allocate_nested too frees: what it got, when it cannot get the rest.
            self.total -= PAGE_SIZE << int(event.fields["order"])
            self.frees += 1

    def read_bytes(self) -> int:
        """Return the bytes allocated less those freed within the two functions since arming."""
        for event in self._trace.take():
            self._account(event)
        for tid, bracket in self._brackets.items():
            if bracket.function:
                raise HarnessError(f"thread {tid} entered {bracket.function} and did not return")
        return self.total

    def resolution_bytes(self) -> int:
        """Return 0: every call is seen."""
        return 0
