"""Processes that a machine goes to and fro between, and what they report to the one that made them.

Each is forked, does its part, and tells what it sees line by line. They end with the `with`.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, Final, Self

from harness.errors import HostError, NsvmError, ScenarioFailure
from harness.migrate.errors import LinkLost, Refused
from kvm_ioctl.request import KvmError

_END_S: Final = 10.0
_LOOK_S: Final = 0.01
_ALIVE_S: Final = 1.0
"""How often it is looked whether a silent process is still there."""
_CAUSE_S: Final = 5.0
"""How long it is waited for what is behind a lost link."""
_LONGEST_ERROR: Final = 1500
"""Characters: a report is one write of less than PIPE_BUF, even if each takes two bytes."""


class Reporter:
    """A process's end of the pipe: `report(move={...})`."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __call__(self, **event: Any) -> None:
        """Report something, in less than PIPE_BUF bytes: then lines of several do not mix."""
        os.write(self._fd, json.dumps(event).encode() + b"\n")


Event = Mapping[str, Any]
Take = Callable[[Event], None]

Part = Callable[[Reporter], None]
"""What a process does."""


class Processes:
    """Forked processes, one for each part; a context manager that ends them.

    A part that ends by an error reports `error`, a text; `failure`, whether that is an answer of
    KVM's to something that must work; and `lost`, whether it only says that the other end is gone.
    Then what matters is why that is: another process's error, which may come later, or how it
    ended, with what it last wrote to its standard error.
    """

    def __init__(self, parts: Sequence[Part], what: str) -> None:
        """Prepare them.

        Args:
            parts: what they do; each is called in its process.
            what: they are doing, for errors.

        """
        self._parts = parts
        self._what = what
        self._pids: list[int] = []
        self._reports, self._writer = os.pipe()
        self._pending = b""
        self._fallen: list[str] = []
        self._said: dict[int, BinaryIO] = {}

    def __enter__(self) -> Self:
        for part in self._parts:
            said = tempfile.TemporaryFile()
            pid = self._fork(part, said.fileno())
            self._pids.append(pid)
            self._said[pid] = said
        os.close(self._writer)
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        os.close(self._reports)
        deadline = time.monotonic() + _END_S
        try:
            while left := self._look():
                if time.monotonic() > deadline:
                    raise HostError(
                        f"{self._what}: process {left[0]} does not end within {_END_S:g} s"
                    )
                time.sleep(_LOOK_S)
        finally:
            for said in self._said.values():
                said.seek(0)
                sys.stderr.write(said.read().decode(errors="replace"))
                said.close()

    def kill(self) -> None:
        """End them all; from any thread. Whoever watches them learns of it."""
        for pid in list(self._pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def watch(
        self,
        take: Take,
        *,
        until: Callable[[], bool],
        silence_s: float,
    ) -> None:
        """Hand on what the processes report until there is enough.

        Raises HostError: one was killed, all are gone, or silent for `silence_s` seconds.
        """
        while not until():
            for event in self._next(silence_s):
                take(self._cause_of(event) if event.get("lost") else event)

    @contextlib.contextmanager
    def explaining(self, take: Take) -> Iterator[None]:
        """Hand on why a link to one of the processes was lost, if it is in this `with`."""
        try:
            yield
        except LinkLost as e:
            take(self._cause_of(_error_event(e)))
            raise

    def _cause_of(self, lost: Event) -> Event:
        """Return what another process ended with, if it ends; else how one did, or the same."""
        deadline = time.monotonic() + _CAUSE_S
        while (left := deadline - time.monotonic()) > 0:
            if not select.select([self._reports], [], [], left)[0]:
                break
            data = os.read(self._reports, 1 << 16)
            for event in self._lines(data):
                if "error" in event and not event.get("lost"):
                    return event
            if not data and not self._look():
                break
        self._look()
        return {**lost, "error": "; ".join([*self._fallen, lost["error"]])}

    def _look(self) -> list[int]:
        """Return what is left of the processes; note how the others ended."""
        for pid in list(self._pids):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self._pids.remove(pid)
                if status:
                    self._fallen.append(
                        f"process {pid} ended: {_ending(status)}{self._last_words(pid)}"
                    )
        return self._pids

    def _last_words(self, pid: int) -> str:
        said = self._said[pid]
        lines = os.pread(said.fileno(), _LONGEST_ERROR, 0).decode(errors="replace").split("\n")
        return next((f" ({line.strip()})" for line in reversed(lines) if line.strip()), "")

    def _await(self, silence_s: float) -> None:
        deadline = time.monotonic() + silence_s
        while (left := deadline - time.monotonic()) > 0:
            if select.select([self._reports], [], [], min(left, _ALIVE_S))[0]:
                return
            self._look()
            if self._fallen:
                raise HostError(f"{self._what}: {self._fallen[0]}")
        raise HostError(f"{self._what}: no process said anything for {silence_s:g} s")

    def _next(self, silence_s: float) -> Iterator[Event]:
        self._await(silence_s)
        data = os.read(self._reports, 1 << 16)
        if not data:
            raise HostError(f"{self._what}: all processes have ended")
        return self._lines(data)

    def _lines(self, data: bytes) -> Iterator[Event]:
        *lines, self._pending = (self._pending + data).split(b"\n")
        return map(json.loads, lines)

    def _fork(self, part: Part, stderr_fd: int) -> int:
        pid = os.fork()
        if pid:
            return pid
        status = 1
        try:
            os.close(self._reports)
            os.dup2(stderr_fd, 2)
            _do(part, Reporter(self._writer))
            status = 0
        finally:
            # Nothing of what this process inherited is its own to clean up.
            os._exit(status)


def _ending(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return f"exit status {code}" if code >= 0 else signal.Signals(-code).name


def _do(part: Part, report: Reporter) -> None:
    try:
        part(report)
    except (NsvmError, KvmError) as e:
        report(**_error_event(e))
    except Exception:
        report(error=traceback.format_exc()[-_LONGEST_ERROR:], failure=False, lost=False)


def _error_event(error: NsvmError | KvmError) -> dict[str, Any]:
    return {
        "error": str(error)[:_LONGEST_ERROR],
        # KVM's answer to something that must work.
        "failure": isinstance(error, ScenarioFailure | Refused | KvmError),
        "lost": isinstance(error, LinkLost),
    }
