"""Shaping in a process of our own, for kernels without netem: packets between two TUN devices.

Run as ``python -m harness.network.packets FD FD CONTROL``: the devices, and a socket from which the
shape comes as a line of JSON, first of all and then whenever it changes; each is answered by an
empty line. The process ends with that socket's other end, so it never outlives who started it.

What happens to a packet is what netem does to it: it is lost, or duplicated, or both not; waits
until those before it have been sent at the link's rate; and is delayed, or overtakes.
"""

from __future__ import annotations

import heapq
import json
import os
import random
import select
import signal
import socket
import sys
import time
from typing import Final

from harness.network.shape import LinkShape

_PACKET: Final = 64 << 10
_AT_ONCE: Final = 64


class Direction:
    """Packets on their way from one device to the other."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._waiting: list[tuple[float, int, bytes]] = []
        self._number = 0
        self._free_at = 0.0

    def take(self, packet: bytes, shape: LinkShape, now: float) -> None:
        """Take a packet at a time (seconds of a monotonic clock)."""
        copies = 1 + self._happens(shape.duplicate) - self._happens(shape.loss)
        for _ in range(copies):
            if len(self._waiting) >= shape.limit_packets:
                return
            heapq.heappush(self._waiting, (self._due(packet, shape, now), self._number, packet))
            self._number += 1

    def due(self, now: float) -> list[bytes]:
        """Return the packets whose time has come, in their order."""
        found = []
        while self._waiting and self._waiting[0][0] <= now:
            found.append(heapq.heappop(self._waiting)[2])
        return found

    @property
    def next_at(self) -> float | None:
        """When the next packet is due, if there is one."""
        return self._waiting[0][0] if self._waiting else None

    def _due(self, packet: bytes, shape: LinkShape, now: float) -> float:
        sent_at = now
        if shape.rate_bit_s is not None:
            self._free_at = max(self._free_at, now) + len(packet) * 8 / shape.rate_bit_s
            sent_at = self._free_at
        if self._happens(shape.reorder):
            return sent_at
        return sent_at + shape.delay_s + self._chance.uniform(-1, 1) * shape.jitter_s

    def _happens(self, probability: float) -> bool:
        return self._chance.random() < probability


class _Forwarder:
    """The two devices, and the socket from which the shape comes."""

    def __init__(self, fds: tuple[int, int], control: socket.socket) -> None:
        self._ways = {
            fds[0]: (fds[1], Direction(random.Random())),
            fds[1]: (fds[0], Direction(random.Random())),
        }
        self._control = control
        self._orders = control.makefile("rb")
        self._shape = LinkShape()

    def run(self) -> None:
        """Forward until nobody holds the other end of the control socket."""
        while self._obey():
            self._forward_until_told()

    def _obey(self) -> bool:
        line = self._orders.readline()
        if line:
            self._shape = LinkShape.from_json(json.loads(line))
            self._control.sendall(b"\n")
        return bool(line)

    def _forward_until_told(self) -> None:
        while True:
            told = self._control.fileno()
            ready, _, _ = select.select([told, *self._ways], [], [], self._patience())
            if told in ready:
                return
            for fd in ready:
                self._take_in(fd)
            self._give_out()

    def _patience(self) -> float | None:
        times = [way.next_at for _, way in self._ways.values() if way.next_at is not None]
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _take_in(self, fd: int) -> None:
        way = self._ways[fd][1]
        for _ in range(_AT_ONCE):
            try:
                packet = os.read(fd, _PACKET)
            except BlockingIOError:
                return
            way.take(packet, self._shape, time.monotonic())

    def _give_out(self) -> None:
        now = time.monotonic()
        for target, way in self._ways.values():
            for packet in way.due(now):
                try:
                    os.write(target, packet)
                except OSError:
                    # A device that is down or full has lost the packet, as devices do.
                    continue


def main() -> None:
    """Forward packets; the arguments are file descriptors."""
    # ^C at a terminal is meant for who started this.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    one, other, control = map(int, sys.argv[1:])
    _Forwarder((one, other), socket.socket(fileno=control)).run()


if __name__ == "__main__":
    main()
