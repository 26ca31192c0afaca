"""The devices of a PC behind their ports, apart from those in the kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

from harness.machine.console import GuestExit, PortBus, PortOut
from harness.machine.device_state import taking_state


class PortDevice(Protocol):
    """A device that owns ports; values are numbers of `size_bytes` bytes."""

    @property
    def ports(self) -> range:
        """What it answers to."""

    def write(self, port: int, size_bytes: int, value: int) -> None:
        """Take an OUT."""

    def read(self, port: int, size_bytes: int) -> int:
        """Answer an IN."""


class LatchPorts:
    """The port part of QEMU's pc-testdev: a latch, and the levels of the interrupt lines.

    There is nothing to do for its port 0xe4, which makes QEMU drop a page's translation.
    """

    ports: Final = range(0xE0, 0xE8)

    def __init__(self) -> None:
        self._latch = bytearray(4)

    def write(self, port: int, size_bytes: int, value: int) -> None:
        """Keep what is written to the first four ports."""
        for at, byte in enumerate(value.to_bytes(size_bytes, "little"), port - self.ports.start):
            if at < len(self._latch):
                self._latch[at] = byte

    def read(self, port: int, size_bytes: int) -> int:
        """Return what was last written to these ports."""
        at = port - self.ports.start
        return int.from_bytes(self._latch[at : at + size_bytes].ljust(size_bytes, b"\0"), "little")

    def state(self) -> dict[str, Any]:
        """Return what must travel with the guest, for JSON."""
        return {"latch": self._latch.hex()}

    def restore(self, state: dict[str, Any]) -> None:
        """Become what another one's `state` says.

        Raises MachineError: it is malformed.
        """
        with taking_state("pc-testdev"):
            latch = bytes.fromhex(state["latch"])
            if len(latch) != len(self._latch):
                raise ValueError(f"{len(latch)} bytes")
            self._latch[:] = latch


class IrqLines:
    """The other part of pc-testdev: port 0x2000 + n sets the level of line n."""

    ports: Final = range(0x2000, 0x2018)

    def __init__(self, set_level: Callable[[int, int], None]) -> None:
        self._set_level = set_level

    def write(self, port: int, size_bytes: int, value: int) -> None:
        """Raise or lower a line."""
        self._set_level(port - self.ports.start, int(value != 0))

    def read(self, port: int, size_bytes: int) -> int:
        """Lines cannot be read."""
        return 0


class KeyboardController:
    """An 8042 without a keyboard: its buffers are empty."""

    ports: Final = range(0x60, 0x65, 4)
    _STATUS: Final = 0x64
    _SYSTEM_FLAG: Final = 0x04

    def write(self, port: int, size_bytes: int, value: int) -> None:
        """Nothing comes of it; `is_reset` knows the command that counts."""

    def read(self, port: int, size_bytes: int) -> int:
        """Return the status, or the last byte received: none."""
        return self._SYSTEM_FLAG if port == self._STATUS else 0


class SystemControl:
    """Port 0x92: the A20 gate, always open."""

    ports: Final = range(0x92, 0x93)
    _A20: Final = 0x02

    def write(self, port: int, size_bytes: int, value: int) -> None:
        """Nothing comes of it; `is_reset` knows the bit that counts."""

    def read(self, port: int, size_bytes: int) -> int:
        """Say that A20 is open."""
        return self._A20


def is_reset(port: int, size_bytes: int, value: int) -> bool:
    """Tell whether an OUT resets a PC: by the 8042, port 0x92, or the chip set's port 0xcf9."""
    if size_bytes != 1:
        return False
    pulses_reset_line = port == 0x64 and value & 0xF1 == 0xF0
    return (
        pulses_reset_line or (port == 0x92 and value & 1 == 1) or (port == 0xCF9 and value & 4 > 0)
    )


class PcBus(PortBus):
    """Writes to ports that no device has are lost; reads of them give all ones.

    What userspace gets to see: `GuestExit`, and as `PortOut` a write that resets a PC.
    """

    def __init__(self, devices: Sequence[PortDevice]) -> None:
        super().__init__()
        self._by_port = {port: device for device in devices for port in device.ports}

    def out(self, port: int, size_bytes: int, data: bytes) -> list[GuestExit | PortOut]:
        """Take an OUT, or the whole of an OUTS."""
        seen: list[GuestExit | PortOut] = []
        for event in super().out(port, size_bytes, data):
            if isinstance(event, GuestExit) or is_reset(port, size_bytes, event.value):
                seen.append(event)
            elif device := self._by_port.get(port):
                device.write(port, size_bytes, event.value)
        return seen

    def read(self, port: int, size_bytes: int) -> bytes:
        """Return what an IN reads."""
        device = self._by_port.get(port)
        if device is None:
            return super().read(port, size_bytes)
        return device.read(port, size_bytes).to_bytes(size_bytes, "little")
