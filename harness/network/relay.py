"""What two hosts say to each other, passed on over a wire instead of directly.

The hosts know nothing of each other: each gives out lines and takes lines (`harness.storm.relay`
says which). Here a line becomes bytes in a TCP connection, and bytes from it become lines.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import socket
import threading
from collections.abc import Callable
from typing import Final, Self

from harness.errors import NsvmError
from harness.network.wire import Wire

STALL_S: Final = 60.0
"""After so many seconds without a sign from the other end, the connection is lost."""

_PIECE: Final = 32 << 10
_END_S: Final = 10.0

Deliver = Callable[[str], None]


class Relay:
    """One connection over a wire, between two hosts; a context manager."""

    def __init__(self, between: Wire, to_one: Deliver, to_other: Deliver) -> None:
        """Connect.

        Args:
            between: the wire.
            to_one: gives a line to the host at the first end; called in a thread.
            to_other: the same at the second end.

        """
        one, other = between.connect()
        self._ends = (_End(one, to_one), _End(other, to_other))

    def from_one(self, line: str) -> None:
        """Take a line that the host at the first end gave out; it waits while the link is full."""
        self._ends[0].take(line)

    def from_other(self, line: str) -> None:
        """Take a line that the host at the second end gave out."""
        self._ends[1].take(line)

    def __enter__(self) -> Self:
        for end in self._ends:
            end.start()
        return self

    def __exit__(self, *_: object) -> None:
        for end in self._ends:
            end.close()


def _options() -> list[tuple[tuple[int, int], int]]:
    """Return socket options with which a partition ends a connection, whoever waits for what."""
    tcp, probe_s = socket.IPPROTO_TCP, max(1, int(STALL_S / 4))
    return [
        ((tcp, socket.TCP_NODELAY), 1),
        ((tcp, socket.TCP_USER_TIMEOUT), int(STALL_S * 1e3)),
        ((socket.SOL_SOCKET, socket.SO_KEEPALIVE), 1),
        ((tcp, socket.TCP_KEEPIDLE), probe_s),
        ((tcp, socket.TCP_KEEPINTVL), probe_s),
    ]


class _End:
    """One socket, and the host that uses it."""

    def __init__(self, connected: socket.socket, deliver: Deliver) -> None:
        connected.settimeout(None)
        for option, value in _options():
            connected.setsockopt(*option, value)
        self._socket = connected
        self._deliver = deliver
        self._thread = threading.Thread(target=self._give, name="relay", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def take(self, line: str) -> None:
        # Of a connection that broke, the reading thread tells the host.
        with contextlib.suppress(OSError):
            try:
                data = base64.b64decode(line, validate=True)
            except binascii.Error:
                # Without what it stands for, nothing after it means anything: both ends lose it.
                self._socket.shutdown(socket.SHUT_RDWR)
                return
            if data:
                self._socket.sendall(data)
            else:
                self._socket.shutdown(socket.SHUT_WR)

    def _give(self) -> None:
        # A host that is lost is found out by whoever calls there.
        with contextlib.suppress(NsvmError):
            data = b"-"
            while data:
                data = self._receive()
                self._deliver(base64.b64encode(data).decode("ascii"))

    def _receive(self) -> bytes:
        try:
            return self._socket.recv(_PIECE)
        except OSError:
            return b""

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        if self._thread.is_alive():
            self._thread.join(_END_S)
        self._socket.close()
