"""A near machine through SSH: this very machine, behind a server of one's own and a gate."""

import getpass
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import paramiko
import psutil
import pytest
from near_lab import assert_nothing_is_left, gate, near, processes_of, ssh_server  # noqa: F401
from nsvm_process import wait_until
from tcp_gate import Gate

from harness.errors import HostError, HostLost
from harness.host import bundle, ssh
from harness.host.artefact import build_artefact
from harness.host.session import Cancelled
from harness.host.ssh import SshHost
from harness.host.ssh_connection import Connection, Refused, Unreachable


@pytest.fixture(autouse=True)
def _nothing_ahead(monkeypatch):
    monkeypatch.setattr(ssh, "PRELOAD", ())


@pytest.fixture
def said():
    return []


@pytest.fixture
def host(near, said):  # noqa: F811
    with SshHost(near, log=said.append) as host:
        yield host


def call(session, target, **kwargs):
    return session.call(f"agent_targets:{target}", timeout_s=30, **kwargs)


def test_a_call_runs_there_and_nothing_is_left_behind(near, host, said):  # noqa: F811
    session = host.start()
    assert call(session, "add", a=1, b=2).value == 3
    seen = host.describe()
    assert (seen["kind"], seen["name"]) == ("ssh", "near")
    assert seen["kernel_release"] == os.uname().release
    assert seen["cpus"] == os.cpu_count()
    host.close()
    assert_nothing_is_left(near)
    assert [text.split(" (")[0] for text in said] == ["near: carrying the harness there"]


def test_what_a_call_leaves_behind_is_ended_and_named(near, host, said):  # noqa: F811
    pid = call(host.start(), "leave_somebody_behind").value
    host.close()
    # A zombie is for process 1 to bury.
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    assert any(f"({pid}), left behind" in text for text in said)


def numbers(events):
    return [event["data"]["number"] for event in events if event["event"] == "emit"]


def test_a_run_that_is_cancelled_gives_the_machine_back_at_once(near, said):  # noqa: F811
    with SshHost(near, log=said.append) as host:
        session = host.start()

        def cancel(event):
            if event["event"] == "emit":
                session.cancel()

        with pytest.raises(Cancelled):
            call(session, "say_and_wait", on_event=cancel, go="/nowhere")
        started = time.monotonic()
        host.close()
        assert time.monotonic() - started < near.linger_s / 2
        assert_nothing_is_left(near)
        assert time.monotonic() - started < near.linger_s / 2


@pytest.mark.parametrize("shut_s", [0, 3], ids=["at once", "after a while"])
def test_a_run_goes_on_while_its_connection_is_cut(gate, said, shut_s):  # noqa: F811
    way, far = gate
    seen = []

    def cut_once(event):
        seen.append(event)
        if event["event"] == "emit" and event["data"]["number"] in (10, 11, 600):
            way.cut(shut=shut_s > 0)
            if shut_s:
                time.sleep(shut_s)
                way.open()

    with SshHost(far, log=said.append) as host:
        result = host.start().call(
            "agent_targets:talk_slowly", timeout_s=60, on_event=cut_once, count=800
        )
        assert host.link.reconnects >= 1
    assert result.outcome == "return"
    assert numbers(seen) == list(range(800))
    assert result.output == [f"line {number}" for number in range(800)]
    assert any("the run goes on there" in text for text in said)
    assert_nothing_is_left(far)


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ("Authentication failed.", Refused),
        ("Authentication failed: transport shut down or saw EOF", Unreachable),
        ("Authentication timeout.", Unreachable),
    ],
)
def test_a_login_that_is_cut_off_is_not_one_that_is_refused(near, monkeypatch, said, error):  # noqa: F811
    """The link tries again after one, and gives up after the other."""

    def connect(self, *args, **kwargs):
        raise paramiko.AuthenticationException(said)

    monkeypatch.setattr(paramiko.SSHClient, "connect", connect)
    with pytest.raises(error):
        Connection(near)


def test_commands_sent_while_it_is_cut_arrive_once(gate):  # noqa: F811
    way, far = gate
    with SshHost(far) as host:
        session = host.start()
        way.cut(shut=True)
        wait_until(lambda: way.refused, "the link to try again")
        way.open()
        assert [call(session, "add", a=n, b=0).value for n in range(3)] == [0, 1, 2]
        assert host.link.reconnects >= 1


def test_a_host_that_stays_away_is_lost_and_can_be_taken_again(gate, said):  # noqa: F811
    way, far = gate
    with SshHost(replace(far, reconnect_s=2), log=said.append) as host:
        session = host.start()
        way.cut(shut=True)
        with pytest.raises(HostLost, match="not to be reached for 2 s") as lost:
            call(session, "say_and_wait", go="/nowhere")
        assert lost.value.unreachable
        way.open()
        # Its own former run is still there, and still has the lock.
        assert call(host.start(), "add", a=1, b=2).value == 3
    assert_nothing_is_left(far)


def test_a_client_that_never_comes_back_leaves_nothing(gate, tmp_path):  # noqa: F811
    way, far = gate
    host = SshHost(replace(far, linger_s=1, reconnect_s=2))
    lent = tmp_path / "lent"
    session = host.start()

    def leave(event):
        if event["event"] == "emit":
            way.cut(shut=True)

    with pytest.raises(HostLost):
        session.call("agent_targets:borrow", timeout_s=60, on_event=leave, path=str(lent))
    assert_nothing_is_left(far)
    assert not lent.exists()
    host.close()


def test_two_runs_never_meet(near, host):  # noqa: F811
    host.start()
    with (
        SshHost(near) as other,
        pytest.raises(HostError, match=rf"near: in use by {getpass.getuser()}@.*pid {os.getpid()}"),
    ):
        other.start()
    host.close()
    with SshHost(near) as other:
        assert call(other.start(), "add", a=1, b=2).value == 3


def test_a_keeper_that_is_killed_is_a_lost_host_and_its_lock_says_whose_it_was(near, said):  # noqa: F811
    with SshHost(near, log=said.append) as host:
        session = host.start()

        def kill(event):
            if event["event"] == "emit":
                [pid] = [p.pid for p in processes_of(near) if "take" in p.cmdline()]
                os.kill(pid, signal.SIGKILL)

        with pytest.raises(HostLost, match="the keeper of the run is gone"):
            session.call("agent_targets:loop_for_ever", timeout_s=60, on_event=kill)
        assert call(host.start(), "add", a=1, b=2).value == 3
    who = f"near: cleaned up after {getpass.getuser()}@"
    assert any(who in text and str(os.getpid()) in text for text in said)
    assert_nothing_is_left(near)


def test_an_unknown_host_key_is_refused_with_the_way_to_mend_it(near, tmp_path):  # noqa: F811
    nobody = replace(near, known_hosts=tmp_path / "none")
    with pytest.raises(Refused, match=r"is not known; if ssh-ed25519 SHA256:.* ssh-keyscan -p \d+"):
        SshHost(nobody).start()
    assert not Path(near.directory).exists()


def test_a_changed_host_key_is_refused_with_the_way_to_mend_it(near, ssh_server, tmp_path):  # noqa: F811
    other = " ".join((ssh_server.here / "stranger.pub").read_text().split()[:2])
    known = tmp_path / "known"
    known.write_text(f"[127.0.0.1]:{near.port} {other}\n")
    with pytest.raises(Refused, match=r"has CHANGED: .* ssh-keygen -f .* -R '\[127.0.0.1\]:\d+'"):
        SshHost(replace(near, known_hosts=known)).start()
    assert not Path(near.directory).exists()


def test_a_login_that_fails_and_a_host_that_is_not_there(near, ssh_server):  # noqa: F811
    with pytest.raises(Refused, match=r"does not accept the key .*/stranger"):
        SshHost(replace(near, key=ssh_server.here / "stranger")).start()
    with Gate(near.port) as closed:
        pass
    with pytest.raises(HostError, match=r"near: no connection to .*: refused, or nothing is there"):
        SshHost(replace(near, port=closed.port, connect_s=1)).start()


def test_an_artefact_is_carried_once(near, said):  # noqa: F811
    for _ in range(2):
        with SshHost(near, log=said.append) as host:
            host.start()
    assert len([text for text in said if "carrying" in text]) == 1


def test_the_artefact_needs_nothing_but_python(tmp_path):
    """In a Python without site-packages; what the agent imports ahead included."""
    artefact = build_artefact().path
    code = f"import sys; sys.path.insert(0, {str(artefact)!r}); import " + ", ".join(
        ["harness.host.keeper", "harness.host.agent", "harness.host.inventory", *bundle.PRELOAD]
    )
    done = subprocess.run(
        [sys.executable, "-IS", "-c", code], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
