import sys
from pathlib import Path

import pytest
from kvm_deadline import deadline_of_each

from harness.network.needs import NetworkView, sch_netem, shaped_links, tun_device
from harness.network.wire import Shaper, wire

sys.path.append(str(Path(__file__).parent.parent / "migrate"))  # the counting guest


_NEEDS = {Shaper.NETEM: sch_netem, Shaper.PACKETS: tun_device}


deadline = deadline_of_each(180)


@pytest.fixture(scope="session")
def view():
    return NetworkView()


def needs(fact):
    if not fact.holds:
        pytest.skip(f"{fact.evidence} ({fact.mend})")


@pytest.fixture(params=Shaper, ids=lambda shaper: shaper.name.lower())
def shaper(request, view):
    """Each way to shape that this machine has."""
    needs(_NEEDS[request.param](view))
    return request.param


@pytest.fixture
def lay(view):
    """Lays a wire of the best kind that this machine has."""
    needs(shaped_links(view))
    return wire
