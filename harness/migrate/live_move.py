"""Moving a machine within this process the way that live migration does."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from harness.errors import HarnessError
from harness.machine.machine import Machine
from harness.migrate import same_process
from harness.migrate.links import Cancel, Link
from harness.migrate.live import Received, Sent, Sides, receive, receiving, send
from harness.migrate.orders import DEFAULT
from harness.migrate.precopy import Options
from harness.migrate.same_process import SourceEnd
from kvm_ioctl.handles import Kvm

_END_S = 30.0


@dataclass(frozen=True)
class Handed:
    """A machine on both sides; the source's is still paused."""

    sent: Sent
    received: Received

    def go_on(self) -> None:
        """Have the source's users go on with the destination's VM; the old one is closed."""
        self.sent.exchange(self.received.machine)
        self.received.machine.close()


def hand_over(
    machine: Machine,
    *,
    sides: Sides | None = None,
    options: Options | None = None,
    order: Sequence[str] = DEFAULT,
    links: tuple[Link, Link] | None = None,
) -> Handed:
    """Send a machine, and receive it. `go_on` is to be called, or both closed.

    By default this thread does both, and copies memory (`same_process`); with `links`, the two ends
    of one, another thread receives. The new VM has dirty rings if the old one has.

    Raises whatever `live.send` and `live.receive` do; the source's error first.
    """
    rings = machine.dirty_rings
    dirty_ring_bytes = rings.size_bytes if rings else 0
    if links is None:
        source: SourceEnd[Received]
        source, destination = same_process.ends()
        source.work = receiving(
            machine.kvm, destination, order=order, dirty_ring_bytes=dirty_ring_bytes
        )
        sent = send(machine, source, sides=sides, options=options)
        return Handed(sent, source.received)
    ours, theirs = links
    receiver = _Receiver(machine.kvm, theirs, order, dirty_ring_bytes)
    receiver.start()
    try:
        sent = send(machine, ours, sides=sides, options=options)
    except BaseException:
        receiver.throw_away()
        raise
    return Handed(sent, receiver.result())


class _Receiver:
    """The destination, in a thread."""

    def __init__(self, kvm: Kvm, link: Link, order: Sequence[str], dirty_ring_bytes: int) -> None:
        self._cancel = Cancel()
        self._received: Received | None = None
        self._error: BaseException | None = None

        def work() -> None:
            try:
                self._received = receive(
                    kvm, link, order=order, dirty_ring_bytes=dirty_ring_bytes, cancel=self._cancel
                )
            except BaseException as e:  # handed to whoever asks for the result
                self._error = e

        self._thread = threading.Thread(target=work, name="receiver", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def result(self) -> Received:
        """Return the machine, or raise what was raised."""
        self._thread.join(_END_S)
        if self._error is not None:
            raise self._error
        if self._received is None:
            raise HarnessError(f"the receiver does not end within {_END_S:g} s")
        return self._received

    def throw_away(self) -> None:
        """End it; close what it has."""
        self._cancel.set()
        self._thread.join(_END_S)
        if self._received is not None:
            self._received.machine.close()
