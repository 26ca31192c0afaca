"""A guest's console: read by pexpect, kept, handed on line by line, watched for a panic."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable
from typing import Any, Final

_PANIC: Final = re.compile(r"((?:Kernel panic - not syncing|nsvm-init:)[^\r\n]*)\r?\n")
_LAST_LINES: Final = 25
_WINDOW: Final = 512
"""Of what is searched again with every piece that comes; longer than a line."""


class ConsoleWatch:
    """Reads the consoles of one guest, one QEMU's after the other's."""

    def __init__(self, on_text: Callable[[str], None], life_s: float) -> None:
        """Hand whole lines to `on_text`; read no console for longer than `life_s`."""
        self.panic = ""
        """The kernel's own last words, if it had any."""
        self._on_text = on_text
        self._life_s = life_s
        self._text = ""
        self._told = 0
        # While the guest moves there are two consoles.
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []

    @property
    def last_words(self) -> str:
        """The end of what was printed."""
        lines = [line.rstrip() for line in self._text.splitlines()]
        return "\n".join(lines[-_LAST_LINES:])

    def read(self, console: socket.socket) -> None:
        """Read this one until it ends, and close it."""
        thread = threading.Thread(target=self._read, args=(console,), name="console", daemon=True)
        self._threads.append(thread)
        thread.start()

    def close(self, timeout_s: float) -> None:
        """Wait for the end of all consoles, whose QEMUs are gone."""
        for thread in self._threads:
            thread.join(timeout_s)
        self._tell(whole_lines=False)

    # What pexpect logs to.

    def write(self, text: str) -> None:
        """Take a piece."""
        with self._lock:
            self._text += text
        if "\n" in text:
            self._tell()

    def flush(self) -> None:
        """Nothing waits."""

    def _tell(self, *, whole_lines: bool = True) -> None:
        """Hand on what was not yet; bytes come one by one, and an event for each is too much."""
        with self._lock:
            end = self._text.rfind("\n") + 1 if whole_lines else len(self._text)
            new, self._told = self._text[self._told : end], max(end, self._told)
        if new:
            self._on_text(new)

    def _read(self, console: socket.socket) -> None:
        # Here, not above: only a host that runs QEMU has it.
        import pexpect
        from pexpect.fdpexpect import fdspawn

        log: Any = self
        with console:
            child = fdspawn(console.fileno(), encoding="utf-8", codec_errors="replace")
            child.logfile_read = log
            while self._finds_panic(child, [_PANIC, pexpect.EOF, pexpect.TIMEOUT]):
                pass

    def _finds_panic(self, child: Any, patterns: list[Any]) -> bool:
        """Read on until the kernel panics, or there is no more; tell which."""
        if child.expect(patterns, timeout=self._life_s, searchwindowsize=_WINDOW):
            return False
        self.panic = self.panic or child.match.group(1)
        return True
