"""vCPUs that run at the same time, one thread each."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from harness.machine.errors import MachineError
from harness.machine.hang import VcpuStuck
from harness.machine.vcpu import MachineVcpu
from harness.machine.watchdog import GRACE_S

T = TypeVar("T")

_POLL_S = 0.05


class VcpuThread(Generic[T]):
    """Runs a function with a vCPU in a thread of its own: `VcpuThread(v, lambda v: v.run(5))`."""

    def __init__(self, vcpu: MachineVcpu, body: Callable[[MachineVcpu], T]) -> None:
        self.vcpu = vcpu
        self._body = body
        self._result: list[T] = []
        self._error: BaseException | None = None
        # A daemon: a thread that is stuck in the kernel must not keep the interpreter up.
        self._thread = threading.Thread(target=self._work, name=f"vcpu{vcpu.index}", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether the body has not ended yet."""
        return self._thread.is_alive()

    def join(self, timeout_s: float) -> T:
        """Wait for the body and return its result, or raise what it raised.

        Raises VcpuStuck: the thread cannot be got out of KVM_RUN. Nothing but the end of the
            process frees the vCPU then; do not close the machine, that would wait as well.
        Raises MachineError: the body had no deadline of its own and was stopped after `timeout_s`.
        """
        if not self._wait(timeout_s):
            self.vcpu.kick()
            if not self._wait(2 * GRACE_S):
                raise VcpuStuck(f"vCPU {self.vcpu.index}: its thread does not end")
            raise MachineError(f"vCPU {self.vcpu.index}: stopped after {timeout_s:g} s")
        if self._error is not None:
            raise self._error
        return self._result[0]

    def stop(self, timeout_s: float) -> T:
        """Kick the vCPU (its run returns `Kicked`) and `join`."""
        deadline = time.monotonic() + timeout_s
        # Again and again: the body may be between two runs, where a kick finds nothing.
        while self.running and time.monotonic() < deadline:
            self.vcpu.kick()
            self._thread.join(_POLL_S)
        return self.join(0)

    def _wait(self, timeout_s: float) -> bool:
        """Wait for the thread's end; True if it ended.

        Raises VcpuStuck: the watchdog has given it up.
        """
        deadline = time.monotonic() + timeout_s
        while self._thread.is_alive() and time.monotonic() < deadline:
            self._thread.join(_POLL_S)
            if self.vcpu.stuck:
                raise VcpuStuck(f"vCPU {self.vcpu.index}: KVM_RUN ignores signals")
        return not self._thread.is_alive()

    def _work(self) -> None:
        self.vcpu.supervised = True
        try:
            self._result.append(self._body(self.vcpu))
        except BaseException as e:  # handed to whoever joins
            self._error = e
        finally:
            self.vcpu.supervised = False
