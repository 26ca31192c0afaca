"""One vCPU of a machine: runs until something happens that the caller should know of."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from harness.errors import ScenarioFailure
from harness.machine.console import GuestExit, PortBus, PortOut
from harness.machine.errors import MachineError
from harness.machine.gate import Gate
from harness.machine.guest_abi import STAGE_PORT, Stage
from harness.machine.hang import VcpuTimeout, describe_hang
from harness.machine.memory import GuestMemory
from harness.machine.watchdog import WATCHDOG
from kvm_ioctl.exits import DirtyRingFullExit, Exit, Interrupted, IoExit
from kvm_ioctl.handles import Vcpu, Vm

STUCK_STATUS = 70
"""Exit status of a process that is ended because a thread cannot be got out of KVM_RUN."""

_KEPT_EXITS = 8
_MOST_PIECES = 1 << 16
_NOT_FOR_CALLERS = (Interrupted, DirtyRingFullExit)


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

    def __init__(
        self,
        index: int,
        vcpu: Vcpu,
        vm: Vm,
        memory: GuestMemory,
        bus: PortBus,
        gate: Gate | None = None,
    ) -> None:
        self.index = index
        self.inside = False
        """Between passing the gate and having left KVM_RUN."""
        self._gate = gate or Gate()
        self.vcpu = vcpu
        """The KVM handle, for any ioctl."""
        self.supervised = False
        """Another thread waits for this one and deals with it if it gets stuck."""
        self.on_ring_full: Callable[[], None] | None = None
        """Answers KVM_EXIT_DIRTY_RING_FULL; without, the exit is returned as any other."""
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
            self._disarm()

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
            self._disarm()

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

    def finish_io(self) -> None:
        """Let KVM finish the last exit's instruction without running the guest any further.

        To be done before a vCPU's state is saved: until then RIP may still be at the access. May be
        called from another thread while a pause holds the vCPU back.

        Raises MachineError: the instruction does not end, or the guest ran.
        """
        # Nobody watches it: with `immediate_exit` KVM_RUN enters no guest and waits for nothing
        # (kvm_arch_vcpu_ioctl_run), and waking the watchdog takes longer than all of this.
        run = self.vcpu.run
        for _ in range(_MOST_PIECES):
            run.immediate_exit = 1
            try:
                exit_ = self.vcpu.enter()
            finally:
                run.immediate_exit = 0
            if isinstance(exit_, Interrupted):
                self._take_coalesced()
                return
            # A string instruction, or an access that was split: the next piece of it.
            if not isinstance(exit_, IoExit):
                raise MachineError(f"vCPU {self.index}: finishing its I/O ended in {exit_}")
            self._last_exits.append(exit_)
            self._handle_io(exit_)
        raise MachineError(f"vCPU {self.index}: its I/O has more than {_MOST_PIECES} pieces")

    def _take_coalesced(self) -> None:
        """Hand the writes that KVM collected in the ring of coalesced ones to their devices."""
        if not self._vm.has_coalesced_ring:
            return
        for write in self.vcpu.coalesced_ring().drain():
            if not write.pio:
                raise MachineError(f"a coalesced write to {write.address:#x}, no device's memory")
            self._events.extend(self._bus.out(write.address, len(write.data), write.data))

    def put_back(self, events: Iterable[Event]) -> None:
        """Have these events returned by the next runs, before any other."""
        self._events.extendleft(reversed(list(events)))

    @property
    def waiting_events(self) -> tuple[Event, ...]:
        """Events that happened and that no run has returned yet."""
        return tuple(self._events)

    def interrupt_run(self) -> None:
        """Get the vCPU out of KVM_RUN, if it is in there, to wait at a closed gate."""
        WATCHDOG.expire(self._watch)

    def exchange(self, other: MachineVcpu) -> None:
        """Swap the vCPUs in KVM of two that are not running; the rest stays with each."""
        self.vcpu, other.vcpu = other.vcpu, self.vcpu
        self._vm, other._vm = other._vm, self._vm

    def connect(self, bus: PortBus) -> None:
        """Have the devices of another bus answer from now on."""
        self._bus = bus

    def kick(self) -> None:
        """Stop the run that another thread is in: it returns `Kicked`. Without one, nothing."""
        self._kicked = True
        WATCHDOG.expire(self._watch)

    def _enter(self, timeout_s: float) -> Exit | Kicked:
        while True:
            exit_ = self.vcpu.enter()
            if not isinstance(exit_, _NOT_FOR_CALLERS):
                self._last_exits.append(exit_)
                return exit_
            if isinstance(exit_, DirtyRingFullExit):
                if self.on_ring_full is None:
                    return exit_
                self.on_ring_full()
            elif self._kicked:
                return Kicked()
            elif self._gate.closed:
                self._disarm()
                self._begin(timeout_s)
            elif WATCHDOG.has_fired(self._watch):
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
        self._begin(timeout_s)

    def _begin(self, timeout_s: float) -> None:
        self._gate.pass_through(self)
        WATCHDOG.arm(self._watch, self.vcpu.run, timeout_s)

    def _disarm(self) -> None:
        WATCHDOG.disarm(self._watch)
        self.inside = False

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
