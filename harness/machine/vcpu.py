"""One vCPU of a machine: runs until something happens that the caller should know of."""

from __future__ import annotations

import os
import sys
from collections import deque
from dataclasses import dataclass

from harness.errors import ScenarioFailure
from harness.machine.console import GuestExit, PortBus, PortOut
from harness.machine.guest_abi import STAGE_PORT, Stage
from harness.machine.hang import VcpuTimeout, describe_hang
from harness.machine.memory import GuestMemory
from harness.machine.watchdog import WATCHDOG
from kvm_ioctl.exits import Exit, Interrupted, IoExit
from kvm_ioctl.handles import Vcpu, Vm

STUCK_STATUS = 70
"""Exit status of a process that is ended because a thread cannot be got out of KVM_RUN."""

_KEPT_EXITS = 8


@dataclass(frozen=True)
class Kicked:
    """The run was stopped from another thread by `MachineVcpu.kick`."""


Event = GuestExit | PortOut | Kicked | Exit
"""Why a run came back: an event of the machine, or an exit as KVM gave it."""


class UnexpectedStop(ScenarioFailure):
    """A vCPU stopped for another reason than the one that was waited for."""

    def __init__(self, index: int, waited_for: str, event: Event) -> None:
        super().__init__(f"vCPU {index}: waited for {waited_for}, got {event_text(event)}")
        self.event = event


def event_text(event: Event) -> str:
    """Return an event in words; port writes of stages by name."""
    if isinstance(event, PortOut) and event.port == STAGE_PORT:
        known = event.value in Stage._value2member_map_
        return f"stage {Stage(event.value).name if known else event.value}"
    return str(event)


class MachineVcpu:
    """Runs one vCPU in the calling thread, answers its console, watches its time."""

    def __init__(self, index: int, vcpu: Vcpu, vm: Vm, memory: GuestMemory, bus: PortBus) -> None:
        self.index = index
        self.vcpu = vcpu
        """The KVM handle, for any ioctl."""
        self.supervised = False
        """Another thread waits for this one and deals with it if it gets stuck."""
        self.stuck = False
        """Signals did not get the running thread out of KVM_RUN."""
        self._vm = vm
        self._memory = memory
        self._bus = bus
        self._events: deque[Event] = deque()
        self._last_exits: deque[Exit] = deque(maxlen=_KEPT_EXITS)
        self._watch = WATCHDOG.watch(self._on_stuck)
        self._kicked = False

    def step(self, timeout_s: float = 10.0) -> Exit | Kicked:
        """Issue KVM_RUN once and return its exit; console I/O is not answered.

        Raises VcpuTimeout: it was still running after `timeout_s` seconds.
        Raises KvmError: KVM_RUN failed.
        """
        try:
            self._arm(timeout_s)
            return self._enter(timeout_s)
        finally:
            WATCHDOG.disarm(self._watch)

    def run(self, timeout_s: float = 10.0) -> Event:
        """Run until there is an event that no device of the machine takes care of.

        Raises VcpuTimeout: there was none within `timeout_s` seconds.
        Raises KvmError: KVM_RUN failed.
        """
        events = self._events
        if events:
            return events.popleft()
        try:
            self._arm(timeout_s)
            while not events:
                exit_ = self._enter(timeout_s)
                if isinstance(exit_, IoExit):
                    self._handle_io(exit_)
                else:
                    events.append(exit_)
            return events.popleft()
        finally:
            WATCHDOG.disarm(self._watch)

    def run_until(self, stage: Stage, timeout_s: float = 10.0) -> None:
        """Run until the guest reports exactly this stage next.

        Raises UnexpectedStop: it reported another stage, or stopped for another reason.
        Raises VcpuTimeout: it did not stop within `timeout_s` seconds.
        """
        event = self.run(timeout_s)
        if not (isinstance(event, PortOut) and (event.port, event.value) == (STAGE_PORT, stage)):
            raise UnexpectedStop(self.index, f"stage {stage.name}", event)

    def run_until_exit(self, timeout_s: float = 10.0) -> GuestExit:
        """Run until the guest ends the machine.

        Raises UnexpectedStop: it stopped for another reason.
        Raises VcpuTimeout: it did not stop within `timeout_s` seconds.
        """
        event = self.run(timeout_s)
        if not isinstance(event, GuestExit):
            raise UnexpectedStop(self.index, "the guest to end the machine", event)
        return event

    def finish_io(self, timeout_s: float = 10.0) -> None:
        """Let KVM finish the last exit's instruction without running the guest any further.

        To be done before a vCPU's state is saved: until then RIP may still be at the access.
        """
        try:
            self._arm(timeout_s)
            self.vcpu.run.immediate_exit = 1
            self.vcpu.enter()
        finally:
            self.vcpu.run.immediate_exit = 0
            WATCHDOG.disarm(self._watch)

    def kick(self) -> None:
        """Stop the run that another thread is in: it returns `Kicked`. Without one, nothing."""
        self._kicked = True
        WATCHDOG.expire(self._watch)

    def _enter(self, timeout_s: float) -> Exit | Kicked:
        while True:
            exit_ = self.vcpu.enter()
            if not isinstance(exit_, Interrupted):
                self._last_exits.append(exit_)
                return exit_
            if self._kicked:
                return Kicked()
            if WATCHDOG.has_fired(self._watch):
                raise self._timeout(timeout_s)

    def _timeout(self, timeout_s: float) -> VcpuTimeout:
        hang = describe_hang(
            self._vm,
            self.vcpu,
            self._memory,
            index=self.index,
            timeout_s=timeout_s,
            last_exits=[repr(exit_) for exit_ in self._last_exits],
        )
        return VcpuTimeout(hang)

    def _handle_io(self, exit_: IoExit) -> None:
        if exit_.is_out:
            self._events.extend(self._bus.out(exit_.port, exit_.size, exit_.data))
            return
        data = b"".join(self._bus.read(exit_.port, exit_.size) for _ in range(exit_.count))
        self.vcpu.complete_io(data)

    def _arm(self, timeout_s: float) -> None:
        self._kicked = False
        WATCHDOG.arm(self._watch, self.vcpu.run, timeout_s)

    def _on_stuck(self) -> None:
        """Deal with a thread that no signal gets out of KVM_RUN; called by the watchdog."""
        self.stuck = True
        if not self.supervised:
            # The thread that would raise is the one that is stuck.
            print(
                f"vCPU {self.index}: KVM_RUN ignores signals, ending the process",
                file=sys.stderr,
                flush=True,
            )
            os._exit(STUCK_STATUS)
