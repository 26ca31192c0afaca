"""This machine as a host: the agent as a child process, its end, and what it needs."""

import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from agent_process import HERE

from harness.errors import HostError, HostLost
from harness.facts import Fact
from harness.host import local
from harness.host.bundle import tree_root
from harness.host.local import LocalHost
from harness.host.machine_lock import local_path, machine_lock


@pytest.fixture
def host(monkeypatch, tmp_path):
    """A host whose /dev/kvm is as it should be, and whose calls find the tests' targets."""
    monkeypatch.setattr(local, "kvm_device", lambda view: Fact(True, "opens"))
    monkeypatch.setattr(local, "build_images", lambda: tmp_path)
    monkeypatch.setattr(local, "PRELOAD", ())
    monkeypatch.setattr(local, "tree_root", lambda: f"{HERE}:{tree_root()}")
    if not os.access("/dev/kmsg", os.R_OK):
        pytest.skip("/dev/kmsg is not ours to read")
    with LocalHost() as host:
        yield host


def test_a_call_runs_in_a_process_of_this_machine(host):
    session = host.start()
    assert session.call("agent_targets:add", timeout_s=30, a=1, b=2).value == 3
    assert session.call("harness.inside:ping", timeout_s=30).value != os.getpid()


def test_it_says_what_it_is(host):
    host.start()
    seen = host.describe()
    assert seen["kind"] == "local"
    assert seen["kernel_release"] == os.uname().release
    assert seen["qemu_version"] is None
    assert seen["cpus"] == os.cpu_count()


def test_closing_tells_a_running_call_to_clean_up_first(host, tmp_path):
    lent = tmp_path / "lent"
    session = host.start()

    class Enough(Exception):
        pass

    def close(event):
        if event["event"] == "emit":
            assert lent.exists()
            raise Enough

    with pytest.raises(Enough):
        session.call("agent_targets:borrow", timeout_s=60, on_event=close, path=str(lent))
    agent = host._process
    host.close()
    assert not lent.exists()
    assert agent.poll() is not None


def test_starting_again_is_another_agent(host):
    host.start()
    first = host._process
    session = host.start()
    assert first.poll() is not None
    assert session.call("agent_targets:add", timeout_s=30, a=1, b=2).value == 3


def test_an_agent_that_dies_is_a_lost_host_with_its_status(host):
    session = host.start()

    def kill(event):
        if event["event"] == "emit":
            host._process.kill()
            host._process.wait(30)

    with pytest.raises(HostLost, match=f"the agent ended with status {-signal.SIGKILL}"):
        session.call("agent_targets:say_and_wait", timeout_s=60, on_event=kill, go="/nonexistent")


def test_an_agent_that_does_not_come_up_is_an_error(host, monkeypatch, tmp_path):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(local.sys, "executable", str(broken))
    with pytest.raises(HostError, match="the local agent did not come up"):
        host.start()
    assert Path(sys.executable) == broken


def test_a_device_that_refuses_is_said_before_anything_is_started(host, monkeypatch):
    def refuse(view):
        raise HostError("/dev/kvm: Permission denied")

    monkeypatch.setattr(local, "kvm_device", refuse)
    with pytest.raises(HostError, match="Permission denied"):
        host.start()
    assert host._process is None


def hold_the_machine(path, has_it, enough, dies):
    with machine_lock(path, {"who": "eve@far", "command": "nsvm run -k other"}):
        has_it.set()
        enough.wait(60)
        if dies:
            os._exit(0)


@pytest.fixture
def other_run():
    """Another process that has the machine; tell it to go, giving it back or not."""
    context = multiprocessing.get_context("spawn")
    has_it, enough = context.Event(), context.Event()
    made = []

    def begin(path, *, dies=False):
        process = context.Process(target=hold_the_machine, args=(path, has_it, enough, dies))
        made.append(process)
        process.start()
        assert has_it.wait(60)

        def end():
            enough.set()
            process.join(60)

        return end

    yield begin
    enough.set()
    for process in made:
        process.join(60)


def test_a_run_has_the_machine_for_itself(host, other_run):
    end = other_run(local_path())
    started = time.monotonic()
    with pytest.raises(
        HostError, match=r"in use by eve@far \(nsvm run -k other\); lock /"
    ) as error:
        host.start()
    assert time.monotonic() - started < 1
    assert "\n" not in str(error.value)
    assert host._process is None
    end()
    host.start()
    assert json.loads(local_path().read_text())["pid"] == os.getpid()
    host.close()
    assert local_path().read_text() == ""


def test_what_never_gave_the_machine_back_is_named(host, other_run):
    other_run(local_path(), dies=True)()
    said = []
    host._log = said.append
    host.start()
    assert said == ["eve@far (nsvm run -k other) had this machine, and never gave it back"]
