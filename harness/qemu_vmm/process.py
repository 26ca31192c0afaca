"""One QEMU process: its monitor, console and channel, and why it ended."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from harness.errors import HostError
from harness.host.monitor import Monitor
from harness.qemu_vmm.installation import PROGRAM, Installation

_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h
_END_S: Final = 10.0
_COMMAND_S: Final = 60.0
"""A QEMU that has just been started answers once it is ready."""
_LIBC: Final = ctypes.CDLL(None)


@dataclass(frozen=True)
class PcOptions:
    """The guest's hardware and what it boots, the same for every QEMU that it moves through."""

    cpu: str
    """As for `-cpu`."""
    vcpus: int
    memory_mib: int
    kernel: Path
    initrd: Path
    command_line: str
    disk: Path | None = None
    """A read-only image, its virtio disk."""
    machine: str = "q35"
    accel: str = "kvm"

    def words(self) -> list[str]:
        """Return QEMU's options for it."""
        disk = []
        if self.disk is not None:
            path = str(self.disk).replace(",", ",,")
            disk = [
                "-drive", f"if=none,id=disk,format=raw,readonly=on,file={path}",
                "-device", "virtio-blk-pci,drive=disk",
            ]  # fmt: skip
        return [
            "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
            "-machine", self.machine, "-accel", self.accel, "-cpu", self.cpu,
            "-smp", str(self.vcpus), "-m", str(self.memory_mib),
            "-kernel", str(self.kernel), "-initrd", str(self.initrd),
            "-append", self.command_line, *disk,
        ]  # fmt: skip


class QemuProcess:
    """A running QEMU; it ends with the thread that started it, if not before."""

    def __init__(
        self,
        installation: Installation,
        options: list[str],
        errors: Path,
        inherited: tuple[int, ...] = (),
    ) -> None:
        """Start it.

        Args:
            installation: the program.
            options: of the machine.
            errors: a file for what it says on standard error.
            inherited: descriptors that `options` name.

        Raises HostError: it cannot be started.

        """
        self._errors = errors
        self.console, console = socket.socketpair()
        self.channel, channel = socket.socketpair()
        monitor, their_monitor = socket.socketpair()
        theirs = {"console": console, "channel": channel, "monitor": their_monitor}
        words = [*installation.command, *options]
        for name, end in theirs.items():
            words += ["-chardev", f"socket,id={name},fd={end.fileno()}"]
        words += ["-serial", "chardev:console", "-serial", "chardev:channel"]
        words += ["-mon", "chardev=monitor,mode=control"]
        try:
            with open(errors, "wb") as file:
                self.process = subprocess.Popen(
                    words,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=file,
                    pass_fds=(*(end.fileno() for end in theirs.values()), *inherited),
                    preexec_fn=_end_with_parent,
                )
        except OSError as e:
            for end in (self.console, self.channel, monitor):
                end.close()
            raise HostError(f"cannot start {words[0]}: {e.strerror}") from e
        finally:
            for end in theirs.values():
                end.close()
        self.monitor = Monitor(monitor, _COMMAND_S)

    @property
    def ended(self) -> bool:
        """Whether it is gone."""
        return self.process.poll() is not None

    def complaint(self) -> str:
        """Return what it said on standard error, first and last; empty: nothing."""
        text = self._errors.read_text(errors="replace")
        lines = [line.removeprefix(f"{PROGRAM}: ").strip() for line in text.splitlines()]
        # An internal error of KVM's comes with all registers behind it.
        telling = [line for line in lines if ": " in line or "KVM" in line]
        return "; ".join(dict.fromkeys(telling[:1] + telling[-1:]))

    def why_ended(self) -> str:
        """Return in words how it ended; empty if it runs."""
        status = self.process.poll()
        if status is None:
            return ""
        said = f": {self.complaint()}" if self.complaint() else ""
        if status < 0:
            return f"QEMU was ended by {signal.Signals(-status).name}{said}"
        if status:
            return f"QEMU ended with status {status}{said}"
        return f"QEMU ended: the guest reset or turned itself off{said}"

    def wait(self, timeout_s: float) -> bool:
        """Give it some time to end; tell whether it did."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout_s)
        return self.ended

    def stop(self) -> None:
        """End it at once and close what leads to it, but for the console, which has its reader."""
        self.process.kill()
        self.monitor.close()
        self.channel.close()
        self.process.wait(_END_S)


def _end_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
