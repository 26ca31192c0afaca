"""QEMU's control channel (QMP), with a deadline on every command."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from qemu.qmp import QMPClient, QMPError

from harness.errors import HostError

T = TypeVar("T")

_COMMAND_S = 15.0
_SAVE_S = 60.0


def shell_quoted(path: Path) -> str:
    """Return `path` for QEMU's ``exec:``, which has no other form than a shell command."""
    return "'" + str(path).replace("'", "'\\''") + "'"


class Monitor:
    """One QMP connection over a connected socket; it greets once, so it is opened once."""

    def __init__(self, sock: socket.socket, command_s: float = _COMMAND_S) -> None:
        """Use a connected socket; every command may take `command_s` seconds."""
        self._socket = sock
        self._command_s = command_s
        self._loop = asyncio.new_event_loop()
        self._client: QMPClient | None = None

    def _wait(self, work: Coroutine[Any, Any, T], what: str) -> T:
        try:
            return self._loop.run_until_complete(asyncio.wait_for(work, self._command_s))
        except TimeoutError as e:
            raise HostError(f"QEMU did not answer {what} within {self._command_s:.0f} s") from e
        except QMPError as e:
            raise HostError(f"QEMU: {what}: {e}") from e

    def command(self, name: str, **arguments: Any) -> Any:
        """Execute a QMP command and return its answer.

        Raises:
            HostError: QEMU refuses it, is gone, or does not answer in time.
        """
        if self._client is None:
            client = QMPClient("nsvm")
            self._wait(client.connect(self._socket), "connecting")
            self._client = client
        return self._wait(self._client.execute(name, arguments), name)

    def pass_descriptor(self, fd: int, name: str) -> None:
        """Give QEMU a descriptor of ours, to be named in commands.

        Raises:
            HostError: as `command`.
        """
        self.command("query-status")  # connected, if it was not
        if self._client is not None:
            self._client.send_fd_scm(fd)
        self.command("getfd", fdname=name)

    def save_machine(self, path: Path) -> None:
        """Write the machine's whole state to `path`, and let the machine go on.

        It is stopped meanwhile: under TCG, what a running machine writes during the copy may be
        missed, and machines started from that state hang.

        Raises:
            OSError: QEMU could not write it.
            HostError: QEMU refuses, or it took too long.
        """
        self.command("migrate-set-parameters", **{"max-bandwidth": 1 << 34})
        self.command("stop")
        self.command("migrate", uri=f"exec:cat > {shell_quoted(path)}")
        deadline = time.monotonic() + _SAVE_S
        while (status := self.command("query-migrate")["status"]) not in ("completed", "failed"):
            if time.monotonic() > deadline:
                raise HostError(f"saving the machine's state took more than {_SAVE_S:.0f} s")
            time.sleep(0.02)
        self.command("cont")
        if status == "failed":
            raise OSError(None, "QEMU could not write the machine's state")

    def close(self) -> None:
        """Close the connection."""
        if self._client is not None:
            client, self._client = self._client, None
            # A QEMU that is gone already has said its farewell by ending the stream.
            with contextlib.suppress(HostError, EOFError, OSError):
                self._wait(client.disconnect(), "disconnecting")
        self._loop.close()
        self._socket.close()
