"""One QEMU process: its channel, its monitor, its console, and why it died."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
from pathlib import Path

from harness.errors import HostError, HostLost
from harness.host.monitor import Monitor
from harness.host.session import Session

QEMU = "qemu-system-x86_64"

#: The beginning of the end, on a console.
_COMPLAINTS = ("BUG:", "Oops", "Kernel panic", "WARNING:", "sysrq:", "nsvm-init:")

#: For a command, code included, to be taken by a host that is alive.
SEND_S = 60.0


def qemu_version() -> str:
    """Return QEMU's version, e.g. ``7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)``.

    Raises:
        HostError: QEMU is not installed or does not run.
    """
    path = shutil.which(QEMU)
    if path is None:
        raise HostError(f"{QEMU} not found (Debian: apt-get install qemu-system-x86)")
    done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30)
    first = done.stdout.splitlines()[0] if done.stdout else ""
    if done.returncode or "version " not in first:
        raise HostError(f"{path} --version failed: {done.stderr.strip() or first}")
    return first.split("version ", 1)[1]


class SocketPipe:
    """The channel over one end of a socket pair; QEMU inherited the other."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        # Reading waits elsewhere; this is for writing to a host that no longer reads.
        sock.settimeout(SEND_S)

    def fileno(self) -> int:
        """Return the descriptor to poll."""
        return self._socket.fileno()

    def receive(self) -> bytes:
        """Return what is there; empty at the end."""
        return self._socket.recv(1 << 16)

    def transmit(self, data: bytes) -> None:
        """Send all of it."""
        self._socket.sendall(data)


class QemuMachine:
    """A running QEMU. Its channel and monitor are socket pairs that it inherited."""

    def __init__(self, command: list[str], scratch: Path, number: int) -> None:
        """Start `command`, completed by the back ends of its character devices.

        Raises:
            HostError: it cannot be started.
        """
        self.console = scratch / f"console-{number}.log"
        self._errors = scratch / f"qemu-{number}.err"
        self._channel, their_channel = socket.socketpair()
        monitor, their_monitor = socket.socketpair()
        whole = [
            # The machine ends with this process, however this process ends.
            "setpriv", "--pdeathsig", "KILL",
            *command,
            "-chardev", f"file,id=console,path={str(self.console).replace(',', ',,')}",
            "-chardev", f"socket,id=channel,fd={their_channel.fileno()}",
            "-chardev", f"socket,id=monitor,fd={their_monitor.fileno()}",
        ]  # fmt: skip
        try:
            with open(self._errors, "wb") as errors:
                self.process = subprocess.Popen(
                    whole,
                    stdin=subprocess.DEVNULL,
                    stdout=errors,
                    stderr=errors,
                    pass_fds=(their_channel.fileno(), their_monitor.fileno()),
                    # A ^C at the terminal is the harness's to handle.
                    start_new_session=True,
                )
        except OSError as e:
            self._channel.close()
            monitor.close()
            raise HostError(f"cannot start {whole[0]}: {e.strerror}") from e
        finally:
            their_channel.close()
            their_monitor.close()
        self.monitor = Monitor(monitor)
        self.session = Session(SocketPipe(self._channel), self._why_dead)

    @property
    def console_text(self) -> str:
        """All that the machine has written to its serial console."""
        if not self.console.exists():
            return ""
        return self.console.read_text(errors="replace")

    def stop(self) -> None:
        """End the process and close what leads to it."""
        self._channel.close()
        self.monitor.close()
        self.process.kill()
        self.process.wait(30)

    def _why_dead(self, reason: str) -> HostLost:
        """Tell a machine that ended from one that hangs, with its console's last words."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            # A panicked kernel closes the channel a moment before QEMU is gone.
            self.process.wait(2)
        status = self.process.poll()
        console = last_words(self.console_text)
        if status is None:
            complained = any(mark in console for mark in _COMPLAINTS)
            return HostLost(f"the emulated host hangs: {reason}", console, silent=not complained)
        if status < 0:
            name = signal.Signals(-status).name
            return HostLost(f"QEMU was ended by {name}", console)
        if status == 0:
            return HostLost("the emulated host went down (panic or power off)", console)
        errors = self._errors.read_text(errors="replace").strip().splitlines()
        detail = errors[-1] if errors else "no message"
        return HostLost(f"QEMU ended with status {status}: {detail}", console)


def last_words(console: str, lines: int = 60) -> str:
    """Return the end of a console's text, from the kernel's first complaint if it is there."""
    text = [line.rstrip() for line in console.splitlines()]
    for number, line in enumerate(text):
        if any(mark in line for mark in _COMPLAINTS):
            return "\n".join(text[number : number + 2 * lines])
    return "\n".join(text[-lines:])
