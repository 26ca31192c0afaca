"""What the kernel has of networks, asked without the harness."""

import contextlib
import os
import socket
import struct
import time
from pathlib import Path

from pyroute2 import IPRoute

from harness.network.namespaces import Namespace

DEADLINE_S = 60.0

_RTM_NEWNSID, _RTM_GETNSID = 88, 90
_NLM_F_REQUEST_DUMP = 0x301
_HEADER, _ID = struct.Struct("=IHHII"), struct.Struct("=HHi")


def this_machine():
    """The machine's own network: devices, queueing disciplines, names of namespaces."""
    with IPRoute() as ip:
        devices = {device["index"]: device.get("ifname") for device in ip.get_links()}
        disciplines = sorted((q["index"], q.get("kind")) for q in ip.get_qdiscs())
    named = Path("/run/netns")
    return devices, disciplines, sorted(os.listdir(named)) if named.exists() else None


def holders(inode):
    """Who holds a network namespace: processes in it, descriptors of it, mounts of it."""
    name, found = f"net:[{inode}]", []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if name in (process / "mountinfo").read_text():
                found.append(f"{process}: mount")
        for path in (*process.glob("task/*/ns/net"), *process.glob("fd/*")):
            with contextlib.suppress(OSError):
                if os.readlink(path) == name:
                    found.append(str(path))
    return found


class Watched:
    """Whether namespaces still exist, whoever holds them: a third one has numbers for them.

    The kernel takes a number back when it destroys the namespace.
    """

    def __init__(self):
        self._where = Namespace()
        self._count = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._where.close()

    def add(self, fd):
        def number():
            with IPRoute() as ip:
                ip.set_netnsid(fd=fd, nsid=self._count)

        self._count += 1
        self._where.run(number)

    def alive(self):
        return self._where.run(_numbers)

    def expect_gone(self):
        deadline = time.monotonic() + DEADLINE_S
        while self.alive():
            assert time.monotonic() < deadline, "a network namespace stays"
            time.sleep(0.02)


def _numbers():
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as asking:
        asking.settimeout(10)
        body = bytes(4)  # struct rtgenmsg
        size = _HEADER.size + len(body)
        asking.send(_HEADER.pack(size, _RTM_GETNSID, _NLM_F_REQUEST_DUMP, 1, 0) + body)
        found = []
        while True:
            data = asking.recv(1 << 16)
            while data:
                size, kind, *_ = _HEADER.unpack_from(data)
                if kind != _RTM_NEWNSID:
                    return found
                found.append(_ID.unpack_from(data, _HEADER.size + len(body))[2])
                data = data[size + 3 & ~3 :]
