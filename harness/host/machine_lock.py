"""One run at a time on a machine: a lock that says whose it is, also after its holder has died.

A run has it alone: it measures the machine's memory, reads the kernel's log for what its own cases
did, and sets kvm_amd's parameters. What only has a VM here for a while (`nsvm send`, `nsvm
receive`) judges by nothing of that, so any number of those share the lock, and keep runs out.

The file has a line for whoever holds it alone, or died with that, and one for each that shares it.
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
from collections.abc import Iterator, Mapping, Sequence
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

#: In the line of one that shares the lock.
_SHARES = "shares"

_held: set[Path] = set()


class Busy(HostUnavailable):
    """Somebody else has the lock; the message has what they wrote into it."""

    def __init__(self, path: Path, owners: Sequence[Mapping[str, Any]]) -> None:
        names = " and ".join(map(whose, owners))
        super().__init__(f"in use by {names}; lock {path}")


def local_path() -> Path:
    """Return the lock of runs on this machine: $NSVM_LOCK, else PATH."""
    return Path(os.environ.get(VARIABLE) or PATH)


def _open_lock(path: Path) -> IO[str]:
    """Open the lock, made for all users if it is not there.

    /run/lock is sticky: where the kernel protects it (fs.protected_regular), O_CREAT on another
    user's file is refused, so that comes second.

    Raises HostError: it cannot be used.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
            with contextlib.suppress(OSError):
                os.fchmod(fd, 0o666)
        return open(fd, "r+")
    except OSError as e:
        raise HostError(f"lock {path}: {e.strerror}") from e


def _lines(lock: IO[str]) -> list[dict[str, Any]]:
    """Return what the lines say, without those of sharers that have ended."""
    lock.seek(0)
    said = [_line(text) for text in lock.read().splitlines() if text]
    return [line for line in said if not line.get(_SHARES) or _is_there(line)]


def _line(text: str) -> dict[str, Any]:
    try:
        said = json.loads(text)
    except ValueError:
        said = None
    return said if isinstance(said, dict) else {"who": "somebody who wrote no proper line"}


def _is_there(line: Mapping[str, Any]) -> bool:
    try:
        os.kill(line["pid"], 0)
    except PermissionError:
        return True
    except (KeyError, TypeError, ValueError, OverflowError, ProcessLookupError):
        return False
    return bool(line.get("boot_id") == kvm_parameters.boot_id())


def _owner(lock: IO[str]) -> dict[str, Any]:
    """Return who has the lock alone, or died with it; empty if nobody did."""
    return next((line for line in _lines(lock) if not line.get(_SHARES)), {})


def _holders(lock: IO[str]) -> list[dict[str, Any]]:
    """Return who keeps others out: those who share it, else who has it alone."""
    lines = _lines(lock)
    return [line for line in lines if line.get(_SHARES)] or lines or [{}]


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
    with _open_lock(path) as lock:
        _acquire(path, lock, fcntl.LOCK_EX, replaces, patience_s)
        stale = _owner(lock)
        _write(lock, _ours(owner))
        _held.add(path)
        try:
            yield stale
        finally:
            _held.discard(path)
            _write(lock, None)


@contextmanager
def shared_machine_lock(
    path: Path, owner: Mapping[str, Any], *, patience_s: float = _LOCK_S
) -> Iterator[None]:
    """Share the machine's lock with all that share it; no run has it meanwhile, and none begins.

    What a run that died left in it stays there for the next run, which cleans up.

    Raises:
        Busy: a run has it, for longer than `patience_s` seconds.
        HostError: the file cannot be used.
    """
    if path in _held:
        yield
        return
    with _open_lock(path) as lock:
        _acquire(path, lock, fcntl.LOCK_SH, "", patience_s)
        # One write(2) at the end of the file: nobody's line is lost by another's.
        line = json.dumps({**_ours(owner), _SHARES: True})
        os.write(_appending(lock), f"\n{line}\n".encode())
        try:
            yield
        finally:
            _leave(lock)


def _ours(owner: Mapping[str, Any]) -> dict[str, Any]:
    return {**owner, "pid": os.getpid(), "boot_id": kvm_parameters.boot_id()}


def _appending(lock: IO[str]) -> int:
    fd = lock.fileno()
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_APPEND)
    return fd


def _leave(lock: IO[str]) -> None:
    """Remove the lines of those who shared it, if nobody does any more."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return  # the others' lines are needed, and ours is known by its process
    _write(lock, _owner(lock) or None)


def _acquire(path: Path, lock: IO[str], how: int, replaces: str, patience_s: float) -> None:
    deadline = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(lock, how | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            holders = _holders(lock)
        if replaces and holders[0].get("run") == replaces:
            with contextlib.suppress(ProcessLookupError, KeyError):
                os.kill(holders[0]["pid"], signal.SIGTERM)
            deadline, replaces = time.monotonic() + _REPLACE_S, ""
        if time.monotonic() >= deadline:
            raise Busy(path, holders)
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
