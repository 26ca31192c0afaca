"""Memory that keeps changing: passes go on, and what is lost is noticed."""

import time

import pytest

from harness.errors import ScenarioFailure
from harness.nest import dirtying
from harness.nest.dirtying import Dirtying

END_S = 10


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(dirtying, "_PAUSE_S", 0)


def passes(work, count):
    deadline = time.monotonic() + END_S
    while work.passes < count and not work._wrong:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_every_pass_writes_all_of_it_anew():
    with Dirtying() as work:
        before = bytes(work._memory[::4096])
        passes(work, 2)
        after = bytes(work._memory[8::4096])
    assert len(before) == len(after) == dirtying.MEMORY_BYTES // 4096
    assert all(after)


@pytest.mark.parametrize("at", [0, dirtying.MEMORY_BYTES - 1])
def test_a_byte_that_changes_is_noticed(at):
    def spoil():
        with Dirtying() as work:
            # Its thread is out of the way: it might just be writing there.
            work._over.set()
            work._thread.join(END_S)
            work._memory[at] ^= 0x80
            work._check(at - at % (64 << 10))

    with pytest.raises(ScenarioFailure, match=r"block 0x\w+ is not as pass \d+ left it"):
        spoil()


def test_an_error_of_its_own_comes_first():
    def fail():
        with Dirtying() as work:
            work._wrong = "something"
            raise ValueError("of its own")

    with pytest.raises(ValueError, match="of its own"):
        fail()
