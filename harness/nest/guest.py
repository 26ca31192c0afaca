"""A Linux guest as its host has it: a console, a session with its agent, what is done to it."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Final, Protocol, Self

from harness.errors import HarnessError, HostLost
from harness.host.session import Session
from harness.machine.linux_pc import LinuxPc
from harness.machine.smi_counter import Way
from harness.nest.running import ChannelLines, LinuxSpec, RunningPc, build_pc
from kvm_ioctl.handles import Kvm

_LAST_LINES: Final = 25
_END_S: Final = 2.0
"""For the machine's end to be noticed after its channel's."""


class Guest(Protocol):
    """A Linux that runs until it is closed; a context manager."""

    name: str
    session: Session

    @property
    def last_words(self) -> str:
        """The end of its console."""

    def move(self) -> dict[str, Any]:
        """Migrate it; return figures: downtime_s, seconds, bytes, rounds, in_guest_mode."""

    def smi(self, index: int, way: Way, timeout_s: float) -> dict[str, Any]:
        """Send a vCPU an SMI; return what `CountedSmi` has."""

    def counts(self) -> dict[str, int]:
        """Return KVM's statistics of it; empty where there are none."""

    def close(self) -> None:
        """End it."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...


class Console:
    """Keeps what a guest prints, and hands it on."""

    def __init__(self, on_text: Callable[[str], None]) -> None:
        self._on_text = on_text
        self._pieces: list[str] = []

    def take(self, text: str) -> None:
        """Take a piece."""
        self._pieces.append(text)
        self._on_text(text)

    @property
    def last_words(self) -> str:
        """Its last lines."""
        lines = [line.rstrip() for line in "".join(self._pieces).splitlines()]
        return "\n".join(lines[-_LAST_LINES:])


class LinuxGuest:
    """A Linux in this process, where it stays."""

    def __init__(self, kvm: Kvm, spec: LinuxSpec, on_console: Callable[[str], None]) -> None:
        """Build the machine and let it boot.

        Args:
            kvm: an open /dev/kvm.
            spec: what is wanted.
            on_console: gets what it prints on its console.

        Raises HostError: no such image.
        Raises ImageError: no kernel in it that can be loaded.
        Raises KvmError: KVM refused something.

        """
        self.name = spec.name
        self._console = Console(on_console)
        self._ours, theirs = socket.socketpair()
        self._channel = ChannelLines(theirs.fileno())
        pc = build_pc(kvm, spec, self._channel.take)
        self.session = Session(_UartPipe(self._ours, pc), self._why_dead, spec.silence_s)
        # Whoever waits for the agent learns of its end.
        self._running = RunningPc(pc, spec.life_s, self._console.take, theirs.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the machine."""
        self._running.close()
        self._ours.close()

    @property
    def last_words(self) -> str:
        """The end of its console."""
        return self._console.last_words

    def move(self) -> dict[str, Any]:
        """Refuse: it takes two processes to move between."""
        raise HarnessError(f"{self.name} stays in the process that it is in")

    def smi(self, index: int, way: Way, timeout_s: float) -> dict[str, Any]:
        """Send a vCPU an SMI; return what `CountedSmi` has."""
        return asdict(self._running.smi(index, way, timeout_s))

    def counts(self) -> dict[str, int]:
        """Return KVM's statistics of it; empty where there are none."""
        return self._running.counts()

    def _why_dead(self, reason: str) -> HostLost:
        self._running.join(_END_S)
        return HostLost(
            f"{self.name} is lost: {self._running.why_ended or reason}", self.last_words
        )


class _UartPipe:
    """The channel: what the guest's second serial port says comes by a socket."""

    def __init__(self, sock: socket.socket, pc: LinuxPc) -> None:
        self._socket = sock
        self._pc = pc

    def fileno(self) -> int:
        """Return the descriptor to poll."""
        return self._socket.fileno()

    def receive(self) -> bytes:
        """Return what is there; empty at the end."""
        return self._socket.recv(1 << 16)

    def transmit(self, data: bytes) -> None:
        """Send all of it."""
        self._pc.com2.receive(data)
