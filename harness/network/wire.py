"""A wire: two network namespaces, and one shaped link between them.

::

    with wire(LinkShape.parse("rate=10mbit,delay=20ms,loss=1%")) as between:
        source, destination = between.links()
        ...
        between.partition()
        between.heal()

The kernel's netem shapes where there is one. Elsewhere a process of our own does (`packets`),
packet by packet, below IP in both namespaces: TCP sees the same losses and delays.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Final, Protocol

from harness.errors import Unsupported
from harness.host.bundle import tree_root
from harness.migrate.connections import over_socket
from harness.migrate.links import Link
from harness.network import devices
from harness.network.namespaces import Namespace, NetworkError
from harness.network.needs import NetworkView, sch_netem, shaped_links
from harness.network.shape import LinkShape

# TEST-NET-1 (RFC 5737); nothing else is in these namespaces.
ADDRESSES: Final = ("192.0.2.1", "192.0.2.2")

_CONNECT_S: Final = 60.0
_ANSWER_S: Final = 10.0
# How often the kernel repeats what a closed socket still had to say. The socket keeps its namespace
# meanwhile; by default that is minutes, should the process be killed and the wire gone.
_ORPHAN_RETRIES: Final = Path("/proc/sys/net/ipv4/tcp_orphan_retries")
_RETRIES, _LAST_RETRIES = 4, 1


class Shaper(Enum):
    """Who shapes."""

    NETEM = "netem on a veth pair"
    PACKETS = "a process between two TUN devices"


def best_shaper(view: NetworkView | None = None) -> Shaper:
    """Return netem where there is one.

    Raises Unsupported: neither can be had; the message is the evidence.
    """
    looked = view or NetworkView()
    if sch_netem(looked).holds:
        return Shaper.NETEM
    found = shaped_links(looked)
    if not found.holds:
        raise Unsupported(f"no shaped links: {found.evidence} ({found.mend})")
    return Shaper.PACKETS


class Wire:
    """What `wire` gives."""

    def __init__(self, ends: tuple[Namespace, Namespace], line: _Line, shape: LinkShape) -> None:
        self.ends = ends
        self._line = line
        self._shape = shape
        self._cut = False
        line.set(shape)

    @property
    def shape(self) -> LinkShape:
        """The link as it is when it is not cut; set it to change it."""
        return self._shape

    @shape.setter
    def shape(self, shape: LinkShape) -> None:
        self._shape = shape
        self._apply()

    def partition(self) -> None:
        """Let nothing through any more, in both directions; nobody is told."""
        self._cut = True
        self._apply()

    def heal(self) -> None:
        """End the partition."""
        self._cut = False
        self._apply()

    def connect(self, timeout_s: float = _CONNECT_S) -> tuple[socket.socket, socket.socket]:
        """Return the two ends of a new TCP connection over the wire.

        Raises NetworkError: there is none within `timeout_s` seconds.
        """
        try:
            with self.ends[1].run(lambda: socket.create_server((ADDRESSES[1], 0))) as listening:
                listening.settimeout(timeout_s)
                address = listening.getsockname()
                with contextlib.ExitStack() as opened:
                    one = self.ends[0].run(lambda: socket.socket())
                    opened.callback(one.close)
                    one.settimeout(timeout_s)
                    one.connect(address)
                    other, _ = listening.accept()
                    opened.pop_all()
        except OSError as e:
            raise NetworkError(f"connecting over the wire: {e.strerror or e}") from e
        return one, other

    def links(self) -> tuple[Link, Link]:
        """Return the two ends of a new TCP connection, as `migrate` takes them.

        Raises NetworkError: there is none.
        """
        one, other = self.connect()
        return over_socket(one, "the other end"), over_socket(other, "the other end")

    def _apply(self) -> None:
        self._line.set(self._shape.cut() if self._cut else self._shape)


class _Line(Protocol):
    """What is between the namespaces."""

    def set(self, shape: LinkShape) -> None:
        """Have what is sent from now on shaped like this."""


@contextlib.contextmanager
def wire(shape: LinkShape, shaper: Shaper | None = None) -> Iterator[Wire]:
    """Lay a wire, which is gone with the `with`; so are connections over it, unless still open.

    Raises Unsupported: this machine lacks something for it.
    Raises NetworkError: the kernel refuses.
    """
    chosen = shaper or best_shaper()
    with Namespace() as one, Namespace() as other:
        lay = _netem if chosen is Shaper.NETEM else _packets
        with lay(one, other) as line:
            for where, address in zip((one, other), ADDRESSES, strict=True):
                devices.set_up(where, address)
                _set_orphan_retries(where, _RETRIES)
            try:
                yield Wire((one, other), line, shape)
            finally:
                for where in (one, other):
                    _set_orphan_retries(where, _LAST_RETRIES)


def _set_orphan_retries(where: Namespace, count: int) -> None:
    # Where it cannot be written, nothing but the namespace's end is later.
    with contextlib.suppress(OSError):
        # /proc/sys/net is that of the thread's namespace.
        where.run(lambda: _ORPHAN_RETRIES.write_text(str(count)))


class _Netem:
    def __init__(self, ends: tuple[Namespace, Namespace]) -> None:
        self._ends = ends

    def set(self, shape: LinkShape) -> None:
        for where in self._ends:
            devices.set_netem(where, shape)


@contextlib.contextmanager
def _netem(one: Namespace, other: Namespace) -> Iterator[_Netem]:
    devices.make_veth_pair(one, other)
    try:
        yield _Netem((one, other))
    finally:
        devices.remove(one)


class _Packets:
    def __init__(self, control: socket.socket) -> None:
        self._control = control

    def set(self, shape: LinkShape) -> None:
        try:
            self._control.sendall(json.dumps(shape.to_json()).encode() + b"\n")
            answer = self._control.recv(1)
        except OSError as e:
            raise NetworkError(f"the process that shapes: {e.strerror or e}") from e
        if not answer:
            raise NetworkError("the process that shapes has ended")


@contextlib.contextmanager
def _packets(one: Namespace, other: Namespace) -> Iterator[_Packets]:
    ours, theirs = socket.socketpair()
    with contextlib.ExitStack() as stack:
        stack.enter_context(ours)
        with contextlib.ExitStack() as handed:
            handed.enter_context(theirs)
            fds = [theirs.fileno()]
            for where in (other, one):
                fds.insert(0, devices.make_tun(where))
                handed.callback(os.close, fds[0])
            process = _start(fds)
        # In this order: the process ends because our end is closed.
        stack.callback(_end, process)
        stack.callback(ours.close)
        ours.settimeout(_ANSWER_S)
        yield _Packets(ours)


def _start(fds: list[int]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "harness.network.packets", *map(str, fds)],
        cwd=tree_root(),
        stdin=subprocess.DEVNULL,
        pass_fds=fds,
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(_ANSWER_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
