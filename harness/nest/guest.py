"""One Linux guest: a `LinuxPc` that runs in threads, its console, and a session with its agent."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from typing import Final, Self

from harness.errors import HostLost
from harness.host.session import Session
from harness.machine.linux_boot import LinuxBoot
from harness.machine.linux_pc import LinuxPc
from harness.machine.pc_run import PcEnd, PcRunner
from harness.nest.payload import INITRD_MEMBER, KERNEL_MEMBER, PARAMETER, Source, members
from kvm_ioctl.handles import Kvm

CHANNEL_OPTIONS: Final = "nsvm.channel=ttyS1"
_LAST_LINES = 25
_STOP_S = 20.0
_END_S = 2.0
"""For the machine's end to be noticed after its channel's."""


class LinuxGuest:
    """A Linux that runs until it is closed; a context manager."""

    def __init__(
        self,
        kvm: Kvm,
        source: Source,
        *,
        name: str,
        shows_source: bool,
        vcpus: int,
        memory_mib: int,
        options: Callable[[int], str],
        life_s: float,
        silence_s: float,
        on_console: Callable[[str], None],
    ) -> None:
        """Build the machine and let it boot.

        Args:
            kvm: an open /dev/kvm.
            source: kernel and initrd.
            name: for messages, as "L1".
            shows_source: whether the guest can read them too, for guests of its own.
            vcpus: how many.
            memory_mib: memory in MiB.
            options: returns more of the kernel command line for a TSC of so many kHz.
            life_s: seconds that it may run at most.
            silence_s: seconds without a word from its agent after which it counts as lost.
            on_console: gets what it prints on its console.

        Raises HostError: no such image.
        Raises ImageError: no kernel in it that can be loaded.
        Raises KvmError: KVM refused something.

        """
        self.name = name
        self._console: list[str] = []
        self._on_console = on_console
        self.end: PcEnd | None = None
        """How the machine ended, if it did."""
        self.error: BaseException | None = None
        ours, self._theirs = socket.socketpair()
        self._line = bytearray()
        image = source.map()
        files = members(memoryview(image))
        shown = f"{PARAMETER}={source.size_bytes:#x} " if shows_source else ""
        command_line = f"{CHANNEL_OPTIONS} {shown}{options(_tsc_khz(kvm))}"
        boot = LinuxBoot(files[KERNEL_MEMBER], files[INITRD_MEMBER], command_line, name)
        self.pc = LinuxPc(
            kvm,
            boot,
            vcpus=vcpus,
            memory_mib=memory_mib,
            on_channel=self._take_byte,
            shared=source.map() if shows_source else None,
        )
        self.session = Session(_UartPipe(ours, self.pc), self._why_dead, silence_s)
        self._ours = ours
        self._runner = PcRunner(self.pc, self._take_text)
        self._thread = threading.Thread(target=self._run, args=(life_s,), name=name, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the machine."""
        self._runner.stop()
        self._thread.join(_STOP_S)
        self._ours.close()
        if not self._thread.is_alive():
            self.pc.close()

    @property
    def last_words(self) -> str:
        """The end of its console."""
        lines = [line.rstrip() for line in "".join(self._console).splitlines()]
        return "\n".join(lines[-_LAST_LINES:])

    def _run(self, life_s: float) -> None:
        try:
            self.end = self._runner.run(life_s)
        except BaseException as e:
            self.error = e
        finally:
            # Whoever waits for the agent learns of it.
            self._theirs.close()

    def _take_text(self, text: str) -> None:
        self._console.append(text)
        self._on_console(text)

    def _take_byte(self, value: int) -> None:
        self._line.append(value)
        if value == 0x0A:
            line, self._line = self._line, bytearray()
            os.write(self._theirs.fileno(), line)

    def _why_dead(self, reason: str) -> HostLost:
        self._thread.join(_END_S)
        if self.error is not None:
            why = f"{type(self.error).__name__}: {self.error}"
        elif self.end is not None:
            why = str(self.end.text)
        else:
            why = reason
        return HostLost(f"{self.name} is lost: {why}", self.last_words)


def _tsc_khz(kvm: Kvm) -> int:
    """Return how fast the TSC of this host's guests is; 0 if KVM does not know."""
    with kvm.create_vm() as vm, vm.create_vcpu(0) as vcpu:
        khz: int = vcpu.get_tsc_khz()
        return khz


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
