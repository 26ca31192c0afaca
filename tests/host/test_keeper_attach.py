"""The way between a client and its keeper, when the keeper ends."""

import json
import socket
import subprocess
import sys
import threading

import pytest

from harness.host import keeper

ATTACH = "import sys; from pathlib import Path; from harness.host.keeper import attach\n"
ATTACH += "attach(Path(sys.argv[1]), 'run', 0)"
GREETING = b'{"received": 0}\n'


@pytest.fixture
def home(tmp_path, monkeypatch):
    home = tmp_path / "runs" / "run"
    home.mkdir(parents=True)
    (home / keeper._SPOOL).write_bytes(b'{"event": "said"}\n{"event": "cut sh')
    monkeypatch.chdir(home)
    return home


def attached(home, commands=b""):
    """Return what it prints, with its standard input left open."""
    words = [sys.executable, "-c", ATTACH, str(home.parent.parent)]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        process.stdin.write(commands)
        process.stdin.flush()
        process.wait(60)
        assert process.stderr.read() == b""
        return process.stdout.read()


def test_a_keeper_that_is_gone_is_told_of_with_its_last_whole_words(home):
    greeting, *rest = attached(home).splitlines()
    assert json.loads(greeting)["gone"] is True
    assert rest == [b'{"event": "said"}']


def test_a_keeper_that_is_killed_meanwhile_ends_it_without_another_greeting(home):
    def live(listening):
        link, _ = listening.accept()
        with link:
            while link.recv(1) != b"\n":
                pass  # the offset
            link.sendall(GREETING)
            link.recv(1, socket.MSG_PEEK)
            # Closed with a command unread, which resets the connection: as SIGKILL does.

    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(keeper._SOCKET)
        listening.listen()
        thread = threading.Thread(target=live, args=(listening,))
        thread.start()
        said = attached(home, b'{"op": "call"}\n')
        thread.join(30)
    assert said == GREETING
