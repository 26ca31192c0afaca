"""What is done to a guest while it works: how often, and what comes of it when it goes wrong."""

import contextlib
import threading
import time

import pytest

from harness.errors import ScenarioFailure
from harness.nest import disturbing as module
from harness.nest.disturbing import disturbing
from harness.nest.plan import Plan

END_S = 5


class Guest:
    """Counts what is done to it."""

    def __init__(self, fails_at=0):
        self.done = []
        self._fails_at = fails_at

    def move(self):
        self.done.append("move")
        if len(self.done) == self._fails_at:
            raise ScenarioFailure("it does not go on")
        return {"downtime_s": 0.1}

    def smi(self, index, way, timeout_s):
        self.done.append(("smi", index, way.value))
        return {"svm_guest": False}


class Exits(contextlib.nullcontext):
    """Every third SMI found L1's guest running."""

    asked = 0

    def count(self):
        self.asked += 1
        return int(self.asked % 3 == 0)


@pytest.fixture(autouse=True)
def no_peace(monkeypatch):
    monkeypatch.setattr(module, "SmiExits", Exits)
    monkeypatch.setattr(module, "_LONGEST_PEACE_S", {"moved": 0.001, "smi": 0.001})


def disturb(guest, plan):
    told, over = [], threading.Event()
    with disturbing(lambda kind, **data: told.append((kind, data)), guest, plan, over.set) as begin:
        time.sleep(0.01)
        assert not guest.done  # not before it is told to
        begin()
        assert over.wait(END_S)
    return told


def test_moves_and_smis_come_as_often_as_planned():
    guest = Guest()
    told = disturb(guest, Plan(moves=3, smis=10, vcpus=2))
    assert guest.done.count("move") == 3
    smis = [done for done in guest.done if done != "move"]
    assert len(smis) == 10
    assert {index for _, index, _ in smis} == {0, 1}
    assert {way for _, _, way in smis} == {"KVM_SMI", "KVM_SIGNAL_MSI"}
    assert [data["number"] for kind, data in told if kind == "moved"] == [1, 2, 3]
    assert [data["of"] for kind, data in told if kind == "smi"] == [10] * 10
    assert sum(data["left_guest"] for kind, data in told if kind == "smi") == 3


def test_the_seed_decides():
    def ways(seed):
        guest = Guest()
        disturb(guest, Plan(smis=20, vcpus=4, seed=seed))
        return guest.done

    assert ways(1) == ways(1) != ways(2)


def test_what_goes_wrong_is_raised_and_ends_it():
    guest = Guest(fails_at=2)
    with pytest.raises(ScenarioFailure, match="it does not go on"):
        disturb(guest, Plan(moves=5))
    assert guest.done == ["move", "move"]


def test_an_error_of_the_guests_own_comes_first():
    def fail():
        with disturbing(lambda *a, **k: None, Guest(1), Plan(moves=1), lambda: None) as begin:
            begin()
            raise ValueError("of its own")

    with pytest.raises(ValueError, match="of its own"):
        fail()
