"""Tells now and then that a guest is alive: what KVM counted of its vCPUs since the last time."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Final, Self

from harness.errors import NsvmError
from harness.nest.guest import Guest

COUNTED: Final = ("exits", "io_exits", "mmio_exits", "irq_injections", "nested_run", "halt_exits")
"""Of KVM's statistics of a vCPU (struct kvm_vcpu_stat); `nested_run` is VMRUNs of its own."""

_EVERY_S: Final = 15.0
_END_S: Final = 10.0


class Pulse:
    """Emits a `pulse` event every 15 s for the time of a `with`; none where KVM counts nothing."""

    def __init__(self, emit: Callable[..., None], level: int, guest: Guest) -> None:
        self._emit = emit
        self._level = level
        self._guest = guest
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="pulse", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(_END_S)

    def _work(self) -> None:
        last = self._counts()
        while last and not self._over.wait(_EVERY_S) and (now := self._counts()):
            # After a move the new VM's counts begin at 0.
            per_s = {name: max(now[name] - last[name], 0) / _EVERY_S for name in COUNTED}
            self._emit("pulse", level=self._level, **{k: round(v, 1) for k, v in per_s.items()})
            last = now

    def _counts(self) -> Counter[str]:
        counts: Counter[str] = Counter()
        # One that died says so itself.
        with suppress(NsvmError, OSError):
            counts.update({k: v for k, v in self._guest.counts().items() if k in COUNTED})
        return counts
