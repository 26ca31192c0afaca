"""A link between two hosts that know nothing of each other: whoever called both passes it on.

What this end writes leaves as events of kind `link`, what the other end wrote comes in as lines of
standard input; both are base64, and an empty one is the end.
"""

from __future__ import annotations

import base64
import binascii
import os
import sys
import threading
from collections.abc import Callable
from typing import Final

from harness.migrate.connections import over_fds
from harness.migrate.links import Link

_PIECE: Final = 32 << 10

EVENT: Final = "link"


def relayed(emit: Callable[..., None], name: str) -> Link:
    """Return this end of a relayed link; it takes standard input."""
    from_other, to_us = os.pipe()
    from_us, to_other = os.pipe()
    threading.Thread(target=_take_in, args=(to_us,), name="relay in", daemon=True).start()
    threading.Thread(target=_give_out, args=(from_us, emit), name="relay out", daemon=True).start()
    return over_fds(from_other, to_other, name)


def _take_in(fd: int) -> None:
    try:
        for line in sys.stdin:
            data = base64.b64decode(line)
            while data:
                data = data[os.write(fd, data) :]
            if not line.strip():
                return
    except (BrokenPipeError, binascii.Error):
        # Whoever reads has closed the link, or will find the stream cut off.
        return
    finally:
        os.close(fd)


def _give_out(fd: int, emit: Callable[..., None]) -> None:
    data = b"-"
    while data:
        data = os.read(fd, _PIECE)
        emit(EVENT, data=base64.b64encode(data).decode("ascii"))
    os.close(fd)
