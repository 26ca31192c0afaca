"""Runs a PC to its end: every vCPU in a thread, what it prints handed on while it runs."""

from __future__ import annotations

import codecs
import errno
import queue
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from harness.machine.console import GuestExit, PortOut, SerialPort
from harness.machine.hang import Hang, describe_hang
from harness.machine.pc import Pc
from harness.machine.threads import VcpuThread
from harness.machine.vcpu import Event, Kicked, MachineVcpu, event_text
from harness.svm.msrs import Cr0
from kvm_ioctl.exits import MmioExit, ShutdownExit
from kvm_ioctl.linux_kvm import MpState
from kvm_ioctl.request import KvmError

_POLL_S = 0.05
"""How often the console is looked at."""

_STOP_S = 10.0

_RESET_RIP: Final = 0xFFF0


class Ending(StrEnum):
    """How a PC ended."""

    EXIT = "exit"
    """Through the debug-exit port."""
    TIMEOUT = "timeout"
    SHUTDOWN = "shutdown"
    """A triple fault."""
    RESET = "reset"
    """The guest asked for a reset, which this PC does not do."""
    STOPPED = "stopped"
    """KVM gave up: an internal error, a failed entry, or an exit that is not of a PC."""


@dataclass(frozen=True)
class Where:
    """Where one vCPU was at the end."""

    index: int
    waits: str
    """What it sleeps for, empty if it ran."""
    rip: int
    cs_base: int
    text: str
    """In one line."""


@dataclass(frozen=True)
class PcEnd:
    """How a run of a PC ended, and where all its vCPUs were if not by the guest's own will."""

    ending: Ending
    text: str
    exit_code: int | None = None
    """What QEMU's isa-debug-exit would make the exit code of the process."""
    where: tuple[Where, ...] = ()


class PcRunner:
    """Runs one `Pc`, once."""

    def __init__(self, pc: Pc, on_text: Callable[[str], None]) -> None:
        """Prepare a run.

        Args:
            pc: the machine.
            on_text: gets what the guest prints, soon after; bytes that are no UTF-8 come as
                surrogate escapes.

        """
        self._pc = pc
        self._serial = _Tail(pc.bus.serial, on_text)
        self._ends: queue.Queue[tuple[int, Event | BaseException]] = queue.Queue()

    def run(self, timeout_s: float) -> PcEnd:
        """Run until the guest ends the machine, or its time is up.

        Raises KvmError: KVM_RUN failed.
        Raises VcpuStuck: a vCPU cannot be got out of KVM_RUN.
        """
        threads = [VcpuThread(v, lambda v: self._run_vcpu(v, timeout_s)) for v in self._pc.vcpus]
        try:
            for thread in threads:
                thread.start()
            first = self._first_end(time.monotonic() + timeout_s)
        finally:
            for thread in threads:
                thread.stop(_STOP_S)
            self._serial.hand_on(last=True)
        if first is None:
            return self._timeout(timeout_s)
        return self._end_of(*first)

    def stop(self) -> None:
        """From another thread: have `run` return soon, with Ending.STOPPED."""
        self._ends.put((0, Kicked()))

    def _first_end(self, deadline: float) -> tuple[int, Event] | None:
        """Wait for a vCPU's end, handing on the console; None: there was none in time."""
        while (left := deadline - time.monotonic()) > 0:
            try:
                index, event = self._ends.get(timeout=min(left, _POLL_S))
            except queue.Empty:
                self._serial.hand_on()
                continue
            if isinstance(event, BaseException):
                raise event
            return index, event
        return None

    def _run_vcpu(self, vcpu: MachineVcpu, timeout_s: float) -> None:
        try:
            # More time than the run has: the main thread ends it.
            event: Event | BaseException = self._next_end(vcpu, timeout_s + _STOP_S)
        except Exception as e:
            event = e
        if not isinstance(event, Kicked):
            self._ends.put((vcpu.index, event))

    def _next_end(self, vcpu: MachineVcpu, timeout_s: float) -> Event:
        while True:
            try:
                event = vcpu.run(timeout_s)
            except KvmError as e:
                # KVM_RUN of a vCPU that just woke from waiting for INIT (kvm_arch_vcpu_ioctl_run).
                if e.errno == errno.EAGAIN:
                    continue
                raise
            if not isinstance(event, MmioExit):
                return event
            if event.is_write:
                self._pc.write_mmio(event.phys_addr, event.data)
            else:
                vcpu.vcpu.complete_mmio(self._pc.read_mmio(event.phys_addr, event.len))

    def _end_of(self, index: int, event: Event) -> PcEnd:
        if isinstance(event, GuestExit):
            return PcEnd(Ending.EXIT, "the guest ended the machine", exit_code=event.exit_code)
        if isinstance(event, ShutdownExit):
            ending, what = Ending.SHUTDOWN, "triple fault (KVM_EXIT_SHUTDOWN)"
        elif isinstance(event, PortOut):
            ending, what = Ending.RESET, f"the guest asks for a reset: {event_text(event)}"
        elif isinstance(event, Kicked):
            return PcEnd(Ending.STOPPED, "stopped from outside")
        else:
            ending, what = Ending.STOPPED, event_text(event)
        return PcEnd(ending, f"vCPU {index}: {what}", where=self._where(0.0))

    def _timeout(self, timeout_s: float) -> PcEnd:
        text = f"the guest did not end within {timeout_s:g} s"
        return PcEnd(Ending.TIMEOUT, text, where=self._where(timeout_s))

    def _where(self, timeout_s: float) -> tuple[Where, ...]:
        return tuple(self._where_is(vcpu, timeout_s) for vcpu in self._pc.vcpus)

    def _where_is(self, vcpu: MachineVcpu, timeout_s: float) -> Where:
        pc = self._pc
        hang = describe_hang(
            pc.vm, vcpu.vcpu, pc.memory, index=vcpu.index, timeout_s=timeout_s, last_exits=()
        )
        waits = _WAITS.get(vcpu.vcpu.get_mp_state().mp_state, "")
        return Where(vcpu.index, waits, hang.rip, hang.cs_base, _where_text(hang, waits))


_WAITS: Final = {
    MpState.KVM_MP_STATE_UNINITIALIZED: "waits for INIT",
    MpState.KVM_MP_STATE_INIT_RECEIVED: "waits for SIPI",
    MpState.KVM_MP_STATE_HALTED: "in HLT",
}


def _where_text(hang: Hang, waits: str) -> str:
    if waits.startswith("waits"):
        return waits
    if hang.rip == _RESET_RIP and not hang.cr0 & Cr0.of(PE=1):
        # KVM on SVM resets a vCPU before it reports a shutdown (shutdown_interception).
        return "at reset"
    at = f"{hang.cs_base:#x}+{hang.rip:#x}" if hang.cs_base else f"{hang.rip:#x}"
    if waits:
        return f"{waits} before {at}"
    code = "unreadable" if hang.code is None else hang.code.hex(" ")
    return f"at {at}, cr0={hang.cr0:#x} efer={hang.efer:#x} cr3={hang.cr3:#x}, code {code}"


class _Tail:
    """Hands on what a serial port has printed since the last time."""

    def __init__(self, serial: SerialPort, on_text: Callable[[str], None]) -> None:
        self._serial = serial
        self._on_text = on_text
        self._seen = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")

    def hand_on(self, last: bool = False) -> None:
        """Hand on all that is new; the beginning of a character waits for its end, unless last."""
        new = self._serial.printed_since(self._seen)
        self._seen += len(new)
        if text := self._decoder.decode(new, last):
            self._on_text(text)
