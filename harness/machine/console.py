"""Devices that guests talk to: a serial port that collects, and the debug-exit port."""

from __future__ import annotations

from dataclasses import dataclass

from harness.machine.guest_abi import DEBUG_EXIT_PORT, SERIAL_PORT

_THR, _IER, _IIR, _LCR, _LSR, _MSR = 0, 1, 2, 3, 5, 6
_LCR_DLAB = 0x80
_IIR_NONE_PENDING = 0x01
_LSR_TRANSMITTER_EMPTY = 0x60
_MSR_CARRIER_CTS_DSR = 0xB0


class SerialPort:
    """A polled 8250 UART: what the guest prints is kept, there is never anything to read."""

    def __init__(self, base: int = SERIAL_PORT) -> None:
        self.base = base
        self._registers = bytearray(8)
        self._divisor = bytearray(b"\x01\x00")
        self._printed = bytearray()

    @property
    def text(self) -> str:
        """Everything printed so far."""
        return self._printed.decode("utf-8", "replace")

    def owns(self, port: int) -> bool:
        """Tell whether a port is one of the UART's eight."""
        return self.base <= port < self.base + 8

    def write(self, port: int, value: int) -> None:
        """Take a byte that the guest wrote to one of the ports."""
        register = port - self.base
        if register <= _IER and self._registers[_LCR] & _LCR_DLAB:
            self._divisor[register] = value
        elif register == _THR:
            self._printed.append(value)
        else:
            self._registers[register] = value

    def read(self, port: int) -> int:
        """Return the byte that the guest reads from one of the ports."""
        register = port - self.base
        if register <= _IER and self._registers[_LCR] & _LCR_DLAB:
            return self._divisor[register]
        constant = {
            _THR: 0,
            _IIR: _IIR_NONE_PENDING,
            _LSR: _LSR_TRANSMITTER_EMPTY,
            _MSR: _MSR_CARRIER_CTS_DSR,
        }
        return constant.get(register, self._registers[register])


@dataclass(frozen=True)
class GuestExit:
    """The guest ended the machine by writing to DEBUG_EXIT_PORT."""

    status: int

    @property
    def exit_code(self) -> int:
        """What QEMU's isa-debug-exit would make the exit code of the process."""
        return (self.status << 1 | 1) & 0xFF


@dataclass(frozen=True)
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
        seen: list[GuestExit | PortOut] = []
        for at in range(0, len(data), size_bytes):
            value = int.from_bytes(data[at : at + size_bytes], "little")
            if self.serial.owns(port):
                self.serial.write(port, value & 0xFF)
            elif port == DEBUG_EXIT_PORT:
                seen.append(GuestExit(value))
            else:
                seen.append(PortOut(port, size_bytes, value))
        return seen

    def read(self, port: int, size_bytes: int) -> bytes:
        """Return what an IN reads; all ones where there is no device, as on a real bus."""
        if self.serial.owns(port):
            return self.serial.read(port).to_bytes(size_bytes, "little")
        return b"\xff" * size_bytes
