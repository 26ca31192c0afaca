"""A 16550 UART that interrupts and receives, as a Linux console and channel need it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from harness.machine.console import SerialPort
from harness.machine.device_state import taking_state

COM1_PORT: Final = 0x3F8
COM1_IRQ: Final = 4
COM2_PORT: Final = 0x2F8
COM2_IRQ: Final = 3

_THR, _IER, _IIR, _LCR, _MCR, _LSR = 0, 1, 2, 3, 4, 5
_IER_RECEIVED, _IER_TRANSMITTER_EMPTY = 0x01, 0x02
_IIR_NONE, _IIR_TRANSMITTER_EMPTY, _IIR_RECEIVED = 0x01, 0x02, 0x04
_IIR_FIFOS, _IIR_CAUSE = 0xC0, 0x0F
_FCR_ENABLE, _FCR_CLEAR_RECEIVER = 0x01, 0x02
_LCR_DLAB = 0x80
_MCR_OUT2, _MCR_LOOP = 0x08, 0x10
_LSR_DATA_READY = 0x01


@dataclass(frozen=True)
class Line:
    """An interrupt line: its number, and who sets its level."""

    irq: int
    set_level: Callable[[int, int], None]
    """Takes the number and 0 or 1 (KVM_IRQ_LINE)."""


class Uart(SerialPort):
    """A UART with interrupts. `receive` may be called from any thread.

    It transmits at once, so its transmitter is always empty; its receiver never overruns, since
    what does not fit in the FIFO of 16 bytes waits on the line.
    """

    def __init__(self, base: int, line: Line, on_byte: Callable[[int], None] | None = None) -> None:
        """Make one.

        Args:
            base: its first port.
            line: what it interrupts by, while OUT2 is set.
            on_byte: gets every byte that the guest sends; by default they are kept (`text`).

        """
        super().__init__(base)
        self._line = line
        self._on_byte = on_byte
        self._lock = threading.Lock()
        self._queue: deque[int] = deque()
        self._fifos = False
        self._empty_pending = False
        """The transmitter became empty and nobody was told."""
        self._level = 0

    def receive(self, data: bytes) -> None:
        """Let the guest receive bytes."""
        with self._lock:
            self._queue.extend(data)
            self._update()

    def write(self, port: int, value: int) -> None:
        """Take a byte that the guest wrote to one of the ports."""
        register = port - self.base
        with self._lock:
            if register == _THR and not self._registers[_LCR] & _LCR_DLAB:
                self._transmit(value)
            elif register == _IIR:
                self._control_fifos(value)
            else:
                was_on = self._registers[_IER] & _IER_TRANSMITTER_EMPTY
                super().write(port, value)
                if self._registers[_IER] & _IER_TRANSMITTER_EMPTY and not was_on:
                    self._empty_pending = True
            self._update()

    def read(self, port: int) -> int:
        """Return the byte that the guest reads from one of the ports."""
        register = port - self.base
        with self._lock:
            looped = self._received is not None
            if register == _THR and not looped and not self._registers[_LCR] & _LCR_DLAB:
                value = self._queue.popleft() if self._queue else 0
            elif register == _IIR:
                value = self._identify()
            else:
                value = super().read(port)
                if register == _LSR and self._queue:
                    value |= _LSR_DATA_READY
            self._update()
            return value

    def drive_line(self) -> None:
        """Set the line's level once more: whoever has it may be another VM since the last time."""
        with self._lock:
            self._line.set_level(self._line.irq, self._level)

    def state(self) -> dict[str, Any]:
        """Return what must travel with the guest, for JSON; what it printed stays."""
        with self._lock:
            return {
                **super().state(),
                "received": list(self._queue),
                "fifos": self._fifos,
                "transmitter_empty": self._empty_pending,
            }

    def restore(self, state: dict[str, Any]) -> None:
        """Become what another one's `state` says; the line's level is KVM's and travels with it.

        Raises MachineError: it is malformed.
        """
        with taking_state(f"UART {self.base:#x}"), self._lock:
            received = deque(bytes(state["received"]))
            fifos, empty = bool(state["fifos"]), bool(state["transmitter_empty"])
            super().restore(state)
            self._queue, self._fifos, self._empty_pending = received, fifos, empty
            self._level = self._wanted_level()

    def _transmit(self, value: int) -> None:
        if self._registers[_MCR] & _MCR_LOOP:
            self._received = value
        elif self._on_byte is not None:
            self._on_byte(value)
        else:
            self._printed.append(value)
        self._empty_pending = True

    def _control_fifos(self, value: int) -> None:
        self._fifos = bool(value & _FCR_ENABLE)
        if value & _FCR_CLEAR_RECEIVER:
            # What waits on the line has not been received yet: a channel's bytes must not be lost.
            self._received = None

    def _identify(self) -> int:
        """Return the IIR; reading it takes the transmitter's interrupt back."""
        cause = self._cause()
        if cause == _IIR_TRANSMITTER_EMPTY:
            self._empty_pending = False
        return cause | (_IIR_FIFOS if self._fifos else 0)

    def _cause(self) -> int:
        enabled = self._registers[_IER]
        if enabled & _IER_RECEIVED and self._queue:
            return _IIR_RECEIVED
        if enabled & _IER_TRANSMITTER_EMPTY and self._empty_pending:
            return _IIR_TRANSMITTER_EMPTY
        return _IIR_NONE

    def _wanted_level(self) -> int:
        return int(self._cause() != _IIR_NONE and bool(self._registers[_MCR] & _MCR_OUT2))

    def _update(self) -> None:
        level = self._wanted_level()
        if level != self._level:
            self._level = level
            self._line.set_level(self._line.irq, level)


class UartPorts:
    """A UART on a bus of port devices."""

    def __init__(self, uart: Uart) -> None:
        self.uart = uart
        self.ports = uart.ports

    def write(self, port: int, size_bytes: int, value: int) -> None:
        """Take an OUT."""
        self.uart.write(port, value & 0xFF)

    def read(self, port: int, size_bytes: int) -> int:
        """Answer an IN."""
        return self.uart.read(port)
