"""^C at the prompt: a loop of the user's ends with KeyboardInterrupt, a looping guest by a kick.

KeyboardInterrupt may only be raised in the user's own code: in the midst of the harness it would
leave a vCPU watched that does not run, or half a line on the channel. When a signal comes there,
the vCPUs are kicked, again and again, and KeyboardInterrupt waits for the return to the user's
code; whichever comes first ends the line at the prompt.
"""

from __future__ import annotations

import os
import signal
import sys
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
        # Held while kicking; never by the signal handler, which may find anything locked.
        self._lock = threading.Lock()
        self._wake_reader, self._wake_writer = os.pipe()
        threading.Thread(target=self._insist, name="interrupts", daemon=True).start()
        signal.signal(signal.SIGINT, self._on_signal)

    def line_ended(self) -> None:
        """Stop kicking, once and for all: what the user had asked to be interrupted is over."""
        with self._lock:
            self._wanted = False
        sys.settrace(None)

    def _on_signal(self, _number: int, frame: FrameType | None) -> None:
        typed, inside = _typed_frame(frame)
        if typed is None or (frame is not None and frame.f_code is _raise_here.__code__):
            return
        if not inside:
            raise KeyboardInterrupt
        # A frame's own trace function is called only while there is one for the thread.
        sys.settrace(lambda *_: None)
        typed.f_trace = _raise_here
        if not self._wanted:
            self._wanted = True
            os.write(self._wake_writer, b"\0")

    def _insist(self) -> None:
        """Kick, and look again where the main thread is, until it has stopped."""
        while os.read(self._wake_reader, 1):
            while self._insist_once():
                time.sleep(_AGAIN_S)

    def _insist_once(self) -> bool:
        with self._lock:
            if self._wanted:
                self._kick()
                # It may have caught what a kick raised, and gone on.
                signal.pthread_kill(self._main, signal.SIGINT)
            return self._wanted


def _raise_here(frame: FrameType, event: str, _argument: object) -> None:
    """Interrupt the user's code on return to it, but for what a kick has raised already."""
    frame.f_trace = None
    sys.settrace(None)
    if event != "exception":
        raise KeyboardInterrupt


def _typed_frame(frame: FrameType | None) -> tuple[FrameType | None, bool]:
    """Return the innermost frame of what was typed, and whether the harness works inside it."""
    inside = False
    while frame is not None:
        if frame.f_code.co_filename.startswith(INPUT_PREFIX):
            return frame, inside
        inside = inside or frame.f_globals.get("__name__", "").partition(".")[0] in _OURS
        frame = frame.f_back
    return None, inside
