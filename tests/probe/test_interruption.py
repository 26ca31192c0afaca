"""SIGTERM in the middle of borrowing and giving back: put off, never lost."""

import os
import signal
import threading

import pytest

from harness.errors import HostError
from harness.probe import functions, kprobes, memcg, tracefs
from harness.probe.interruption import uninterrupted
from harness.probe.memcg import MemcgProbe
from harness.probe.tracefs import TraceInstance


class Told(BaseException):
    """What a handler raises, as an agent's does."""


@pytest.fixture(autouse=True)
def handler():
    def tell(number, frame):
        raise Told

    before = signal.signal(signal.SIGTERM, tell)
    yield tell
    signal.signal(signal.SIGTERM, before)


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_block_is_finished_first(handler):
    steps = []

    def work():
        with uninterrupted():
            terminate()
            steps.append("on")

    with pytest.raises(Told):
        work()
    assert steps == ["on"]
    assert signal.getsignal(signal.SIGTERM) is handler


def test_blocks_within_blocks_end_with_the_outermost():
    steps = []

    def work():
        with uninterrupted():
            with uninterrupted():
                terminate()
            steps.append("on")
        steps.append("too far")

    with pytest.raises(Told):
        work()
    assert steps == ["on"]


def test_without_a_signal_nothing_happens(handler):
    with uninterrupted():
        pass
    assert signal.getsignal(signal.SIGTERM) is handler


def test_another_thread_changes_nothing(handler):
    seen = []

    def work():
        with uninterrupted():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [handler]


# What borrows, told to end at each of its steps


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """Control files that only count the writes; SIGTERM comes with number `kernel.at`."""

    class Kernel:
        at, writes = -1, 0
        root = tmp_path

        def write(self, path, text, *, append=False):
            self.writes += 1
            if self.writes == self.at:
                terminate()

    kernel = Kernel()
    (tmp_path / "instances").mkdir()
    (tmp_path / "kprobe_events").write_text("")
    for module in (tracefs, kprobes, memcg):
        monkeypatch.setattr(module, "write", kernel.write)
    for module in (tracefs, kprobes):
        monkeypatch.setattr(module, "TRACEFS", tmp_path)
    monkeypatch.setattr(tracefs.os, "open", lambda path, flags: os.dup(0))
    return kernel


def steps_of(probe, kernel):
    """Return how many steps arming and disarming are."""
    kernel.at = -1
    with probe():
        pass
    return kernel.writes


@pytest.mark.parametrize("probe", [lambda: TraceInstance("x"), functions.FunctionProbe])
def test_whenever_it_is_told_to_end_an_instance_is_given_back(kernel, probe):
    total = steps_of(probe, kernel)
    assert total >= 4
    for step in range(1, total + 1):
        kernel.at, kernel.writes = step, 0
        with pytest.raises(Told), probe():
            pass
        assert list((kernel.root / "instances").iterdir()) == [], f"left behind at step {step}"


def test_pages_that_cannot_be_owned_leave_no_cgroup_behind(monkeypatch):
    class FakeCgroup:
        version, left = 2, False

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.left = True

        def stat(self):
            return {"anon": 1}

    def refuse():
        raise HostError("mlockall: Operation not permitted")

    monkeypatch.setattr(memcg, "own_all_pages", refuse)
    monkeypatch.setattr(memcg, "Cgroup", FakeCgroup)
    probe = MemcgProbe()
    with pytest.raises(HostError, match="mlockall"), probe:
        pass
    assert probe.cgroup.left
