"""Devices that guests talk to: a serial port that collects, and the debug-exit port."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from harness.machine.device_state import taking_state
from harness.machine.guest_abi import DEBUG_EXIT_PORT, SERIAL_PORT
from kvm_ioctl.records import record

_THR, _IER, _IIR, _LCR, _MCR, _LSR, _MSR = 0, 1, 2, 3, 4, 5, 6
_LCR_DLAB = 0x80
_MCR_DTR, _MCR_RTS, _MCR_OUT1, _MCR_OUT2, _MCR_LOOP = 0x01, 0x02, 0x04, 0x08, 0x10
_IIR_NONE_PENDING = 0x01
_IIR_FIFOS = 0xC0
_FCR_ENABLE = 0x01
_IER_BITS = 0x0F
_LSR_TRANSMITTER_EMPTY = 0x60
_LSR_DATA_READY = 0x01
_MSR_CARRIER_CTS_DSR = 0xB0
_LOOPED_BACK = {_MCR_RTS: 0x10, _MCR_DTR: 0x20, _MCR_OUT1: 0x40, _MCR_OUT2: 0x80}
"""Which bit of the MSR shows which of the MCR's in loop-back mode: CTS, DSR, RI, DCD."""


class SerialPort:
    """A polled 16550 UART: what the guest prints is kept; it receives only what it loops back."""

    def __init__(self, base: int = SERIAL_PORT) -> None:
        self.base = base
        self.ports = range(base, base + 8)
        """Those that belong to it."""
        self._registers = bytearray(8)
        self._divisor = bytearray(b"\x01\x00")
        self._printed = bytearray()
        self._received: int | None = None

    @property
    def text(self) -> str:
        """Everything printed so far."""
        return self._printed.decode("utf-8", "replace")

    def printed_since(self, count: int) -> bytes:
        """Return what was printed after the first `count` bytes."""
        return bytes(self._printed[count:])

    def write(self, port: int, value: int) -> None:
        """Take a byte that the guest wrote to one of the ports."""
        register = port - self.base
        if register <= _IER and self._registers[_LCR] & _LCR_DLAB:
            self._divisor[register] = value
        elif register == _THR and self._registers[_MCR] & _MCR_LOOP:
            self._received = value
        elif register == _THR:
            self._printed.append(value)
        else:
            self._registers[register] = value & _IER_BITS if register == _IER else value

    def read(self, port: int) -> int:
        """Return the byte that the guest reads from one of the ports."""
        register = port - self.base
        if register <= _IER and self._registers[_LCR] & _LCR_DLAB:
            return self._divisor[register]
        if register == _LSR:
            ready = 0 if self._received is None else _LSR_DATA_READY
            return _LSR_TRANSMITTER_EMPTY | ready
        if register == _THR:
            received, self._received = self._received, None
            return received or 0
        if register == _IIR:
            # The same port as the FCR's, which can only be written.
            fifos = _IIR_FIFOS if self._registers[_IIR] & _FCR_ENABLE else 0
            return _IIR_NONE_PENDING | fifos
        if register == _MSR:
            return self._modem_status()
        return self._registers[register]

    def state(self) -> dict[str, Any]:
        """Return what must travel with the guest, for JSON; what it printed stays."""
        return {
            "registers": self._registers.hex(),
            "divisor": self._divisor.hex(),
            "looped_back": self._received,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Become what another one's `state` says.

        Raises MachineError: it is malformed.
        """
        with taking_state(f"UART {self.base:#x}"):
            registers, divisor = bytes.fromhex(state["registers"]), bytes.fromhex(state["divisor"])
            looped_back = state["looped_back"]
            if looped_back is not None:
                looped_back = bytes([looped_back])[0]
            self._registers[:] = registers.ljust(8, b"\0")[:8]
            self._divisor[:] = divisor.ljust(2, b"\0")[:2]
            self._received = looped_back

    def _modem_status(self) -> int:
        """Return the modem lines; drivers loop them back to find out whether there is a UART."""
        control = self._registers[_MCR]
        if not control & _MCR_LOOP:
            return _MSR_CARRIER_CTS_DSR
        return sum(shown for bit, shown in _LOOPED_BACK.items() if control & bit)


@dataclass(frozen=True)
class GuestExit:
    """The guest ended the machine by writing to DEBUG_EXIT_PORT."""

    status: int

    @property
    def exit_code(self) -> int:
        """What QEMU's isa-debug-exit would make the exit code of the process."""
        return (self.status << 1 | 1) & 0xFF


@record
class PortOut:
    """The guest wrote to a port that no device of the machine owns."""

    port: int
    size_bytes: int
    value: int

    def __str__(self) -> str:
        return f"OUT of {self.value:#x} ({self.size_bytes} bytes) to port {self.port:#x}"


class PortBus:
    """The devices of a machine behind their ports."""

    def __init__(self) -> None:
        self.serial = SerialPort()

    def out(self, port: int, size_bytes: int, data: bytes) -> list[GuestExit | PortOut]:
        """Take an OUT, or the whole of an OUTS; return what userspace should see of it."""
        if port in self.serial.ports:
            for low_byte in data[::size_bytes]:
                self.serial.write(port, low_byte)
            return []
        if len(data) == size_bytes:  # not OUTS: nearly always, and in need of no loop
            return [_port_event(port, data)]
        starts = range(0, len(data), size_bytes)
        return [_port_event(port, data[at : at + size_bytes]) for at in starts]

    def read(self, port: int, size_bytes: int) -> bytes:
        """Return what an IN reads; all ones where there is no device, as on a real bus."""
        if port in self.serial.ports:
            return self.serial.read(port).to_bytes(size_bytes, "little")
        return b"\xff" * size_bytes


def _port_event(port: int, data: bytes) -> GuestExit | PortOut:
    value = int.from_bytes(data, "little")
    return GuestExit(value) if port == DEBUG_EXIT_PORT else PortOut(port, len(data), value)
