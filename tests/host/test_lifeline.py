"""The lifeline: a process ends with the one for which it works, however that one ended."""

import os
import signal
import subprocess
import sys
import threading

import pytest
from nsvm_process import wait_until

from harness.errors import HostError
from harness.host.lifeline import VARIABLE, end_with_holder, lifeline

HOLDER = """
import sys, time
from pathlib import Path
from harness.host.lifeline import lifeline
with lifeline(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""

#: Its parent is the test, not the holder: that is what stands between the two in a fleet.
WORKER = """
import signal, sys, time
from harness.host.lifeline import end_with_holder
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
end_with_holder()
print("at work", flush=True)
time.sleep(600)
"""


@pytest.fixture
def start():
    """Return a function that starts a Python program and waits for its first line."""
    processes = []

    def started(program, *arguments, **environment):
        process = subprocess.Popen(
            [sys.executable, "-c", program, *map(str, arguments)],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        assert process.stdout.readline()
        return process

    yield started
    for process in processes:
        process.kill()
        process.wait(10)
        process.stdout.close()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_it_ends_when_its_holder_was_killed(start, tmp_path, how):
    holder = start(HOLDER, tmp_path / "line")
    worker = start(WORKER, **{VARIABLE: str(tmp_path / "line")})
    holder.send_signal(how)
    assert worker.wait(20) == 7


def test_it_works_as_long_as_its_holder_is_there(tmp_path, monkeypatch):
    ended = threading.Event()
    monkeypatch.setenv(VARIABLE, str(tmp_path / "line"))
    with lifeline(tmp_path / "line"):
        end_with_holder(ended.set)
        # A second one that comes and goes is no end.
        monkeypatch.setenv(VARIABLE, str(tmp_path / "line"))
        end_with_holder(ended.set)
        assert not ended.wait(0.5)
    assert ended.wait(20)


def test_a_holder_that_has_ended_is_said_at_once(start, tmp_path, monkeypatch):
    holder = start(HOLDER, tmp_path / "line")
    holder.kill()
    holder.wait(20)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "line"))
    with pytest.raises(HostError, match="who wanted this run has ended"):
        end_with_holder()
    monkeypatch.setenv(VARIABLE, str(tmp_path / "none"))
    with pytest.raises(HostError, match=r"lifeline .*/none: No such file"):
        end_with_holder()


def test_without_one_nothing_ends_and_children_do_not_get_it(tmp_path, monkeypatch):
    before = threading.active_count()
    monkeypatch.delenv(VARIABLE, raising=False)
    end_with_holder()
    assert threading.active_count() == before
    ended = threading.Event()
    with lifeline(tmp_path / "line"):
        monkeypatch.setenv(VARIABLE, str(tmp_path / "line"))
        end_with_holder(ended.set)
        assert VARIABLE not in os.environ
    wait_until(ended.is_set, "the end", 20)


def test_one_that_cannot_be_made_is_one_line(tmp_path):
    with (
        pytest.raises(HostError, match=r"^cannot make .*/line: No such file or directory$"),
        lifeline(tmp_path / "no" / "line"),
    ):
        pass
