"""A channel to a keeper (`keeper.py`) that outlives the connections it goes through.

A thread holds the connection and makes a new one when it breaks. To a `Session` this is a pipe like
any other: it only falls silent for a while.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import paramiko

from harness.errors import HostError
from harness.host.ssh_connection import Connection, Unreachable

#: The agent says something every second; a connection on which nothing comes is taken for broken.
SILENCE_S = 15.0
_LOOK_S = 0.2
_RETRY_S = 1.0
#: The status of a command comes right after the end of its output.
_STATUS_S = 2.0
_PIECE = 1 << 16

Attach = Callable[[int], tuple[Connection, paramiko.Channel]]


class Gone(HostError):
    """The keeper is no longer there."""


class Link:
    """A pipe to the keeper of one run; `close` ends its thread."""

    def __init__(
        self,
        attach: Attach,
        reconnect_s: float,
        boot_id: str,
        log: Callable[[str], None],
        silence_s: float = SILENCE_S,
    ) -> None:
        """Begin to connect.

        Args:
            attach: gives a connection, and a channel on which the keeper sends its spool from the
                given offset; its first line is the greeting.
            reconnect_s: how long to try to get a lost connection back.
            boot_id: of the host, when the run began.
            log: is told of lost and regained connections.
            silence_s: after so long without a byte, the connection counts as lost.

        """
        self._attach = attach
        self._reconnect_s, self._silence_s = reconnect_s, silence_s
        self._boot_id = boot_id
        self._log = log
        self._ours, self._theirs = socket.socketpair()
        #: Rings when there is something to send.
        self._bell, self._rope = socket.socketpair()
        self._bell.setblocking(False)
        self._rope.setblocking(False)
        #: What the keeper has not confirmed; its first byte is number `_confirmed`.
        self._commands = b""
        self._confirmed = 0
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._received = 0
        #: Why this ended; empty as long as it has not, or if the keeper ended it.
        self.reason = ""
        self.reconnects = 0
        #: Set when the keeper has said its last: only then is the end of the channel the end.
        self.is_over = False
        #: Whether the host was not heard of again: nobody knows what became of it.
        self.unreachable = False
        self._thread = threading.Thread(target=self._run, name="ssh link", daemon=True)
        self._thread.start()

    # --- the session's side

    def fileno(self) -> int:
        """Return the descriptor to poll."""
        return self._ours.fileno()

    def receive(self) -> bytes:
        """Return what is there; empty at the end."""
        return self._ours.recv(_PIECE)

    def transmit(self, data: bytes) -> None:
        """Have all of it sent, now or when there is a connection again."""
        with self._lock:
            self._commands += data
        # One that rings already, or was taken away, is no matter.
        with contextlib.suppress(OSError):
            self._rope.send(b"!")

    def close(self, timeout_s: float = 10.0) -> None:
        """End the thread and the connection. The keeper waits for another one for a time."""
        self._closing.set()
        self._ours.close()
        self._thread.join(timeout_s)
        self._rope.close()

    # --- the thread's

    def _run(self) -> None:
        lost_at: float | None = None
        try:
            while not self._closing.is_set():
                try:
                    connection, channel = self._attach(self._received)
                    with connection, contextlib.closing(channel):
                        sent = self._greeted(channel)
                        if lost_at is not None:
                            self.reconnects += 1
                            self._log(f"connected again after {time.monotonic() - lost_at:.0f} s")
                        lost_at = None
                        if self._pump(channel, sent):
                            return
                    raise Unreachable("the connection broke")
                except (Unreachable, paramiko.SSHException, OSError, EOFError) as e:
                    if lost_at is None:
                        lost_at = time.monotonic()
                        self._log(f"connection lost ({e}); the run goes on there")
                    if time.monotonic() - lost_at > self._reconnect_s:
                        self.unreachable = True
                        self.reason = f"not to be reached for {self._reconnect_s:.0f} s: {e}"
                        return
                self._closing.wait(_RETRY_S)
        except HostError as e:
            self.reason = str(e)
        finally:
            self._theirs.close()
            self._bell.close()

    def _greeted(self, channel: paramiko.Channel) -> int:
        """Take the keeper's greeting; return the number of the next command byte to send."""
        channel.settimeout(self._silence_s)
        line = b""
        while not line.endswith(b"\n"):
            byte = channel.recv(1)
            if not byte:
                raise _unanswered(channel)
            line += byte
        said = json.loads(line)
        if "received" in said:
            self._confirm(said["received"])
            return int(said["received"])
        while data := channel.recv(_PIECE):
            self._deliver(data)
        if said["boot_id"] != self._boot_id:
            raise Gone("the host went down and was booted again")
        raise Gone("the keeper of the run is gone")

    def _confirm(self, received: int) -> None:
        with self._lock:
            self._commands = self._commands[received - self._confirmed :]
            self._confirmed = received

    def _pump(self, channel: paramiko.Channel, sent: int) -> bool:
        """Pass on in both directions; return True when the keeper has ended this."""
        heard = time.monotonic()
        while not self._closing.is_set():
            with self._lock:
                waiting = self._commands[sent - self._confirmed :]
            if waiting:
                channel.sendall(waiting)
                sent += len(waiting)
            watched: list[Any] = [channel, self._bell]
            readable, _, _ = select.select(watched, [], [], _LOOK_S)
            if self._bell in readable:
                self._bell.recv(_PIECE)
            if channel in readable:
                data = channel.recv(_PIECE)
                if not data:
                    return self.is_over and _status(channel) == 0
                heard = time.monotonic()
                self._deliver(data)
            elif time.monotonic() - heard > self._silence_s:
                raise Unreachable(f"nothing came for {self._silence_s:.0f} s")
        return True

    def _deliver(self, data: bytes) -> None:
        self._received += len(data)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._theirs.sendall(data)


def _status(channel: paramiko.Channel) -> int:
    """Return the exit status of what ran there; -1 if the connection broke first."""
    channel.status_event.wait(_STATUS_S)
    return channel.exit_status


def _unanswered(channel: paramiko.Channel) -> HostError:
    if (status := _status(channel)) in (-1, 0):
        # Nobody has said why: the connection broke, or the keeper was killed just now.
        return Unreachable("the connection broke")
    said = channel.recv_stderr(_PIECE).decode(errors="replace").strip().splitlines()
    return HostError(f"attach: {said[-1] if said else 'no word'} (status {status})")
