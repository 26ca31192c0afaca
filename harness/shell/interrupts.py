"""^C at the prompt: a loop of the user's ends with KeyboardInterrupt, a looping guest by a kick.

KeyboardInterrupt may only be raised in the user's own code: in the midst of the harness it would
leave a vCPU watched that does not run, or half a line on the channel. There the vCPUs are kicked in
its place, again and again, until the line at the prompt has ended.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Final

INPUT_PREFIX: Final = "<nsvm-"
"""How the file names of what was typed begin."""

_OURS: Final = ("harness", "kvm_ioctl")

_AGAIN_S: Final = 0.02


class Interrupts:
    """Takes SIGINT for the process; to be made in the main thread."""

    def __init__(self, kick: Callable[[], None]) -> None:
        """Take SIGINT over.

        Args:
            kick: stops every vCPU that runs; called in another thread.

        """
        self._kick = kick
        self._wanted = False
        self._main = threading.get_ident()
        # A signal handler may take no lock; a write to a pipe needs none.
        self._wake_reader, self._wake_writer = os.pipe()
        threading.Thread(target=self._insist, name="interrupts", daemon=True).start()
        signal.signal(signal.SIGINT, self._on_signal)

    def line_ended(self) -> None:
        """Stop kicking; what the user had asked to be interrupted is over."""
        self._wanted = False

    def _on_signal(self, _number: int, frame: FrameType | None) -> None:
        where = _innermost(frame)
        if where == "user":
            self._wanted = False
            raise KeyboardInterrupt
        if where == "harness" and not self._wanted:
            self._wanted = True
            os.write(self._wake_writer, b"\0")

    def _insist(self) -> None:
        """Kick, and look again where the main thread is, until it has stopped."""
        while os.read(self._wake_reader, 1):
            while self._wanted:
                self._kick()
                signal.pthread_kill(self._main, signal.SIGINT)
                time.sleep(_AGAIN_S)


def _innermost(frame: FrameType | None) -> str | None:
    """Return whose code is at work, `user` or `harness`; None when nothing of the user's runs."""
    found = None
    while frame is not None:
        if frame.f_code.co_filename.startswith(INPUT_PREFIX):
            return found or "user"
        if frame.f_globals.get("__name__", "").partition(".")[0] in _OURS:
            found = "harness"
        frame = frame.f_back
    return None
