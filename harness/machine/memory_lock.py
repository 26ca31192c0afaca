"""Who may change a guest's memory when: one access at a time, and none while it is frozen."""

from __future__ import annotations

import threading
from typing import Final

from harness.machine.errors import GuestMemoryError

_LONGEST_FREEZE_S: Final = 600.0


class MemoryLock:
    """`with lock:` for the time of a change, which waits while another thread has memory frozen.

    Whoever only reads takes `lock.quick`: no access goes half to one VM and half to another, and
    nobody waits for longer than an access takes.
    """

    def __init__(self) -> None:
        self.quick: Final = threading.RLock()
        self._thawed = threading.Condition(self.quick)
        self._freezes = 0
        self._owner = 0

    def __enter__(self) -> None:
        self.quick.acquire()
        if self._freezes:
            try:
                self._wait(_LONGEST_FREEZE_S)
            except BaseException:
                self.quick.release()
                raise

    def __exit__(self, *_: object) -> None:
        self.quick.release()

    def freeze(self, timeout_s: float) -> None:
        """Keep all threads but this one from changing memory, until `thaw`; may be done again.

        Raises GuestMemoryError: another thread has frozen it for more than `timeout_s` seconds.
        """
        with self.quick:
            self._wait(timeout_s)
            self._freezes += 1
            self._owner = threading.get_ident()

    def thaw(self) -> None:
        """Take one `freeze` back, whichever thread's it was."""
        with self.quick:
            self._freezes -= 1
            self._thawed.notify_all()

    def _wait(self, timeout_s: float) -> None:
        if not self._thawed.wait_for(self._is_open, timeout_s):
            raise GuestMemoryError(f"memory was frozen by another thread for {timeout_s:g} s")

    def _is_open(self) -> bool:
        return not self._freezes or self._owner == threading.get_ident()
