"""QEMU's control channel against one that is written down: answers, refusals, deadlines."""

import json
import socket
import subprocess
import threading
from pathlib import Path

import pytest

from harness.errors import HostError
from harness.host import monitor as monitor_module
from harness.host.monitor import Monitor, shell_quoted

GREETING = {"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": ""},
                    "capabilities": []}}  # fmt: skip


class Qemu(threading.Thread):
    """Answers each command from `answers` (by name, a list used up one by one); heard are all."""

    def __init__(self, sock, answers):
        super().__init__(daemon=True)
        self.socket = sock
        self.answers = {**answers, "qmp_capabilities": [{}]}
        self.heard = []

    def run(self):
        with self.socket:
            self.say(GREETING)
            pending, decoder = "", json.JSONDecoder()
            while chunk := self.socket.recv(4096):
                pending += chunk.decode()
                # The client ends its messages with nothing.
                while pending:
                    try:
                        command, end = decoder.raw_decode(pending)
                    except ValueError:
                        break
                    pending = pending[end:].lstrip()
                    self.answer(command)

    def answer(self, command):
        self.heard.append((command["execute"], command.get("arguments", {})))
        answer = self.answers[command["execute"]].pop(0)
        if answer is not None:
            kind = "error" if "class" in answer else "return"
            self.say({kind: answer, "id": command.get("id")})

    def say(self, message):
        self.socket.sendall(json.dumps(message).encode() + b"\n")


@pytest.fixture
def opened():
    """Return a function that opens a monitor to a QEMU with these answers."""
    made = []

    def open_monitor(**answers):
        ours, theirs = socket.socketpair()
        qemu = Qemu(theirs, {name.replace("_", "-"): list(a) for name, a in answers.items()})
        qemu.start()
        monitor = Monitor(ours)
        made.append((monitor, qemu))
        return monitor, qemu

    yield open_monitor
    for monitor, qemu in made:
        monitor.close()
        qemu.join(30)
        assert not qemu.is_alive()


def test_a_command_returns_its_answer(opened):
    monitor, qemu = opened(query_status=[{"status": "running"}, {"status": "paused"}])
    assert monitor.command("query-status") == {"status": "running"}
    assert monitor.command("query-status") == {"status": "paused"}
    assert [name for name, _ in qemu.heard] == ["qmp_capabilities", "query-status", "query-status"]


def test_a_refusal_is_quoted(opened):
    monitor, _ = opened(cont=[{"class": "GenericError", "desc": "not allowed"}])
    with pytest.raises(HostError, match="QEMU: cont: not allowed"):
        monitor.command("cont")


def test_no_answer_is_noticed(opened, monkeypatch):
    monkeypatch.setattr(monitor_module, "_COMMAND_S", 0.5)
    monitor, _ = opened(cont=[None])
    with pytest.raises(HostError, match="QEMU did not answer cont within"):
        monitor.command("cont")


def test_a_qemu_that_is_gone_is_noticed():
    ours, theirs = socket.socketpair()
    theirs.close()
    monitor = Monitor(ours)
    with pytest.raises(HostError, match="QEMU: connecting"):
        monitor.command("cont")
    monitor.close()


def test_saving_waits_until_it_is_done_and_goes_on(opened):
    monitor, qemu = opened(
        migrate_set_parameters=[{}],
        migrate=[{}],
        stop=[{}],
        query_migrate=[{"status": "setup"}, {"status": "active"}, {"status": "completed"}],
        cont=[{}],
    )
    monitor.save_machine(Path("/cache/it's here"))
    assert dict(qemu.heard)["migrate"] == {"uri": "exec:cat > '/cache/it'\\''s here'"}
    names = [name for name, _ in qemu.heard]
    assert names[-2:] == ["query-migrate", "cont"]
    # What a running machine writes during the copy may be missed.
    assert names.index("stop") < names.index("migrate")


def test_a_state_that_could_not_be_written_is_an_error_and_the_machine_goes_on(opened):
    monitor, qemu = opened(
        migrate_set_parameters=[{}],
        migrate=[{}],
        stop=[{}],
        query_migrate=[{"status": "failed"}],
        cont=[{}],
    )
    with pytest.raises(OSError, match="could not write"):
        monitor.save_machine(Path("/full"))
    assert qemu.heard[-1][0] == "cont"


def test_saving_does_not_take_for_ever(opened, monkeypatch):
    monkeypatch.setattr(monitor_module, "_SAVE_S", 0.1)
    monitor, _ = opened(
        migrate_set_parameters=[{}],
        migrate=[{}],
        stop=[{}],
        query_migrate=[{"status": "active"}] * 1000,
    )
    with pytest.raises(HostError, match="took more than"):
        monitor.save_machine(Path("/slow"))


def test_a_path_is_one_word_to_a_shell():
    path = Path("/tmp/a 'b' \"c\" $HOME `d`")
    done = subprocess.run(["sh", "-c", f"printf %s {shell_quoted(path)}"], capture_output=True)
    assert done.stdout.decode() == str(path)
