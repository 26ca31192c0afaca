"""The keeper: holds a run on a lab machine, whether or not the client's connection holds.

It takes the machine's lock, sets module parameters, starts the agent (`agent.py`) with a pipe to
each side, writes all that the agent says to a file (the *spool*), and waits at a UNIX socket. A
client comes through SSH, says how much of the spool it has, and gets the rest; it hears how many
bytes of commands have arrived, and sends on from there. So a connection may break at any byte.

The keeper ends when the agent has, or when no client came for a time; then it leaves nothing
behind: no process, no cgroup, no trace instance, no module parameter, no file but the artefact.

Runs on the lab machine, from the artefact (`artefact.py`). Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn

from harness.errors import HostError, HostUnavailable
from harness.host import kvm_parameters
from harness.host.machine_lock import machine_lock

#: In the environment of all processes of a run, so that those left behind can be found.
RUN_VARIABLE = "NSVM_RUN"

#: What a client sends when it has got the last line.
ACKNOWLEDGED = b"got it\n"

#: What this runs from; absolute, since the keeper works in its run's directory.
_ARTEFACT = os.path.abspath(sys.argv[0])
_SOCKET, _SPOOL, _LOG = "socket", "spool", "log"
_LOOK_S = 1.0
#: From closing the agent's input to SIGKILL; it gives its call 5 s to clean up.
_AGENT_END_S = 20.0
_DRAIN_S = 30.0
_SWEEP_S = 60.0
_PIECE = 1 << 16


# --- what a run leaves


def leftovers(run: str) -> list[int]:
    """Return the processes that were started by a run and are still there."""
    mark = f"{RUN_VARIABLE}={run}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return [pid for pid in found if pid != os.getpid()]


def end_leftovers(run: str) -> list[str]:
    """Kill what a run left behind; return its names."""
    names = []
    deadline = time.monotonic() + _DRAIN_S
    while (pids := leftovers(run)) and time.monotonic() < deadline:
        for pid in pids:
            with contextlib.suppress(OSError):
                names.append(f"{Path(f'/proc/{pid}/comm').read_text().strip()} ({pid})")
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    return sorted(set(names))


def _sweep() -> None:
    """Have the artefact remove cgroups and trace instances of processes that are gone."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        subprocess.run([sys.executable, _ARTEFACT, "sweep"], timeout=_SWEEP_S)


def _clean_after(directory: Path, stale: dict[str, Any]) -> None:
    """Remove what a run left whose keeper died."""
    if stale.get("run"):
        end_leftovers(stale["run"])
    kvm_parameters.give_back(directory / "parameters.json")
    shutil.rmtree(directory / "runs", ignore_errors=True)
    # Only with the lock: another run would still import from its own.
    for artefact in (directory / "code").iterdir():
        if artefact.name != Path(_ARTEFACT).name:
            artefact.unlink(missing_ok=True)
    if stale:
        _sweep()


# --- the run


class Keeper:
    """One agent, one spool, at most one client."""

    def __init__(
        self, agent: subprocess.Popen[bytes], listener: socket.socket, spool: Path
    ) -> None:
        if agent.stdin is None or agent.stdout is None:
            raise HostError("the agent was started without pipes")
        self._agent = agent
        self._stdin, self._stdout = agent.stdin, agent.stdout.fileno()
        os.set_blocking(self._stdin.fileno(), False)
        self._listener = listener
        self._spool = open(spool, "w+b", buffering=0)  # noqa: SIM115
        self._size = 0
        self._commands = b""
        self._received = 0
        self._client: socket.socket | None = None
        self._head: bytes | None = b""
        self._sent = 0
        #: Whether the agent has, and whether the client knows.
        self._ended = self._acknowledged = False

    def close(self) -> None:
        """Give the descriptors back; the client then knows that this is the end."""
        self._drop_client()
        self._spool.close()

    def serve(self, linger_s: float) -> bool:
        """Pass on until the agent has ended; False if there was no client for `linger_s`."""
        alone_since = time.monotonic()
        while not self._ended:
            self._turn()
            if self._client:
                alone_since = time.monotonic()
            elif time.monotonic() - alone_since > linger_s:
                return False
        return True

    def finish(self, said: dict[str, Any], linger_s: float) -> None:
        """Let a client have all there is, and this last line, which it acknowledges."""
        self._append(json.dumps(said).encode() + b"\n")
        deadline = time.monotonic() + linger_s
        while not self._acknowledged and time.monotonic() < deadline:
            self._turn()

    def _turn(self) -> None:
        """Wait for something to pass on, for a short time, and pass it on."""
        reading: list[Any] = [self._listener, *([] if self._ended else [self._stdout])]
        writing: list[Any] = [self._stdin] if self._commands and not self._ended else []
        if self._client:
            reading.append(self._client)
            if self._head is None and self._sent < self._size:
                writing.append(self._client)
        readable, writable, _ = select.select(reading, writing, [], _LOOK_S)
        if self._listener in readable:
            self._accept()
        elif self._client and self._client in readable:
            self._read_client()
        if self._client and self._client in writable:
            self._feed_client()
        if self._stdin in writable:
            self._feed_agent()
        if self._stdout in readable:
            self._read_agent()

    def _read_agent(self) -> None:
        data = os.read(self._stdout, _PIECE)
        self._append(data)
        self._ended = not data

    def _append(self, data: bytes) -> None:
        self._spool.seek(0, os.SEEK_END)
        self._spool.write(data)
        self._size += len(data)

    def _feed_agent(self) -> None:
        try:
            self._commands = self._commands[os.write(self._stdin.fileno(), self._commands) :]
        except BlockingIOError:
            return
        except BrokenPipeError:
            self._commands = b""

    def _accept(self) -> None:
        # One client at a time: the newer one is the one whose connection works.
        self._drop_client()
        self._client, _ = self._listener.accept()
        self._client.settimeout(_LOOK_S)
        self._head = b""

    def _drop_client(self) -> None:
        if self._client:
            self._client.close()
            self._client = None

    def _read_client(self) -> None:
        try:
            data = self._client.recv(_PIECE) if self._client else b""
        except OSError:
            data = b""
        if not data:
            self._drop_client()
        elif self._head is None:
            self._take(data)
        else:
            self._greet(self._head + data)

    def _greet(self, head: bytes) -> None:
        line, end, rest = head.partition(b"\n")
        self._head = head
        if end and self._client:
            self._sent = min(int(json.loads(line)["offset"]), self._size)
            self._client.sendall(json.dumps({"received": self._received}).encode() + b"\n")
            self._head = None
            self._take(rest)

    def _take(self, data: bytes) -> None:
        if self._ended:
            self._acknowledged = self._acknowledged or ACKNOWLEDGED in data
        else:
            self._commands += data
        self._received += len(data)

    def _feed_client(self) -> None:
        self._spool.seek(self._sent)
        try:
            if self._client:
                self._sent += self._client.send(self._spool.read(_PIECE))
        except OSError:
            self._drop_client()


def _keep(directory: Path, options: dict[str, Any], ready: int) -> None:
    """Hold one run from its beginning to its end; say on `ready` when a client may come."""
    run = options["owner"]["run"]
    home = directory / "runs" / run
    with ExitStack() as stack:
        lock = machine_lock(Path(options["lock"]), options["owner"], options.get("replaces", ""))
        stale = stack.enter_context(lock)
        _clean_after(directory, stale)
        home.mkdir(parents=True, mode=0o700)
        # The last to go, so that a client may still ask how it ended.
        stack.callback(shutil.rmtree, home, ignore_errors=True)
        record = directory / "parameters.json"
        borrowed = ExitStack()
        stack.enter_context(borrowed)
        borrowed.enter_context(kvm_parameters.borrowed(options["params"], record))
        # sun_path holds 107 bytes; the name alone always fits.
        os.chdir(home)
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(_SOCKET)
        listener.listen()
        agent = stack.enter_context(_started(run))
        keeper = Keeper(agent, listener, home / _SPOOL)
        stack.callback(keeper.close)
        answer = {"taken": run, "stale": stale, "boot_id": kvm_parameters.boot_id()}
        os.write(ready, json.dumps(answer).encode())
        os.close(ready)
        said: dict[str, Any] = {"event": "kept"}
        try:
            has_ended = keeper.serve(options["linger_s"])
        finally:
            said["status"] = _end(agent)
            said["log"] = Path(_LOG).read_text(errors="replace")[-2000:]
            said["killed"] = end_leftovers(run)
            _sweep()
            with _error_in(said):
                borrowed.close()
        if has_ended:
            keeper.finish(said, options["linger_s"])


@contextmanager
def _error_in(said: dict[str, Any]) -> Iterator[None]:
    try:
        yield
    except HostError as e:
        said["error"] = str(e)


@contextmanager
def _started(run: str) -> Iterator[subprocess.Popen[bytes]]:
    with open(_LOG, "wb") as log:
        agent = subprocess.Popen(
            [sys.executable, _ARTEFACT, "agent"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**os.environ, RUN_VARIABLE: run},
            start_new_session=True,
        )
    try:
        yield agent
    finally:
        _end(agent)


def _end(agent: subprocess.Popen[bytes]) -> int:
    """Close the agent's input, which tells it to clean up and end; return its status."""
    if agent.stdin and not agent.stdin.closed:
        with contextlib.suppress(OSError):
            agent.stdin.close()
    try:
        return agent.wait(_AGENT_END_S)
    except subprocess.TimeoutExpired:
        agent.kill()
        return agent.wait(_AGENT_END_S)


# --- commands


def take(directory: Path, options: dict[str, Any]) -> None:
    """Start a keeper that outlives this process, and print in one line of JSON how that went."""
    ours, ready = os.pipe()
    if os.fork() == 0:
        os.close(ours)
        _detach(directory, options, ready)
    os.close(ready)
    with open(ours, "rb") as pipe:
        print((pipe.read() or b'{"error": "the keeper died"}').decode(), flush=True)


def _detach(directory: Path, options: dict[str, Any], ready: int) -> NoReturn:
    status = 1
    try:
        os.setsid()
        if os.fork():
            os._exit(0)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        nothing = os.open(os.devnull, os.O_RDWR)
        for fd in range(3):
            os.dup2(nothing, fd)
        try:
            _keep(directory, options, ready)
            status = 0
        except (HostError, SystemExit) as e:
            _refuse(ready, str(e), unavailable=isinstance(e, HostUnavailable))
        except BaseException as e:
            _refuse(ready, f"{type(e).__name__}: {e}")
            with contextlib.suppress(OSError):
                (directory / "keeper.log").write_text(traceback.format_exc())
    finally:
        os._exit(status)


def _refuse(ready: int, words: str, *, unavailable: bool = False) -> None:
    """Say why a run does not begin; nobody listens any more once it has."""
    with contextlib.suppress(OSError):
        os.write(ready, json.dumps({"error": words, "unavailable": unavailable}).encode())


def attach(directory: Path, run: str, offset: int) -> None:
    """Be the way between a client's standard input and output and the keeper of its run.

    The first line of the output is the keeper's greeting; without a keeper, ``{"gone": ...}``, and
    then what the spool still has.
    """
    home = directory / "runs" / run
    with socket.socket(socket.AF_UNIX) as link:
        try:
            os.chdir(home)
            link.connect(_SOCKET)
            link.sendall(json.dumps({"offset": offset}).encode() + b"\n")
        except OSError:
            _tell_of_the_end(home / _SPOOL, offset)
            return
        # A keeper that is killed now resets this; whoever comes back learns that it is gone.
        with contextlib.suppress(ConnectionError):
            _relay(link)


def _tell_of_the_end(spool: Path, offset: int) -> None:
    """Say that the keeper is gone, and what it still had said."""
    gone = {"gone": True, "boot_id": kvm_parameters.boot_id()}
    os.write(1, json.dumps(gone).encode() + b"\n")
    with contextlib.suppress(OSError):
        said = spool.read_bytes()[offset:]
        # A line that was cut short is none.
        _write_all(1, said[: said.rfind(b"\n") + 1])


def _relay(link: socket.socket) -> None:
    while True:
        watched: list[Any] = [0, link]
        readable, _, _ = select.select(watched, [], [])
        if link in readable:
            data = link.recv(_PIECE)
            if not data:
                return
            _write_all(1, data)
        if 0 in readable:
            data = os.read(0, _PIECE)
            if not data:
                return
            link.sendall(data)


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


def main() -> None:
    """``take DIR OPTIONS``, or ``attach DIR RUN OFFSET``."""
    verb, where, *rest = sys.argv[1:]
    directory = Path(where).absolute()
    if verb == "take":
        take(directory, json.loads(rest[0]))
    elif verb == "attach":
        attach(directory, rest[0], int(rest[1]))
    else:
        raise SystemExit(f"unknown: {verb}")
