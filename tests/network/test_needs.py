import pytest

from harness.errors import Unsupported
from harness.network.needs import sch_netem, shaped_links, tun_device, veth
from harness.network.wire import Shaper, best_shaper


class View:
    """A machine that refuses some things."""

    def __init__(self, **refusals):
        self.refusals = refusals
        self.asked = []

    def __getattr__(self, name):
        def ask():
            self.asked.append(name)
            return self.refusals.get(name, "")

        return ask


NO_NETEM = {"netem": "tc qdisc netem: No such file or directory"}
NO_TUN = {"tun": "/dev/net/tun: No such file or directory"}
NO_ROOT = {"namespace": "unshare(CLONE_NEWNET): Operation not permitted"}


def test_netem_is_taken_where_it_is():
    assert best_shaper(View()) is Shaper.NETEM
    assert sch_netem(View()).holds


def test_without_netem_packets_are_shaped_by_a_process():
    assert best_shaper(View(**NO_NETEM)) is Shaper.PACKETS
    fact = sch_netem(View(**NO_NETEM))
    assert not fact.holds
    assert fact.evidence == NO_NETEM["netem"]
    assert "CONFIG_NET_SCH_NETEM" in fact.mend


def test_without_both_the_evidence_is_of_both():
    with pytest.raises(Unsupported) as caught:
        best_shaper(View(**NO_NETEM, **NO_TUN))
    for refusal in (NO_NETEM["netem"], NO_TUN["tun"], "modprobe tun"):
        assert refusal in str(caught.value)


@pytest.mark.parametrize("fact", [veth, sch_netem, tun_device, shaped_links])
def test_without_the_permission_nothing_else_is_tried(fact):
    view = View(**NO_ROOT)
    found = fact(view)
    assert not found.holds
    assert NO_ROOT["namespace"] in found.evidence
    assert "run as root" in found.mend
    assert set(view.asked) == {"namespace"}
