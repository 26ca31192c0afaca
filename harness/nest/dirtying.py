"""Keeps memory changing while something else is done: pages that a migration has to send again."""

from __future__ import annotations

import struct
import threading
from typing import Final, Self

from harness.errors import HarnessError, ScenarioFailure

MEMORY_BYTES: Final = 8 << 20
_BLOCK_BYTES: Final = 64 << 10
_PAUSE_S: Final = 0.005
"""Between blocks, for the others' sake."""
_END_S: Final = 60.0


class Dirtying:
    """Writes to its memory in a thread for the time of a `with`, and checks what it wrote before.

    Every block has the number of its pass all over it; what is lost, or comes back from an earlier
    pass, is noticed when its turn comes again.
    """

    def __init__(self) -> None:
        self._memory = bytearray(MEMORY_BYTES)
        self._over = threading.Event()
        self._wrong = ""
        self.passes = 0
        """Over all of the memory, that were completed."""
        self._thread = threading.Thread(target=self._work, name="dirtying", daemon=True)

    def __enter__(self) -> Self:
        for block in range(0, MEMORY_BYTES, _BLOCK_BYTES):
            self._write(block)
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """End it.

        Raises ScenarioFailure: memory was not as it was left.
        """
        self._over.set()
        self._thread.join(_END_S)
        if kind is not None:
            return
        if self._thread.is_alive():
            raise HarnessError(f"dirtying memory does not end within {_END_S:g} s")
        if self._wrong:
            raise ScenarioFailure(self._wrong)

    def _work(self) -> None:
        while not self._wrong:
            for block in range(0, MEMORY_BYTES, _BLOCK_BYTES):
                if self._over.wait(_PAUSE_S):
                    return
                self._check(block)
                self._write(block, passed=1)
            self.passes += 1

    def _write(self, block: int, passed: int = 0) -> None:
        self._memory[block : block + _BLOCK_BYTES] = _content(block, self.passes + passed)

    def _check(self, block: int) -> None:
        if self._memory[block : block + _BLOCK_BYTES] != _content(block, self.passes):
            what = f"memory that is written again and again: block {block:#x}"
            self._wrong = f"{what} is not as pass {self.passes} left it"


def _content(block: int, number: int) -> bytes:
    return struct.pack("<QQ", block, number) * (_BLOCK_BYTES // 16)
