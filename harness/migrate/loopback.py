"""The loopback device, up: an emulated host has its own one down."""

from __future__ import annotations

import fcntl
import socket
import struct
from typing import Final

from harness.errors import HostError

_IFREQ: Final = struct.Struct("16sh22x")  # linux/if.h: ifr_name, ifr_flags
_SIOCGIFFLAGS, _SIOCSIFFLAGS = 0x8913, 0x8914
_IFF_UP: Final = 1


def raise_loopback() -> None:
    """Make 127.0.0.1 usable.

    Raises HostError: that cannot be.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            answer = fcntl.ioctl(any_socket, _SIOCGIFFLAGS, _IFREQ.pack(b"lo", 0))
            name, flags = _IFREQ.unpack(answer)
            if not flags & _IFF_UP:
                fcntl.ioctl(any_socket, _SIOCSIFFLAGS, _IFREQ.pack(name, flags | _IFF_UP))
        except OSError as e:
            raise HostError(f"the loopback device: {e.strerror}") from e
