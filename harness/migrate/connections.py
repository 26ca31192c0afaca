"""Ways to get a link: within the process, by sockets, by the standard streams of a child."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from harness.migrate.errors import LinkLost
from harness.migrate.links import FdLink, Link

_RETRY_S: Final = 0.02
_UNIX_BUFFER_BYTES: Final = 256 << 10
"""The kernel takes twice as much."""
_CHILD_END_S: Final = 10.0
_NOT_YET: Final = (errno.ENOENT, errno.ECONNREFUSED)


def pair() -> tuple[Link, Link]:
    """Return the two ends of a link within this process."""
    one, other = socket.socketpair()
    return over_socket(one, "the other thread"), over_socket(other, "the other thread")


def over_socket(connected: socket.socket, name: str) -> Link:
    """Return the link that a connected socket is; it owns the socket."""
    if connected.family in (socket.AF_INET, socket.AF_INET6):
        # Messages are small and waited for.
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    elif connected.family == socket.AF_UNIX:
        # TCP's grows by itself; with the usual one the two ends wake each other all the time.
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNIX_BUFFER_BYTES)
    return FdLink(connected.fileno(), connected.fileno(), name, connected.close)


def over_fds(read_fd: int, write_fd: int, name: str) -> Link:
    """Return the link that two byte streams are, pipes for example; it owns them."""

    def close() -> None:
        for fd in {read_fd, write_fd}:
            os.close(fd)

    return FdLink(read_fd, write_fd, name, close)


def connect_unix(path: Path | str, timeout_s: float = 10.0) -> Link:
    """Connect to a UNIX socket, as soon as somebody listens there.

    Raises LinkLost: nobody did within `timeout_s` seconds.
    """
    return _connect(
        lambda left: _connected(socket.AF_UNIX, str(path), left), f"unix:{path}", timeout_s
    )


def connect_tcp(host: str, port: int, timeout_s: float = 10.0) -> Link:
    """Connect to a TCP port, as soon as somebody listens there.

    Raises LinkLost: nobody did within `timeout_s` seconds.
    """
    return _connect(
        lambda left: socket.create_connection((host, port), timeout=left),
        f"tcp:{host}:{port}",
        timeout_s,
    )


@dataclass(frozen=True)
class Listener:
    """A place that one other end can connect to."""

    listening: socket.socket
    name: str

    @property
    def port(self) -> int:
        """The TCP port."""
        return int(self.listening.getsockname()[1])

    def accept(self, timeout_s: float = 30.0) -> Link:
        """Wait for the other end.

        Raises LinkLost: nobody came within `timeout_s` seconds.
        """
        self.listening.settimeout(timeout_s)
        try:
            connected, _ = self.listening.accept()
        except OSError as e:
            raise LinkLost(f"waiting for a connection to {self.name}: {_why(e)}") from e
        return over_socket(connected, self.name)


@contextlib.contextmanager
def listen_unix(path: Path | str) -> Iterator[Listener]:
    """Listen on a UNIX socket that goes away with the `with`.

    Raises LinkLost: that cannot be.
    """
    with _listening(socket.AF_UNIX, str(path), f"unix:{path}") as listener:
        try:
            yield listener
        finally:
            Path(path).unlink(missing_ok=True)


@contextlib.contextmanager
def listen_tcp(host: str = "127.0.0.1", port: int = 0) -> Iterator[Listener]:
    """Listen on a TCP port, by default on one that is free.

    Raises LinkLost: that cannot be.
    """
    with _listening(socket.AF_INET, (host, port), f"tcp:{host}:{port}") as listener:
        yield listener


@contextlib.contextmanager
def child(argv: Sequence[str]) -> Iterator[tuple[Link, subprocess.Popen[bytes]]]:
    """Start a command and talk to it over its standard input and output: `ssh HOST ...`.

    At the end of the `with` the link is closed, and the child killed unless it ends by itself.

    Raises LinkLost: it cannot be started.
    """
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    link = over_fds(ours_in, ours_out, argv[0])
    try:
        process = subprocess.Popen(argv, stdin=theirs_in, stdout=theirs_out)
    except OSError as e:
        link.close()
        raise LinkLost(f"starting {argv[0]}: {_why(e)}") from e
    finally:
        os.close(theirs_in)
        os.close(theirs_out)
    try:
        yield link, process
    finally:
        link.close()
        try:
            process.wait(_CHILD_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def standard_streams() -> Link:
    """Return the link to whoever started this process; from now on prints go to standard error."""
    sys.stdout.flush()
    read_fd, write_fd = os.dup(0), os.dup(1)
    os.dup2(2, 1)
    return over_fds(read_fd, write_fd, "whoever started this")


@contextlib.contextmanager
def _listening(family: int, address: object, name: str) -> Iterator[Listener]:
    with socket.socket(family, socket.SOCK_STREAM) as listening:
        if family != socket.AF_UNIX:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(address)  # type: ignore[arg-type]  # str or (host, port) by family
            listening.listen(1)
        except OSError as e:
            raise LinkLost(f"listening on {name}: {_why(e)}") from e
        yield Listener(listening, name)


def _connect(attempt: Callable[[float], socket.socket], name: str, timeout_s: float) -> Link:
    deadline = time.monotonic() + timeout_s
    while True:
        left = deadline - time.monotonic()
        try:
            return over_socket(attempt(max(left, _RETRY_S)), name)
        except OSError as e:
            if e.errno not in _NOT_YET or left <= _RETRY_S:
                raise LinkLost(f"connecting to {name}: {_why(e)}") from e
        time.sleep(_RETRY_S)


def _connected(family: int, address: str, timeout_s: float) -> socket.socket:
    connecting = socket.socket(family, socket.SOCK_STREAM)
    try:
        connecting.settimeout(timeout_s)
        connecting.connect(address)
    except BaseException:
        connecting.close()
        raise
    return connecting


def _why(error: OSError) -> str:
    if isinstance(error, TimeoutError):
        return "nothing happened in time"
    return error.strerror or str(error)
