"""Facts about this machine: what a wire needs of it. See `harness.facts`.

Each question is put by doing it, in a namespace that is thrown away.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from harness.facts import Fact
from harness.network import devices
from harness.network.namespaces import Namespace, NetworkError
from harness.network.shape import LinkShape

_ROOT = "run as root, or with CAP_SYS_ADMIN and CAP_NET_ADMIN"


class NetworkView:
    """What the facts look at; tests hand them another one. All return the refusal, or nothing."""

    def namespace(self) -> str:
        """Make a network namespace."""
        return _refusal(lambda: Namespace().close())

    def veth(self) -> str:
        """Make a veth pair."""
        return _refusal(lambda: _try_veth(None))

    def netem(self) -> str:
        """Put netem on a device."""
        return _refusal(lambda: _try_veth(LinkShape()))

    def tun(self) -> str:
        """Make a TUN device."""
        return _refusal(_try_tun)


def network_namespaces(view: NetworkView) -> Fact:
    """Network namespaces may be made by this process."""
    return _fact(view.namespace(), "network namespaces can be made", _ROOT)


def veth(view: NetworkView) -> Fact:
    """The kernel has veth pairs, and this process may make them."""
    return _after(network_namespaces(view), view.veth, "a veth pair can be made", "modprobe veth")


def sch_netem(view: NetworkView) -> Fact:
    """The kernel has netem (CONFIG_NET_SCH_NETEM), and this process may use it."""
    mend = "modprobe sch_netem, or a kernel with CONFIG_NET_SCH_NETEM"
    return _after(veth(view), view.netem, "netem can be put on a veth", mend)


def tun_device(view: NetworkView) -> Fact:
    """TUN devices may be made by this process."""
    mend = "modprobe tun; in a container, give it /dev/net/tun"
    return _after(network_namespaces(view), view.tun, "a TUN device can be made", mend)


def shaped_links(view: NetworkView) -> Fact:
    """Links can be shaped here, by netem or in a process of our own."""
    netem = sch_netem(view)
    if netem.holds:
        return netem
    tun = tun_device(view)
    evidence = f"{netem.evidence}; {tun.evidence}"
    return Fact(tun.holds, evidence, "" if tun.holds else f"{netem.mend}; or {tun.mend}")


def _after(first: Fact, ask: Callable[[], str], yes: str, mend: str) -> Fact:
    return _fact(ask(), yes, mend) if first.holds else first


def _fact(refusal: str, yes: str, mend: str) -> Fact:
    return Fact(False, refusal, mend) if refusal else Fact(True, yes)


def _refusal(attempt: Callable[[], None]) -> str:
    try:
        attempt()
    except NetworkError as e:
        return str(e)
    return ""


def _try_veth(shape: LinkShape | None) -> None:
    with Namespace() as one, Namespace() as other:
        devices.make_veth_pair(one, other)
        if shape is not None:
            devices.set_netem(one, shape)


def _try_tun() -> None:
    with Namespace() as where:
        os.close(devices.make_tun(where))
