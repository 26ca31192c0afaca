"""The ways that a benchmark's machine takes, with a destination at the other end.

The names are those of migrate_loops.c. Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Final

from harness.bench.migrate_load import witness_of
from harness.errors import HarnessError
from harness.migrate import live
from harness.migrate.connections import over_socket, pair
from harness.migrate.links import Link
from harness.migrate.same_process import SourceEnd, ends
from kvm_ioctl.handles import Kvm

END_S: Final = 60.0
"""How long a destination may take to say what it got."""


@dataclass(frozen=True)
class Arrived:
    """What a destination got."""

    pages: int
    witness: int
    """See `witness_of`."""


Ends = tuple[Link, Callable[[], Arrived]]
"""The source's end, and what waits for the destination's word."""


def thrown_away(received: live.Received) -> Arrived:
    """Look at a machine, and close it."""
    with received.machine as machine:
        return Arrived(received.pages, witness_of(machine))


@contextlib.contextmanager
def same_process(kvm: Kvm) -> Iterator[Ends]:
    """Receive in this thread; memory is copied."""
    ours: SourceEnd[live.Received]
    ours, theirs = ends()
    with ours:
        ours.work = live.receiving(kvm, theirs)
        yield ours, lambda: thrown_away(ours.received)


@contextlib.contextmanager
def threads(kvm: Kvm) -> Iterator[Ends]:
    """Have a thread of this process receive, over a socketpair."""
    ours, theirs = pair()
    with ThreadPoolExecutor(1) as pool, ours:
        future = pool.submit(live.receive, kvm, theirs)
        # Not by that thread: looking takes long, and both have one interpreter.
        yield ours, lambda: thrown_away(future.result(END_S))


@contextlib.contextmanager
def processes(kvm: Kvm) -> Iterator[Ends]:
    """Have another process receive, over a socketpair."""
    with _destination(*socket.socketpair()) as ends:
        yield ends


@contextlib.contextmanager
def tcp(kvm: Kvm) -> Iterator[Ends]:
    """Have another process receive, over TCP on the loopback device."""
    with socket.create_server(("127.0.0.1", 0), backlog=1) as listening:
        ours = socket.create_connection(listening.getsockname(), timeout=END_S)
        listening.settimeout(END_S)
        theirs, _ = listening.accept()
    with _destination(ours, theirs) as ends:
        yield ends


LINKS: Final = {
    "same_process": same_process,
    "threads": threads,
    "processes": processes,
    "tcp": tcp,
}


@contextlib.contextmanager
def _destination(ours: socket.socket, theirs: socket.socket) -> Iterator[Ends]:
    link = over_socket(ours, "the other process")
    with link, theirs:
        child = subprocess.Popen(
            [sys.executable, "-m", "harness.bench.migrate_destination", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            # What this process imports is an archive in an emulated host.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        theirs.close()
        try:
            yield link, partial(_arrived, child)
        finally:
            child.kill()
            child.communicate(timeout=END_S)


def _arrived(child: subprocess.Popen[bytes]) -> Arrived:
    try:
        said, _ = child.communicate(timeout=END_S)
    except subprocess.TimeoutExpired as e:
        raise HarnessError(f"the destination does not end within {END_S:g} s") from e
    if child.returncode:
        raise HarnessError(f"the destination ended with {child.returncode}")
    return Arrived(**json.loads(said))
