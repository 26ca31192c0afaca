"""What is kept away while a machine stands still, and how its time is counted."""

import gc
import threading

import pytest
from counting_guest import counting

from harness.migrate.errors import Refused
from harness.migrate.live_move import hand_over
from harness.migrate.standstill import NO_COLLECTION, Laps
from harness.migrate.state import StateWriter


def test_nothing_is_collected_until_the_last_one_is_done():
    assert gc.isenabled()
    with NO_COLLECTION:
        assert not gc.isenabled()
        with NO_COLLECTION:
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


def test_threads_may_end_in_any_order():
    inside, end = threading.Event(), threading.Event()

    def other():
        with NO_COLLECTION:
            inside.set()
            end.wait(5)

    thread = threading.Thread(target=other)
    with NO_COLLECTION:
        thread.start()
        assert inside.wait(5)
    assert not gc.isenabled()
    end.set()
    thread.join(5)
    assert gc.isenabled()


def test_who_has_turned_it_off_keeps_it_off():
    gc.disable()
    try:
        with NO_COLLECTION:
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_laps_add_up():
    laps = Laps()
    for part in ("one", "other", "one"):
        laps.end(part)
    assert list(laps.seconds) == ["one", "other"]
    assert sum(laps.seconds.values()) == pytest.approx(laps.whole_s)


@pytest.mark.kvm
def test_it_is_on_again_after_a_migration_and_after_one_that_failed(kvm, monkeypatch):
    def refuse(*_):
        raise Refused("not today")

    with counting(kvm) as guest:
        hand_over(guest.machine).go_on()
        assert gc.isenabled()
        monkeypatch.setattr(StateWriter, "write", refuse)
        with pytest.raises(Refused):
            hand_over(guest.machine)
        assert gc.isenabled()
        guest.expect_unharmed()
