"""The real-time clock and its CMOS memory (MC146818), as a PC's firmware leaves them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

from harness.machine.device_state import taking_state
from harness.machine.memory_map import HIGH_START, LOW_LIMIT

_CMOS_BYTES = 128
_STATUS_A, _STATUS_B, _STATUS_C, _STATUS_D = 0x0A, 0x0B, 0x0C, 0x0D
_SECONDS, _MINUTES, _HOURS, _WEEKDAY, _DAY, _MONTH, _YEAR = 0, 2, 4, 6, 7, 8, 9
_CENTURY = 0x32
_A_32_KHZ_1024_HZ = 0x26
_B_24_HOURS = 0x02
_D_POWER_GOOD = 0x80

_BASE_KIB = 0x15
_EXTENDED_KIB = (0x17, 0x30)
"""Twice, as in every PC since the AT."""
_ABOVE_16_MIB = 0x34
"""In 64 KiB."""
_ABOVE_4_GIB = 0x5B
"""In 64 KiB, three bytes (QEMU hw/i386/pc.c, pc_cmos_init)."""
_LAST_CPU = 0x5F
"""Number of CPUs less one (the same place)."""


class Cmos:
    """Index at port 0x70, data at 0x71. The clock tells UTC in BCD; it raises no interrupts."""

    ports: Final = range(0x70, 0x72)

    def __init__(self, ram_bytes: int, vcpus: int, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._index = 0
        self._bytes = bytearray(_CMOS_BYTES)
        self._bytes[_STATUS_A] = _A_32_KHZ_1024_HZ
        self._bytes[_STATUS_B] = _B_24_HOURS
        self._bytes[_STATUS_D] = _D_POWER_GOOD
        self._bytes[_LAST_CPU] = min(vcpus - 1, 0xFF)
        self._set_memory(ram_bytes)

    def write(self, port: int, size_bytes: int, value: int) -> None:
        """Take an index (bit 7 would mask NMIs) or a byte of memory; the clock cannot be set."""
        if port == self.ports.start:
            self._index = value & 0x7F
        elif self._index not in (_STATUS_A, _STATUS_B, _STATUS_C, _STATUS_D):
            self._bytes[self._index] = value & 0xFF

    def read(self, port: int, size_bytes: int) -> int:
        """Return the byte at the index; the index itself cannot be read."""
        if port == self.ports.start:
            return 0xFF
        return self._clock().get(self._index, self._bytes[self._index])

    def state(self) -> dict[str, Any]:
        """Return what must travel with the guest, for JSON; the clock is the host's."""
        return {"index": self._index, "bytes": self._bytes.hex()}

    def restore(self, state: dict[str, Any]) -> None:
        """Become what another one's `state` says.

        Raises MachineError: it is malformed.
        """
        with taking_state("CMOS"):
            index, data = int(state["index"]), bytes.fromhex(state["bytes"])
            if index not in range(_CMOS_BYTES) or len(data) != _CMOS_BYTES:
                raise ValueError(f"index {index}, {len(data)} bytes")
        self._index, self._bytes = index, bytearray(data)

    def _clock(self) -> dict[int, int]:
        t = time.gmtime(self._now())
        return {
            _SECONDS: _bcd(min(t.tm_sec, 59)),
            _MINUTES: _bcd(t.tm_min),
            _HOURS: _bcd(t.tm_hour),
            _WEEKDAY: (t.tm_wday + 1) % 7 + 1,
            _DAY: _bcd(t.tm_mday),
            _MONTH: _bcd(t.tm_mon),
            _YEAR: _bcd(t.tm_year % 100),
            _CENTURY: _bcd(t.tm_year // 100),
        }

    def _set_memory(self, ram_bytes: int) -> None:
        low = min(ram_bytes, LOW_LIMIT)
        self._put(_BASE_KIB, 640, 2)
        for index in _EXTENDED_KIB:
            self._put(index, (low - HIGH_START) >> 10, 2)
        self._put(_ABOVE_16_MIB, max(low - (16 << 20), 0) >> 16, 2)
        self._put(_ABOVE_4_GIB, (ram_bytes - low) >> 16, 3)

    def _put(self, index: int, value: int, size_bytes: int) -> None:
        """Store a number, or the largest that there is room for."""
        value = min(value, (1 << 8 * size_bytes) - 1)
        self._bytes[index : index + size_bytes] = value.to_bytes(size_bytes, "little")


def _bcd(value: int) -> int:
    return value // 10 << 4 | value % 10
