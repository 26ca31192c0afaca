"""Network devices inside namespaces: veth pairs, TUN devices, and netem on them (rtnetlink)."""

from __future__ import annotations

import fcntl
import os
import struct
from types import SimpleNamespace
from typing import Any, Final

from pyroute2 import IPRoute, NetlinkError  # type: ignore[import-untyped]
from pyroute2.netlink.rtnl.tcmsg import (  # type: ignore[import-untyped]
    plugins,
    sched_netem,
)

from harness.network.namespaces import Namespace, NetworkError
from harness.network.shape import LinkShape

DEVICE: Final = "wire"
TUN_PATH: Final = "/dev/net/tun"

_PREFIX_BITS: Final = 30

# <linux/if_tun.h>
_TUNSETIFF: Final = 0x4004_54CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
_ifreq: Final = struct.Struct("16sH22x")


def _netem_parameters(given: dict[str, Any]) -> dict[str, Any]:
    rate = {"rate": given["netem_rate"]} if "netem_rate" in given else {}
    parameters: dict[str, Any] = sched_netem.get_parameters(given | rate)
    return parameters


# pyroute2 0.9.7 sends an argument called `rate` as TCA_RATE, too, and Linux refuses (ERANGE).
plugins["netem"] = SimpleNamespace(
    parent=sched_netem.parent, options=sched_netem.options, get_parameters=_netem_parameters
)


def make_veth_pair(one: Namespace, other: Namespace) -> None:
    """Make a veth pair with an end in each namespace.

    Raises NetworkError: the kernel refuses.
    """

    def make(ip: Any) -> None:
        ip.link("add", ifname=DEVICE, kind="veth", peer={"ifname": DEVICE, "net_ns_fd": other.fd})
        # Else a packet of 64 KiB is lost, delayed and duplicated as one.
        ip.link("set", index=_index(ip), gso_max_segs=1)

    _talk(one, "making a veth pair", make)
    _talk(other, "setting up veth", lambda ip: ip.link("set", index=_index(ip), gso_max_segs=1))


def remove(where: Namespace) -> None:
    """Remove the device, and the other end of a pair with it.

    Raises NetworkError: the kernel refuses.
    """
    _talk(where, "removing a device", lambda ip: ip.link("del", index=_index(ip)))


def set_up(where: Namespace, address: str) -> None:
    """Give the device an address, and bring it up.

    Raises NetworkError: the kernel refuses.
    """

    def bring_up(ip: Any) -> None:
        index = _index(ip)
        ip.addr("add", index=index, address=address, prefixlen=_PREFIX_BITS)
        ip.link("set", index=index, state="up")

    _talk(where, f"giving a device the address {address}", bring_up)


def set_netem(where: Namespace, shape: LinkShape) -> None:
    """Have netem shape what leaves through the device; replaces what it did before.

    Raises NetworkError: the kernel refuses, or has no sch_netem.
    """
    options = netem_options(shape)
    _talk(where, "tc qdisc netem", lambda ip: ip.tc("replace", "netem", _index(ip), **options))


def netem_options(shape: LinkShape) -> dict[str, Any]:
    """Return a shape in pyroute2's units: microseconds, percent, bytes per second."""
    return {
        "delay": round(shape.delay_s * 1e6),
        "jitter": round(shape.jitter_s * 1e6),
        "loss": shape.loss * 100,
        "duplicate": shape.duplicate * 100,
        "prob_reorder": shape.reorder * 100,
        "limit": shape.limit_packets,
        # netem_change() keeps the rate that it had, unless told 0.
        "netem_rate": round((shape.rate_bit_s or 0) / 8),
    }


def make_tun(where: Namespace) -> int:
    """Make a TUN device, which goes away with the descriptor that is returned.

    Raises NetworkError: it cannot be had.
    """

    def make() -> int:
        try:
            fd = os.open(TUN_PATH, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as e:
            raise NetworkError(f"{TUN_PATH}: {e.strerror}") from e
        try:
            fcntl.ioctl(fd, _TUNSETIFF, _ifreq.pack(DEVICE.encode(), _IFF_TUN | _IFF_NO_PI))
        except OSError as e:
            os.close(fd)
            raise NetworkError(f"{TUN_PATH}: TUNSETIFF: {e.strerror}") from e
        return fd

    return where.run(make)


def device_names(where: Namespace) -> list[str]:
    """Return the names of all devices in a namespace."""
    names: list[str] = []
    _talk(where, "listing", lambda ip: names.extend(d.get("ifname") for d in ip.get_links()))
    return names


def _index(ip: Any) -> int:
    return int(ip.link_lookup(ifname=DEVICE)[0])


def _talk(where: Namespace, what: str, talk: Any) -> None:
    def inside() -> None:
        with IPRoute() as ip:
            talk(ip)

    try:
        where.run(inside)
    except NetlinkError as e:
        raise NetworkError(f"{what}: {os.strerror(e.code)}") from e
    except OSError as e:
        raise NetworkError(f"{what}: {e.strerror or e}") from e
