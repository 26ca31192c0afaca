"""What a guest of QEMU travels over; apart from what moves it, so that plans can name it."""

from __future__ import annotations

from enum import StrEnum


class Over(StrEnum):
    """What a machine travels over."""

    UNIX = "unix"
    TCP = "tcp"
    FILE = "file"
    """Saved whole, its QEMU ended, and loaded by the next one."""
