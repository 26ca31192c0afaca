"""A lifeline: what tells a process that the one for which it works has ended, however that ended.

A FIFO that the one holds open for writing and the other reads: nobody writes. Its end comes from
the kernel with the holder's end, also by SIGKILL, and whatever programs stand between the two; a
parent-death signal (PR_SET_PDEATHSIG) would speak only of the next one of them.
"""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from harness.errors import HostError

#: Environment variable: the FIFO, for the process that is to end with its holder.
VARIABLE = "NSVM_LIFELINE"

#: For a process that was told to end: to record what never ran, and to give its host back.
END_S = 180.0


@contextmanager
def lifeline(path: Path) -> Iterator[None]:
    """Make the FIFO, and hold it until this context, or this process, ends.

    Raises HostError: it cannot be made.
    """
    try:
        os.mkfifo(path, 0o600)
        # Read and write: opening it for writing alone waits for a reader. Not inherited, or a child
        # that lives on would hold it.
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as e:
        raise HostError(f"cannot make {path}: {e.strerror}") from e
    try:
        yield
    finally:
        os.close(fd)
        path.unlink(missing_ok=True)


def end_with_holder(end: Callable[[], None] | None = None) -> None:
    """Where the environment names a lifeline, end this process when its holder has ended.

    It is told by SIGTERM, as by a user, and killed if that is not enough within END_S seconds;
    or `end` is called instead. The variable is taken away: processes started from now on are this
    one's own affair.

    Raises HostError: the holder has ended already.
    """
    name = os.environ.pop(VARIABLE, None)
    if name is None:
        return
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as e:
        raise HostError(f"lifeline {name}: {e.strerror}: who wanted this run has ended") from e
    if not _is_held(fd):
        os.close(fd)
        raise HostError("who wanted this run has ended")
    threading.Thread(
        target=_wait, args=[fd, end or _end_this_process], name="lifeline", daemon=True
    ).start()


def _is_held(fd: int) -> bool:
    try:
        return os.read(fd, 1) != b""
    except BlockingIOError:
        return True


def _wait(fd: int, end: Callable[[], None]) -> None:
    poll = select.poll()
    # POLLHUP is always among what is reported.
    poll.register(fd, 0)
    poll.poll()
    os.close(fd)
    end()


def _end_this_process() -> None:
    # Who read them has ended, too: a broken pipe must not spoil the end.
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    os.kill(os.getpid(), signal.SIGTERM)
    threading.Event().wait(END_S)
    # What is still held elsewhere ends by itself: lab machines within their `linger_s`.
    os.kill(os.getpid(), signal.SIGKILL)
