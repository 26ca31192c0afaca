"""Places that need no nested SVM, on any /dev/kvm; and what is wrong with a stream."""

import io

import pytest

from harness.errors import HarnessError
from harness.machine.machine import Machine
from harness.migrate.errors import StreamError
from harness.migrate.transfer import save
from harness.storm.calls import pack, unpack
from harness.storm.places import PLACES
from harness.storm.travel import arrive, depart, place_named

pytestmark = pytest.mark.kvm


def test_a_machine_goes_on_as_its_twin_did(kvm):
    row = arrive(kvm, depart(kvm, PLACES["l1-npt"]).stream, "default")
    assert (row["verdict"], row["why"], row["changed"]) == ("works", "", [])


def test_a_machine_that_sees_something_else_differs(kvm, monkeypatch):
    stream = depart(kvm, PLACES["l1-npt"]).stream
    place = PLACES["l1-npt"]

    class Changed:
        name = place.name

        @staticmethod
        def live_on(machine, state):
            return ["something else", *place.live_on(machine, state)[1:]]

    monkeypatch.setitem(PLACES, "l1-npt", Changed)
    row = arrive(kvm, stream, "default")
    assert row["verdict"] == "differs"
    assert "something else" in row["why"]


def test_a_machine_without_a_place_is_refused(kvm):
    file = io.BytesIO()
    with Machine(kvm, vcpus=1, memory_mib=1) as machine, machine.paused():
        save(machine, file)
    with pytest.raises(StreamError, match="nobody knows how it goes on"):
        arrive(kvm, file.getvalue(), "default")


def test_an_unknown_place_is_refused_with_those_there_are():
    with pytest.raises(HarnessError, match="no place is called moon; there are l1-npt"):
        place_named("moon")


def test_packing():
    data = bytes(range(256)) * 10
    assert unpack(pack(data)) == data
    assert pack(data).isascii()
