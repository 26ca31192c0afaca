"""A trace instance of our own: its buffer, its events, its options, and nobody else's.

Documentation/trace/ftrace.rst, "Instances". The instance is removed on leaving; instances of
processes that were killed are removed by the next one that arms a probe.
"""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from harness.errors import HarnessError, HostError
from harness.probe.interruption import Borrowed

TRACEFS = Path("/sys/kernel/tracing")
_PREFIX = "nsvm-"


@dataclass(frozen=True)
class TraceEvent:
    """One recorded event: thread, name, fields as printed, kernel stack (innermost first)."""

    tid: int
    name: str
    fields: dict[str, str]
    stack: tuple[str, ...] = ()


def write(path: Path, text: str, *, append: bool = False) -> None:
    """Write a control file; a refusal names the file.

    Raises:
        HostError: no permission, or the kernel does not take it.
    """
    # Not open(): its seek to the end is refused by the kernel's sequence files.
    flags = os.O_WRONLY | os.O_CLOEXEC | (os.O_APPEND if append else os.O_TRUNC)
    try:
        file = os.open(path, flags)
        try:
            os.write(file, text.encode())
        finally:
            os.close(file)
    except OSError as e:
        raise HostError(f"{path}: writing {text.strip()!r}: {e.strerror}") from e


def own_threads() -> set[int]:
    """Return the ids of this process's threads."""
    return {int(path.name) for path in Path("/proc/self/task").iterdir()}


def require_tracefs() -> None:
    """Check that tracefs is there and ours to use.

    Raises:
        HostError: it is not mounted, or not accessible.
    """
    if not (TRACEFS / "instances").is_dir():
        raise HostError(f"tracefs is not available at {TRACEFS} (mounted? readable? root needed)")
    if not os.access(TRACEFS / "instances", os.W_OK):
        raise HostError(f"no permission to create trace instances in {TRACEFS} (root needed)")


class TraceInstance(Borrowed):
    """A context manager around one instance.

    Without `all_tasks` only this process's threads are recorded.
    """

    def __init__(
        self, label: str, *, buffer_kib: int = 8192, stacks: bool = False, all_tasks: bool = False
    ) -> None:
        self.path = TRACEFS / "instances" / f"{_PREFIX}{label}-{os.getpid()}"
        self._buffer_kib = buffer_kib
        self._stacks = stacks
        self._all_tasks = all_tasks
        self._pipe = -1
        self._made = False

    def _borrow(self) -> None:
        require_tracefs()
        remove_leftovers()
        try:
            self.path.mkdir()
        except OSError as e:
            raise HostError(f"trace instance {self.path}: {e.strerror}") from e
        self._made = True
        write(self.path / "buffer_size_kb", str(self._buffer_kib))
        write(self.path / "options/stacktrace", "1" if self._stacks else "0")
        if not self._all_tasks:
            write(self.path / "options/event-fork", "1")
            write(self.path / "set_event_pid", " ".join(map(str, sorted(own_threads()))))
        self._pipe = os.open(self.path / "trace_pipe", os.O_RDONLY | os.O_NONBLOCK)

    def _give_back(self) -> None:
        if not self._made:
            return
        self._made = False
        write(self.path / "tracing_on", "0")
        write(self.path / "events/enable", "0")
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1
        self.path.rmdir()

    def enable(self, event: str) -> None:
        """Start recording ``group/name``."""
        write(self.path / "events" / event / "enable", "1")

    def take(self) -> list[TraceEvent]:
        """Return what was recorded since the last call.

        The pipe is read, which consumes what it gives: nothing is lost between two calls.

        Raises:
            HarnessError: the buffer was too small and events are lost.
        """
        chunks = []
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(self._pipe, 1 << 16):
                chunks.append(chunk)
        self._check_overruns()
        return parse(b"".join(chunks).decode(errors="replace"))

    def _check_overruns(self) -> None:
        for stats in self.path.glob("per_cpu/cpu*/stats"):
            lost = re.search(r"^overrun: (\d+)", stats.read_text(), re.M)
            if lost and int(lost[1]):
                raise HarnessError(f"trace buffer too small: {lost[1]} events lost")


# "comm-tid [cpu] flags stamp: " and then "name: fields", or "<stack trace>" for the event before
# it.
_LINE = re.compile(r"^.*-(\d+)\s+(\[\d+\]) \S+\s+[\d.]+: (?:(\w+): (.*)|<stack trace>)$")
# KVM's older events print "name: value".
_FIELD = re.compile(r"(\w+)(?:=|: )(\S+)")


def parse(text: str) -> list[TraceEvent]:
    """Return the events of a trace, each with its stack if one was recorded.

    Events of several CPUs are interleaved, and an interrupt's may come between an event and its
    stack: a stack belongs to the last event without one of its own thread on its own CPU.
    """
    found: list[tuple[int, str, str, list[str]]] = []
    waiting: dict[tuple[str, str], list[list[str]]] = {}
    stack: list[str] = []
    for line in text.splitlines():
        if line.startswith(" => "):
            stack.append(line[4:].partition("+")[0].strip())
        elif match := _LINE.match(line):
            tid, cpu, name, rest = match.groups()
            if name is None:
                before = waiting.get((tid, cpu))
                stack = before.pop() if before else []
            else:
                own: list[str] = []
                waiting.setdefault((tid, cpu), []).append(own)
                found.append((int(tid), name, rest, own))
    return [
        TraceEvent(tid, name, dict(_FIELD.findall(rest)), tuple(own))
        for tid, name, rest, own in found
    ]


def remove_leftovers() -> None:
    """Remove instances and probes of processes of ours that no longer exist."""
    for instance in (TRACEFS / "instances").glob(f"{_PREFIX}*-*"):
        if not Path("/proc", instance.name.rpartition("-")[2]).exists():
            with contextlib.suppress(OSError, HostError):
                write(instance / "events/enable", "0")
                instance.rmdir()
    for line in kprobe_definitions():
        group = line.split(":", 1)[1].split("/")[0]
        if group.startswith("nsvm_") and not Path("/proc", group[5:]).exists():
            with contextlib.suppress(HostError):
                write(
                    TRACEFS / "kprobe_events",
                    f"-:{line.split(':', 1)[1].split()[0]}\n",
                    append=True,
                )


def kprobe_definitions() -> list[str]:
    """Return the kernel's dynamic function events; none where the kernel has no kprobes."""
    try:
        return (TRACEFS / "kprobe_events").read_text().splitlines()
    except FileNotFoundError:
        return []
