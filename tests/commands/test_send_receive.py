"""`nsvm send` and `nsvm receive`, on this machine's KVM: through a child, sockets, and SSH."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
from nsvm_process import Nsvm
from ssh_server import nsvm_there, ssh_server  # noqa: F401 (a fixture)

from harness.host.bundle import tree_root
from harness.host.machine_lock import local_path, machine_lock

pytestmark = pytest.mark.kvm

#: Needs no nested SVM.
PLACE = "l1-npt"
DEADLINE_S = 120

WENT_ON = "the machine goes on here, as its twin did"


@pytest.fixture(autouse=True)
def _kvm(kvm):
    pass


def receive(*arguments):
    return shlex.join([sys.executable, "-m", "harness", "receive", *map(str, arguments)])


def send(to, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "harness", "send", PLACE, "--to", to, *map(str, arguments)],
        cwd=tree_root(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )


def expect_sent(done):
    assert done.returncode == 0, done
    assert "L1 at work: sent to " in done.stdout
    assert re.search(r"[1-9]\d* pages, [1-9]\d* bytes, \d+ rounds, downtime \d", done.stdout)


def expect_went_on(done, complaint, others=()):
    """One line, but for what others said; and the machine is none the worse."""
    assert done.returncode == 2, done
    assert done.stdout == ""
    *before, last = done.stderr.splitlines()
    assert re.search(complaint, last), done.stderr
    assert last.startswith("nsvm: ")
    assert last.endswith(WENT_ON)
    assert all(any(other in line for other in others) for line in before), done.stderr


def test_through_a_child(tmp_path):
    there, here = tmp_path / "there", tmp_path / "here"
    done = send(receive("--json", there), "--json", here)
    expect_sent(done)
    assert "goes on there as its twin did" in done.stdout
    assert "nsvm: received: works" in done.stderr
    row = json.loads(there.read_text())
    assert row["verdict"] == "works"
    assert row["acknowledged"]
    assert row["source"] == row["kernel"] == os.uname().release
    assert len(row["seen"]) == 12
    sent = json.loads(here.read_text())
    assert sent["status_there"] == 0
    assert sent["place"] == PLACE


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_over_a_socket(tmp_path, kind):
    place = "tcp:0" if kind == "tcp" else f"unix:{tmp_path}/socket"
    with Nsvm("receive", "--listen", place) as receiver:
        listening = receiver.process.stdout.readline().strip()
        assert listening.startswith("nsvm: listening on ")
        expect_sent(send(listening.removeprefix("nsvm: listening on ")))
        status, output = receiver.end()
    assert status == 0, output
    assert "nsvm: received: works" in output
    assert not (tmp_path / "socket").exists()


@pytest.mark.parametrize(
    ("to", "complaint"),
    [
        ("no-such-command", "starting no-such-command: No such file or directory"),
        ("false", r"link to false lost: .* \(the command ended with status 1\)"),
        ("sh -c 'exec 0<&- 1>&-; exit 7'", r"link to sh lost: .* ended with status 7\)"),
        ("echo hello", r"link to echo lost|echo sent a message"),
        ("cat", "cat sent a message of"),
        ("unix:/no/such/socket", "connecting to unix:/no/such/socket: No such file or directory"),
        ("tcp:127.0.0.1:1", "connecting to tcp:127.0.0.1:1: Connection refused"),
    ],
)
def test_without_a_peer_the_machine_goes_on_here(to, complaint):
    expect_went_on(send(to), complaint)


def test_a_run_that_has_this_machine_is_not_disturbed():
    with machine_lock(local_path(), {"who": "eve@far", "command": "nsvm memory"}):
        done = send("cat")
        taken = subprocess.run(
            shlex.split(receive()), cwd=tree_root(), stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=DEADLINE_S,
        )  # fmt: skip
    said = f"nsvm: in use by eve@far (nsvm memory); lock {local_path()}\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)
    assert (taken.returncode, taken.stdout, taken.stderr) == (2, "", said)


def test_a_peer_that_dies_with_half_the_machine_leaves_it_here():
    few = "dd bs=1 count=30000 2>/dev/null"
    dying = shlex.join(["sh", "-c", f"{few} | {receive()}; exit 5"])
    done = send(dying)
    said = ("nsvm: receiving the machine: ", "nsvm: whoever started this", "nsvm: the stream")
    expect_went_on(done, r"ended with status 5\)", others=said)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["send", PLACE], "Missing option '--to'"),
        (["send", "nowhere", "--to", "cat"], "'nowhere' is not one of"),
        (["send", PLACE, "--to", ""], "--to is empty"),
        (["send", PLACE, "--to", "tcp:4000"], "is not tcp:HOST:PORT"),
        (["send", PLACE, "--to", "tcp:there:x"], "no port 'x'"),
        (["send", PLACE, "--to", "tcp:there:70000"], "no port '70000'"),
        (["send", PLACE, "--to", "ssh 'there"], "No closing quotation"),
        (["receive", "--listen", "4000"], "neither tcp:PORT"),
        (["receive", "--listen", "tcp:-1"], "no port '-1'"),
        (["receive", "--listen", "unix:"], "neither tcp:PORT"),
        (["receive", "--listen", "unix:/no/such/directory/socket"], "listening on unix:/no/such"),
        (["receive", "--json", "-"], "--json - needs --listen"),
        (["receive", "--listen", "tcp:0", "--wait", "0.2"], "nothing happened in time"),
    ],
)
def test_used_wrongly(arguments, complaint):
    with Nsvm(*arguments, stdin=subprocess.DEVNULL) as used:
        status, output = used.end()
    assert status == 2
    assert complaint in output
    assert "Traceback" not in output


def test_nobody_at_standard_input_is_a_link_that_is_lost():
    done = subprocess.run(
        [sys.executable, "-m", "harness", "receive"],
        cwd=tree_root(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=DEADLINE_S,
    )
    assert done.returncode == 2
    [complaint] = done.stderr.decode().splitlines()
    assert complaint.startswith("nsvm: receiving the machine: link to whoever started this lost")


# Through SSH


def test_through_ssh(ssh_server):  # noqa: F811
    there = f"cd {tree_root()} && {nsvm_there()} receive"
    done = send(f"{ssh_server.login()} {shlex.quote(there)}")
    expect_sent(done)
    assert "sent to ssh" in done.stdout
    assert "goes on there as its twin did" in done.stdout
    assert "nsvm: received: works" in done.stderr


@pytest.mark.parametrize(
    ("login", "there", "complaint", "said"),
    [
        ({"key": "stranger"}, "true", r"link to ssh lost: .* status 255\)", "Permission denied"),
        ({}, "no-such-nsvm receive", r"link to ssh lost: .* status 127\)", "not found"),
        ({}, "kill -9 $$", r"link to ssh lost: .* status 255\)", ""),
    ],
    ids=["refused", "no-nsvm", "killed"],
)
def test_ssh_that_leads_nowhere(ssh_server, login, there, complaint, said):  # noqa: F811
    done = send(f"{ssh_server.login(**login)} {shlex.quote(there)}")
    expect_went_on(done, complaint, others=[said])
    assert said in done.stderr
