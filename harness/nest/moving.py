"""Migrates a Linux guest, again and again, while it works."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Final, Self

from harness.errors import HarnessError
from harness.machine.linux_pc import LinuxPc
from harness.machine.pc import wire_pc
from harness.migrate.live_move import hand_over
from harness.migrate.state import Parts
from kvm_ioctl.asm_kvm import NestedStateFlags, kvm_nested_state

_BETWEEN_S: Final = 0.5
_END_S: Final = 120.0


class Mover:
    """Moves a machine to fresh VMs of this process, in a thread, for the time of a `with`.

    Every move goes the way of live migration: memory while the guest runs, then all state, and the
    guest goes on in the new VM; the old one is destroyed. The devices outside the kernel stay
    where they are, in this process.
    """

    def __init__(
        self, emit: Callable[..., None], pc: LinuxPc, moves: int, on_done: Callable[[], None]
    ) -> None:
        """Prepare `moves` moves; each is told as a `moved` event.

        The first is made after `begin`, and after the last one `on_done` is called.
        """
        self._emit = emit
        self._pc = pc
        self._moves = moves
        self._on_done = on_done
        self._begun = threading.Event()
        self._over = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="mover", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._over.set()
        self._begun.set()
        self._thread.join(_END_S)
        if self._thread.is_alive():
            raise HarnessError(f"a move does not end within {_END_S:g} s")
        if self._error is not None and kind is None:
            raise self._error

    def begin(self) -> None:
        """Let the moves begin."""
        self._begun.set()

    def _work(self) -> None:
        self._begun.wait()
        try:
            for number in range(1, self._moves + 1):
                if self._over.wait(_BETWEEN_S):
                    return
                self._emit("moved", number=number, **self._move())
        except BaseException as e:  # handed to whoever leaves the `with`
            self._error = e
        finally:
            if not self._over.is_set():
                self._on_done()

    def _move(self) -> dict[str, Any]:
        """Move the machine once; return figures."""
        pc = self._pc
        started = time.monotonic()
        handed = hand_over(pc, sides=lambda: {"devices": pc.device_state()})
        wire_pc(handed.received.machine.vm)
        handed.go_on()
        pc.settle()
        return {
            "downtime_s": handed.sent.downtime_s,
            "seconds": round(time.monotonic() - started, 3),
            "bytes": handed.sent.size_bytes,
            "rounds": len(handed.sent.rounds),
            "in_guest_mode": sum(map(_in_guest_mode, handed.sent.state.vcpus)),
        }


def _in_guest_mode(vcpu: Parts) -> bool:
    """Tell whether a vCPU ran L2 when it was stopped."""
    if "nested" not in vcpu:
        return False
    flags = kvm_nested_state.from_bytes(vcpu["nested"]).flags
    return bool(flags & NestedStateFlags.KVM_STATE_NESTED_GUEST_MODE)
