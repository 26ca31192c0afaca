"""The way to a guest's agent, that stays while the QEMU that carries it changes."""

from __future__ import annotations

import array
import contextlib
import fcntl
import select
import socket
import struct
import termios
import threading
import time
from collections.abc import Iterator
from typing import Final

from harness.errors import HostError

_SEND_S: Final = 60.0
_QUIET_S: Final = 30.0
_LOOK_S: Final = 0.2
_BYTES: Final = 1 << 16


class Channel:
    """A pipe (`harness.host.session.Pipe`) whose far end is whatever was plugged in last."""

    def __init__(self) -> None:
        self._ours, self._theirs = socket.socketpair()
        self._plugged: socket.socket | None = None
        # What has come and was not read yet: a move must not wait for whoever reads.
        self._kept = bytearray()
        self._reading = threading.Lock()
        self._sending = threading.Lock()
        self._over = False
        self._thread = threading.Thread(target=self._pump, name="channel", daemon=True)
        self._thread.start()

    def fileno(self) -> int:
        """Return the descriptor to poll."""
        return self._ours.fileno()

    def receive(self) -> bytes:
        """Return what is there; empty at the end."""
        return self._ours.recv(_BYTES)

    def transmit(self, data: bytes) -> None:
        """Send all of it."""
        with self._sending:
            if self._plugged is None:
                raise OSError(None, "no QEMU carries it")
            self._plugged.sendall(data)

    def plug(self, sock: socket.socket) -> None:
        """Have the channel go on over `sock`, behind all that came over the one before."""
        _limit_sending(sock)
        with self._reading:
            self._take_rest()
            self._plugged = sock

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Let nothing be sent, and have all that was sent be taken by the guest's serial port.

        What still lies before QEMU when the guest leaves it would be lost.

        Raises HostError: the guest does not take it.
        """
        with self._sending:
            deadline = time.monotonic() + _QUIET_S
            while self._plugged is not None and _not_taken(self._plugged):
                if time.monotonic() > deadline:
                    raise HostError(f"the guest did not read its channel within {_QUIET_S:g} s")
                time.sleep(_LOOK_S)
            yield

    def end(self) -> None:
        """Have who reads learn that nothing more comes; what is there already comes first."""
        with self._reading:
            self._take_rest()
            self._plugged = None
            self._over = True

    def close(self) -> None:
        """End it and give the descriptors back; what was not read is lost."""
        with contextlib.suppress(OSError):
            self._ours.shutdown(socket.SHUT_RDWR)
        self.end()
        self._thread.join(_SEND_S)
        self._ours.close()
        self._theirs.close()

    def _pump(self) -> None:
        while not self._over or self._kept:
            sock = self._plugged
            ready = _ready([sock] if sock else [], [self._theirs] if self._kept else [])
            with self._reading:
                if sock and sock in ready and sock is self._plugged and not self._take():
                    # Who starts QEMUs sees that this one has ended, or plugs in another.
                    self._plugged = None
                if self._kept:
                    self._give()
        with contextlib.suppress(OSError):
            self._theirs.shutdown(socket.SHUT_RDWR)

    def _take_rest(self) -> None:
        while self._plugged is not None and self._take():
            pass

    def _take(self) -> bool:
        """Take what has come; tell whether there was any."""
        if self._plugged is None:
            return False
        try:
            data = self._plugged.recv(_BYTES, socket.MSG_DONTWAIT)
        except OSError:
            return False
        self._kept += data
        return bool(data)

    def _give(self) -> None:
        """Hand on as much as there is room for."""
        try:
            del self._kept[: self._theirs.send(self._kept, socket.MSG_DONTWAIT)]
        except BlockingIOError:
            pass
        except OSError:
            # Nobody reads any more.
            self._kept.clear()


def _limit_sending(sock: socket.socket) -> None:
    """Have a send fail in the end; not by a timeout of Python's, which makes every recv wait."""
    limit = struct.pack("@ll", int(_SEND_S), 0)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)


def _ready(readers: list[socket.socket], writers: list[socket.socket]) -> list[socket.socket]:
    """Wait a little for any of them; return those that are."""
    try:
        can_read, can_write, _ = select.select(readers, writers, [], _LOOK_S)
    except (OSError, ValueError):
        # Closed meanwhile.
        time.sleep(_LOOK_S)
        return []
    return [*can_read, *can_write]


def _not_taken(sock: socket.socket) -> int:
    """Return how much of what was sent the other end has not read (SIOCOUTQ, as TIOCOUTQ)."""
    count = array.array("i", [0])
    fcntl.ioctl(sock, termios.TIOCOUTQ, count)
    return count[0]
