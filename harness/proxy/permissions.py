"""Permission maps of a VMCB: which MSRs and ports L2 must not touch.

APM vol. 2, 15.11 MSR Intercepts and 15.10 IOIO Intercepts.
"""

from __future__ import annotations

from typing import Final

from harness.machine.addresses import Gpa
from harness.machine.errors import MachineError
from harness.machine.memory import GuestMemory
from harness.svm.vmcb import IOPM_SIZE, MSRPM_SIZE

MSRPM_RANGES: Final = ((0x0000_0000, 0x0000), (0xC000_0000, 0x0800), (0xC001_0000, 0x1000))
"""First MSR of 8192 that a quarter of the map covers, and its offset in the map."""


def msrpm_bit(index: int) -> int | None:
    """Return the number of an MSR's read bit, the write bit is the next; None if not covered."""
    for first, offset in MSRPM_RANGES:
        if first <= index < first + 0x2000:
            return offset * 8 + 2 * (index - first)
    return None


class PermissionMap:
    """Bits in guest memory; set means intercepted."""

    def __init__(self, memory: GuestMemory, gpa: Gpa, size_bytes: int) -> None:
        self._memory = memory
        self.gpa = gpa
        self.size_bytes = size_bytes

    def read(self) -> bytes:
        """Return the whole map."""
        return self._memory.read(self.gpa, self.size_bytes)

    def write(self, data: bytes) -> None:
        """Replace the whole map."""
        self._memory.write(self.gpa, data[: self.size_bytes])

    def fill(self, on: bool = True) -> None:
        """Intercept all, or nothing."""
        self.write((b"\xff" if on else b"\0") * self.size_bytes)

    def set_bit(self, number: int, on: bool = True) -> None:
        """Set or clear one bit."""
        at = Gpa(self.gpa + number // 8)
        value = self._memory.read_int(at, 1)
        mask = 1 << number % 8
        self._memory.write_int(at, 1, value | mask if on else value & ~mask)

    def has_bit(self, number: int) -> bool:
        """Tell whether a bit is set."""
        return bool(self._memory.read_int(Gpa(self.gpa + number // 8), 1) >> number % 8 & 1)


class Msrpm(PermissionMap):
    """The MSR permission map."""

    def __init__(self, memory: GuestMemory, gpa: Gpa) -> None:
        super().__init__(memory, gpa, MSRPM_SIZE)

    def intercept(
        self, index: int, *, read: bool = True, write: bool = True, on: bool = True
    ) -> None:
        """Intercept reading, writing or both of an MSR, or stop doing so.

        Raises MachineError: the map has no bits for it.
        """
        bit = msrpm_bit(index)
        if bit is None:
            raise MachineError(f"MSR {index:#x} has no bits in the permission map")
        if read:
            self.set_bit(bit, on)
        if write:
            self.set_bit(bit + 1, on)

    def intercepts(self, index: int, write: bool) -> bool:
        """Tell whether an access exits; MSRs that the map does not cover always do."""
        bit = msrpm_bit(index)
        return bit is None or self.has_bit(bit + int(write))


class Iopm(PermissionMap):
    """The I/O permission map."""

    def __init__(self, memory: GuestMemory, gpa: Gpa) -> None:
        super().__init__(memory, gpa, IOPM_SIZE)

    def intercept(self, port: int, size: int = 1, on: bool = True) -> None:
        """Intercept `size` ports from `port` up, or stop doing so."""
        for number in range(port, port + size):
            self.set_bit(number, on)

    def intercepts(self, port: int, size: int) -> bool:
        """Tell whether an access of `size` bytes exits."""
        return any(self.has_bit(number) for number in range(port, port + size))
