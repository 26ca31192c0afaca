"""The user's cache: everything downloaded or built that outlives one run.

`$NSVM_CACHE`, else `$XDG_CACHE_HOME/nsvm`, else `~/.cache/nsvm`. Entries are keyed by their inputs
and appear atomically, so a run that is killed leaves no half of one behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from harness.errors import HostError


def cache_dir() -> Path:
    """Return the cache's root, created if need be."""
    explicit = os.environ.get("NSVM_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    root = Path(explicit) if explicit else Path(base) / "nsvm"
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise HostError(f"cache directory {root}: {e.strerror} (set NSVM_CACHE)") from e
    return root


@contextmanager
def locked(name: str, timeout_s: float = 600) -> Iterator[None]:
    """Hold the cache's lock called `name`; two runs never build the same entry at once.

    Raises:
        HostError: another process held it for `timeout_s` seconds, or the cache is not writable.
    """
    path = cache_dir() / "locks" / name
    try:
        path.parent.mkdir(exist_ok=True)
        lock = open(path, "w")  # noqa: SIM115
    except OSError as e:
        raise HostError(f"lock {path}: {e.strerror}") from e
    with lock:
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise HostError(f"waited {timeout_s:.0f} s for the lock {path}") from None
                time.sleep(0.05)
        yield


def build_file(path: Path, write: Callable[[Path], None]) -> Path:
    """Return `path`, made by `write(temporary)` and renamed into place if it was not there.

    Raises:
        HostError: no space, or the cache is not writable; nothing is left behind.
    """
    return _build(path, write)


def build_dir(path: Path, fill: Callable[[Path], None]) -> Path:
    """Return the directory `path`, filled by `fill(temporary)` if it was not there.

    Raises:
        HostError: no space, or the cache is not writable; nothing is left behind.
    """

    def make(temporary: Path) -> None:
        temporary.mkdir()
        fill(temporary)

    return _build(path, make)


def _build(path: Path, make: Callable[[Path], None]) -> Path:
    if path.exists():
        return path
    with locked(path.name):
        if path.exists():
            return path
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # A killed process of the same number may have left one.
            _remove(temporary)
            make(temporary)
            temporary.rename(path)
        except OSError as e:
            raise HostError(f"cannot write {path}: {e.strerror or e}") from e
        finally:
            _remove(temporary)
    return path


def _remove(path: Path) -> None:
    """Remove a file or a directory, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        # A parent that is no directory was the trouble itself, and is reported as such.
        with contextlib.suppress(NotADirectoryError):
            path.unlink(missing_ok=True)
