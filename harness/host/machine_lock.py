"""One run at a time on a machine: a lock that says whose it is, also after its holder has died.

Standard library only: a lab machine's own side of a run takes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import json
import os
import shlex
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from harness.errors import HostError, HostUnavailable
from harness.host import kvm_parameters

#: One for the whole machine, whoever runs the harness on it.
PATH = Path("/run/lock/nsvm")

#: Environment variable: another lock of this machine, where PATH is not ours to write.
VARIABLE = "NSVM_LOCK"

#: For a run that is just ending to give the lock back.
_LOCK_S = 3.0
_REPLACE_S = 40.0

_held: set[Path] = set()


class Busy(HostUnavailable):
    """Somebody else has the lock; the message has what they wrote into it."""

    def __init__(self, path: Path, owner: Mapping[str, Any]) -> None:
        super().__init__(f"in use by {whose(owner)}; lock {path}")


def local_path() -> Path:
    """Return the lock of runs on this machine: $NSVM_LOCK, else PATH."""
    return Path(os.environ.get(VARIABLE) or PATH)


def _open_lock(path: Path) -> IO[str]:
    """Open the lock, made for all users if it is not there.

    /run/lock is sticky: where the kernel protects it (fs.protected_regular), O_CREAT on another
    user's file is refused, so that comes second.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        with contextlib.suppress(OSError):
            os.fchmod(fd, 0o666)
    return open(fd, "r+")


def _owner(lock: IO[str]) -> dict[str, Any]:
    lock.seek(0)
    try:
        said = json.loads(lock.read() or "{}")
    except ValueError:
        return {"who": "somebody who wrote no proper line"}
    return said if isinstance(said, dict) else {}


@contextmanager
def machine_lock(
    path: Path, owner: Mapping[str, Any], replaces: str = "", *, patience_s: float = _LOCK_S
) -> Iterator[dict[str, Any]]:
    """Hold the machine's lock; give what a former holder left in it, who died with it.

    Within one process it may be taken again and again: the inner ones are part of the outer one.
    `replaces` is a run of the same client: it is told to end first. Another run is waited for, for
    `patience_s` seconds.

    Raises:
        Busy: another run holds it.
        HostError: the file cannot be used.
    """
    if path in _held:
        yield {}
        return
    try:
        lock = _open_lock(path)
    except OSError as e:
        raise HostError(f"lock {path}: {e.strerror}") from e
    with lock:
        _acquire(path, lock, replaces, patience_s)
        stale = _owner(lock)
        _write(lock, {**owner, "pid": os.getpid(), "boot_id": kvm_parameters.boot_id()})
        _held.add(path)
        try:
            yield stale
        finally:
            _held.discard(path)
            _write(lock, None)


def _acquire(path: Path, lock: IO[str], replaces: str, patience_s: float) -> None:
    deadline = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            owner = _owner(lock)
        if replaces and owner.get("run") == replaces:
            with contextlib.suppress(ProcessLookupError, KeyError):
                os.kill(owner["pid"], signal.SIGTERM)
            deadline, replaces = time.monotonic() + _REPLACE_S, ""
        if time.monotonic() >= deadline:
            raise Busy(path, owner)
        time.sleep(0.1)


def _write(lock: IO[str], owner: Mapping[str, Any] | None) -> None:
    lock.seek(0)
    lock.truncate()
    if owner is not None:
        lock.write(json.dumps(dict(owner)))
    lock.flush()


def ourselves() -> dict[str, Any]:
    """Return what a lock says of who holds it."""
    return {
        "who": f"{getpass.getuser()}@{socket.gethostname()}",
        "client_pid": os.getpid(),
        "command": shlex.join(["nsvm", *sys.argv[1:]])[:200],
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def whose(owner: Mapping[str, Any]) -> str:
    """Return, in words, whose a lock is. What it says came from another machine."""
    who = str(owner.get("who", "somebody unknown"))
    more = [
        f"{label}{owner[key]}"
        for key, label in (("client_pid", "pid "), ("command", ""), ("since", "since "))
        if owner.get(key)
    ]
    text = f"{who} ({', '.join(more)})" if more else who
    return "".join(c if c.isprintable() else "?" for c in text)
