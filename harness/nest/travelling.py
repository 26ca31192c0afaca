"""A Linux guest that two processes hand to each other while it works, by live migration.

The one that has the machine runs it, answers its channel and console, and does what it is told:
send it an SMI, or send it to the other process over a UNIX socket. Both are children of the process
that has the guest's session, which notices nothing but a pause.
"""

from __future__ import annotations

import json
import os
import queue
import select
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, Self

from harness.errors import HostError, HostLost, ScenarioFailure
from harness.host.session import Session
from harness.machine.linux_pc import LinuxPc
from harness.machine.smi_counter import Way
from harness.migrate import live
from harness.migrate.connections import Listener, connect_unix, listen_unix
from harness.nest.guest import Console
from harness.nest.running import ChannelLines, LinuxSpec, RunningPc, build_pc
from harness.qemu_vmm.errors import VmmLost
from harness.storm.figures import figures
from harness.storm.processes import Processes, Reporter
from kvm_ioctl.handles import Kvm

_MOVE_S: Final = 300.0
"""So long a move may take at most."""
_ANSWER_S: Final = 60.0
_END_S: Final = 10.0
_CONSOLE_PIECE: Final = 500
"""Characters: a report is shorter than PIPE_BUF, even if each takes six bytes."""
_PIECE: Final = 1 << 16
_LOOK_S: Final = 1.0

_DEVICES: Final = "devices"
_MOVE, _SMI, _COUNTS = "move", "smi", "counts"


class TravellingGuest:
    """A Linux in one of two processes; a context manager."""

    def __init__(self, spec: LinuxSpec, on_console: Callable[[str], None]) -> None:
        """Fork the processes; the first of them builds the machine and lets it boot.

        To be made before this process has threads.

        Args:
            spec: what is wanted.
            on_console: gets what it prints on its console.

        """
        self.name = spec.name
        self._why = ""
        """What ended it."""
        self._whose: type[HostLost] = HostLost
        """How that is told: by the guest and KVM, or by what runs them."""
        self._closing = False
        self._console = Console(on_console)
        self._answers: queue.Queue[Mapping[str, Any]] = queue.Queue()
        self._order_lock = threading.Lock()
        self._directory = tempfile.TemporaryDirectory(prefix="nsvm-nest-")
        self._ours, channel = socket.socketpair()
        self._orders, orders = socket.socketpair()
        places = [Path(self._directory.name, name) for name in ("one", "other")]
        mine = (self._ours, self._orders)
        homes = [_Home(spec, index, places, channel, orders, mine) for index in range(2)]
        self._processes = Processes([home.live for home in homes], spec.name)
        self._processes.__enter__()
        # Their ends are the processes' alone: when these are gone, this one shall know.
        channel.close()
        orders.close()
        self._life_s = spec.life_s
        self.session = Session(_SocketPipe(self._ours), self._why_dead, spec.silence_s)
        self._watcher = threading.Thread(target=self._watch, name="reports", daemon=True)
        self._watcher.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the machine, and the processes."""
        self._closing = True
        self._processes.kill()
        self._watcher.join(_END_S)
        try:
            self._processes.__exit__()
        finally:
            self._ours.close()
            self._orders.close()
            self._directory.cleanup()

    @property
    def last_words(self) -> str:
        """The end of its console."""
        return self._console.last_words

    def move(self) -> dict[str, Any]:
        """Have the process that has the machine send it to the other; return figures.

        Raises ScenarioFailure: KVM refused to go on, or the guest is gone.
        Raises HostError: a process died, or it took too long.
        """
        return self._order(_MOVE_S, do=_MOVE)

    def smi(self, index: int, way: Way, timeout_s: float) -> dict[str, Any]:
        """Send a vCPU an SMI; return what `CountedSmi` has.

        Raises ScenarioFailure: it was not taken.
        """
        return self._order(
            timeout_s + _ANSWER_S, do=_SMI, index=index, way=way.value, timeout_s=timeout_s
        )

    def counts(self) -> dict[str, int]:
        """Return KVM's statistics of it; empty where there are none."""
        return self._order(_ANSWER_S + _MOVE_S, do=_COUNTS)

    def _order(self, within_s: float, **order: Any) -> dict[str, Any]:
        """Have an order done by the process that has the machine; return its answer."""
        with self._order_lock:
            if not self._why:
                self._orders.sendall(json.dumps(order).encode() + b"\n")
            deadline = time.monotonic() + within_s
            while time.monotonic() < deadline and not (self._why and self._answers.empty()):
                try:
                    answer = self._answers.get(timeout=min(1.0, within_s))
                except queue.Empty:
                    continue
                return dict(answer["answer"])
        what = f"{self.name}: {order['do']}: {self._why or f'no answer in {within_s:g} s'}"
        raise ScenarioFailure(what) if self._is_failure else HostError(what)

    @property
    def _is_failure(self) -> bool:
        return bool(self._why) and self._whose is HostLost

    def _watch(self) -> None:
        """Take the processes' reports until they are gone."""
        try:
            self._processes.watch(
                self._take, until=lambda: bool(self._why), silence_s=self._life_s + _MOVE_S
            )
        except HostError as e:
            if not self._why:
                self._why, self._whose = str(e), VmmLost
        if not self._closing:
            # Whoever waits for the agent learns of it.
            self._ours.shutdown(socket.SHUT_RDWR)

    def _take(self, event: Mapping[str, Any]) -> None:
        if "console" in event:
            self._console.take(event["console"])
        elif "answer" in event:
            self._answers.put(event)
        elif "error" in event:
            self._whose = HostLost if event["failure"] else VmmLost
            self._why = str(event["error"])
        elif "ended" in event:
            self._why = str(event["ended"])

    def _why_dead(self, reason: str) -> HostLost:
        self._watcher.join(1.0)
        return self._whose(f"{self.name} is lost: {self._why or reason}", self.last_words)


class _SocketPipe:
    """The channel, as a session has it."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    def fileno(self) -> int:
        """Return the descriptor to poll."""
        return self._socket.fileno()

    def receive(self) -> bytes:
        """Return what is there; empty at the end."""
        return self._socket.recv(_PIECE)

    def transmit(self, data: bytes) -> None:
        """Send all of it."""
        self._socket.sendall(data)


# In the two processes


class _Home:
    """One of the two: it has the machine, or waits for it."""

    def __init__(
        self,
        spec: LinuxSpec,
        index: int,
        places: list[Path],
        channel: socket.socket,
        orders: socket.socket,
        others: tuple[socket.socket, ...],
    ) -> None:
        self._others = others
        self._spec = spec
        self._index = index
        self._places = places
        self._channel = channel
        self._orders = orders
        self._parent = os.getpid()
        self._until = time.monotonic() + spec.life_s

    def live(self, report: Reporter) -> None:
        """Take part until the other end of the orders is gone."""
        for inherited in self._others:
            # Or that end would be here, too, and never go.
            inherited.close()
        with Kvm() as kvm, listen_unix(self._places[self._index]) as listener:
            stay = self._begin(kvm, report) if self._index == 0 else None
            while True:
                if stay is None:
                    self._await(listener)
                    stay = self._receive(kvm, listener, report)
                order = self._next_order()
                if order is None:
                    return
                answer = stay.obey(order, self._places[1 - self._index])
                if order["do"] == _MOVE:
                    stay = None
                report(answer=answer)

    def _begin(self, kvm: Kvm, report: Reporter) -> _Stay:
        lines = ChannelLines(self._channel.fileno())
        return self._stay(build_pc(kvm, self._spec, lines.take), lines, report)

    def _await(self, listener: Listener) -> None:
        """Wait for the other process to come, as long as there is one to report to.

        Raises HostError: that one is gone.
        """
        while not select.select([listener.listening], [], [], _LOOK_S)[0]:
            if os.getppid() != self._parent:
                raise HostError(f"{self._spec.name}: nobody waits for it any more")

    def _receive(self, kvm: Kvm, listener: Listener, report: Reporter) -> _Stay:
        received = live.receive(kvm, listener.accept())
        lines = ChannelLines(self._channel.fileno())
        pc = LinuxPc.adopt(received.machine, received.sides[_DEVICES], lines.take)
        return self._stay(pc, lines, report)

    def _stay(self, pc: LinuxPc, lines: ChannelLines, report: Reporter) -> _Stay:
        return _Stay(pc, lines, self._channel, report, max(self._until - time.monotonic(), 1.0))

    def _next_order(self) -> dict[str, Any] | None:
        """Return the next order; None: there will be none."""
        data = b""
        # Byte by byte: what comes after it may be for the other process.
        while not data.endswith(b"\n"):
            byte = self._orders.recv(1)
            if not byte:
                return None
            data += byte
        order: dict[str, Any] = json.loads(data)
        return order


class _Stay:
    """The machine's stay in this process."""

    def __init__(
        self,
        pc: LinuxPc,
        lines: ChannelLines,
        channel: socket.socket,
        report: Reporter,
        life_s: float,
    ) -> None:
        self._pc = pc
        self._lines = lines
        self._channel = channel
        self._report = report
        self._leaving = False
        self._wake, self._waker = os.pipe()
        self._feeder = threading.Thread(target=self._feed, name="channel", daemon=True)
        self._running = RunningPc(pc, life_s, self._print, self._tell_end)
        self._feeder.start()

    def obey(self, order: Mapping[str, Any], other: Path) -> dict[str, Any]:
        """Do what is ordered; return the answer."""
        if order["do"] == _MOVE:
            return self._leave_for(other)
        if order["do"] == _SMI:
            smi = self._running.smi(order["index"], Way(order["way"]), order["timeout_s"])
            return asdict(smi)
        return self._running.counts()

    def _leave_for(self, place: Path) -> dict[str, Any]:
        started = time.monotonic()
        sent = live.send(
            self._pc,
            connect_unix(place),
            sides=lambda: {_DEVICES: self._device_state()},
            stop=self._stop_feeding,
        )
        self._leaving = True
        sent.abandon()
        self._running.close()
        for fd in (self._wake, self._waker):
            os.close(fd)
        return {**figures(sent), "seconds": round(time.monotonic() - started, 3)}

    def _device_state(self) -> dict[str, Any]:
        # The vCPUs stand still: all that the guest has sent is out before the other one goes on.
        self._lines.flush()
        return self._pc.device_state()

    def _feed(self) -> None:
        """Give the guest what comes by its channel."""
        while True:
            ready, _, _ = select.select([self._channel.fileno(), self._wake], [], [])
            if self._wake in ready:
                return
            data = self._channel.recv(_PIECE)
            if not data:
                return
            self._pc.com2.receive(data)

    def _stop_feeding(self) -> None:
        os.write(self._waker, b"!")
        self._feeder.join(_END_S)

    def _print(self, text: str) -> None:
        for at in range(0, len(text), _CONSOLE_PIECE):
            self._report(console=text[at : at + _CONSOLE_PIECE])

    def _tell_end(self) -> None:
        if not self._leaving:
            self._report(ended=self._running.why_ended or "it ended")
