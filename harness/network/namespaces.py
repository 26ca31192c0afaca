"""Network namespaces without names: unshare(2), setns(2) and a file descriptor."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from typing import Any, Final, Self, TypeVar

from harness.errors import HostError

CLONE_NEWNET: Final = 0x4000_0000
"""<linux/sched.h>"""

_END_S: Final = 60.0

T = TypeVar("T")

_libc: Final = ctypes.CDLL(None, use_errno=True)


class NetworkError(HostError):
    """A network of one's own cannot be had, or broke; the message says what refused."""


class Namespace:
    """One network namespace; a context manager.

    It lives as long as a descriptor of it, a socket made in it, or a thread in it does: as long as
    this process at most, if that hands none of them on.
    """

    def __init__(self) -> None:
        """Make one. It is empty, but for a loopback device that is down.

        Raises NetworkError: this process may not (CAP_SYS_ADMIN), or the kernel has none.
        """
        self.fd = _in_thread(_unshared)

    def run(self, function: Callable[[], T]) -> T:
        """Call a function in a thread that is inside, and return what it returns.

        Raises whatever it raises, and NetworkError: it does not return.
        """

        def inside() -> T:
            _check(_libc.setns(self.fd, CLONE_NEWNET), "setns")
            return function()

        return _in_thread(inside)

    def close(self) -> None:
        """Let go of it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _unshared() -> int:
    _check(_libc.unshare(CLONE_NEWNET), "unshare(CLONE_NEWNET)")
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def _check(status: int, what: str) -> None:
    if status != 0:
        raise NetworkError(f"{what}: {os.strerror(ctypes.get_errno())}")


def _in_thread(function: Callable[[], T]) -> T:
    """Call a function in a thread of its own: what it enters, it does not leave again."""
    done: list[T] = []
    failed: list[BaseException] = []

    def work() -> Any:
        try:
            done.append(function())
        except BaseException as e:  # raised below
            failed.append(e)

    thread = threading.Thread(target=work, name="network namespace", daemon=True)
    thread.start()
    thread.join(_END_S)
    if failed:
        raise failed[0]
    if not done:
        raise NetworkError(f"something in a network namespace takes longer than {_END_S:g} s")
    return done[0]
