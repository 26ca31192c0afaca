"""The agent: runs inside a host, calls functions of the harness there and streams what they say.

It speaks JSON lines over one channel (a virtio-serial port in the emulated host, a pipe on the
local one). Commands: `hello`, `bundle` (the tree's own code, followed by its bytes), `call`,
`input` (text for the call's standard input), `interrupt` (SIGINT), `abort` (SIGTERM), `power_off`.
Every call runs in a forked child, so that a crash, a hang or a leak ends with the call. What the
child reports, what it prints and what the kernel logs meanwhile leaves the host line by line, as it
happens: the kernel under test may die at any moment.

Standard library only, and nothing of the tree.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import faulthandler
import fcntl
import gc
import importlib
import json
import os
import platform
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Event = dict[str, Any]

_BEAT_S = 1.0
#: From SIGUSR2 (write all stacks) to SIGKILL, and from SIGKILL to "stuck in the kernel".
_DUMP_S = 1.0
_REAP_S = 10.0
#: For a call whose channel was closed: from SIGTERM to SIGKILL.
_CLEAN_UP_S = 5.0
#: For what a dead child's own children may go on to write.
_DRAIN_S = 1.0
_KVM_CREATE_VM = 0xAE01
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_BUNDLES = Path("/run/nsvm")


def open_idle_vm() -> tuple[int, ...]:
    """Create a VM that nobody uses; return the descriptors that keep it."""
    kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    return (kvm, fcntl.ioctl(kvm, _KVM_CREATE_VM, 0))


def power_off() -> None:
    """Turn the (emulated) machine off."""
    os.sync()
    # reboot(2): LINUX_REBOOT_CMD_POWER_OFF
    ctypes.CDLL(None).reboot(ctypes.c_int(0x4321FEDC))


class Channel:
    """JSON lines, and now and then a counted run of bytes, over two descriptors."""

    def __init__(self, reader: int, writer: int) -> None:
        self._reader = reader
        self._writer = writer
        self._pending = b""

    def fileno(self) -> int:
        """Return the descriptor to poll for commands."""
        return self._reader

    def send(self, event: Event) -> None:
        """Write one event as one line."""
        data = memoryview(json.dumps(event, separators=(",", ":"), default=repr).encode() + b"\n")
        while data:
            data = data[os.write(self._writer, data) :]

    def commands(self) -> list[Event]:
        """Return the whole lines that have arrived; a closed channel raises EOFError."""
        chunk = os.read(self._reader, 65536)
        if not chunk:
            raise EOFError("the channel was closed")
        self._pending += chunk
        found = []
        while b"\n" in self._pending:
            line, _, self._pending = self._pending.partition(b"\n")
            command = json.loads(line)
            if command["op"] == "bundle":
                # The bytes behind this line are not lines.
                command["data"], self._pending = self._exactly(self._pending, command["size"])
            found.append(command)
        return found

    def _exactly(self, have: bytes, size: int) -> tuple[bytes, bytes]:
        parts, got = [have], len(have)
        while got < size:
            chunk = os.read(self._reader, min(1 << 20, size - got))
            if not chunk:
                raise EOFError("the channel was closed within a bundle")
            parts.append(chunk)
            got += len(chunk)
        data = b"".join(parts)
        return data[:size], data[size:]


def hello() -> Event:
    """Describe this host: what the kernel says of itself, not what anybody configured."""
    parameters = {}
    for module in ("kvm", "kvm_amd", "kvm_intel"):
        for path in sorted(Path(f"/sys/module/{module}/parameters").glob("*")):
            with contextlib.suppress(OSError):
                parameters[f"{module}.{path.name}"] = path.read_text().strip()
    return {
        "event": "hello",
        "release": platform.release(),
        "version": platform.version(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "params": parameters,
        "cmdline": Path("/proc/cmdline").read_text().strip(),
        "tainted": _tainted(),
    }


def _tainted() -> int:
    return int(Path("/proc/sys/kernel/tainted").read_text())


class Kmsg:
    """The kernel log from one moment on, record by record (Documentation/ABI/testing/dev-kmsg)."""

    def __init__(self) -> None:
        try:
            self.fd: int | None = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            # Not ours to read, or not there in a container: `nsvm doctor` says which.
            self.fd = None
        self.skip()

    def skip(self) -> None:
        """Start a new window: what was logged before does not count."""
        if self.fd is not None:
            os.lseek(self.fd, 0, os.SEEK_END)

    def records(self) -> list[Event]:
        """Return what has been logged since; a lost record is said, not hidden."""
        found: list[Event] = []
        while self.fd is not None:
            try:
                raw = os.read(self.fd, 8192).decode(errors="replace")
            except BlockingIOError:
                break
            except OSError as e:
                if e.errno != errno.EPIPE:
                    raise
                found.append({"level": 4, "text": "(kernel log records were overwritten)"})
                continue
            head, _, text = raw.partition(";")
            priority, _, stamp, *_ = head.split(",")
            line = text.splitlines()[0] if text else ""
            found.append({"level": int(priority) & 7, "text": line, "at_us": int(stamp)})
        return found


class Input:
    """A child's standard input. Nothing here waits for the child: what it does not read is kept."""

    def __init__(self) -> None:
        self.child_end, self.fd = os.pipe()
        os.set_blocking(self.fd, False)
        self.pending = b""

    def put(self, data: bytes) -> None:
        """Add to what the child reads."""
        self.pending += data
        self.flush()

    def flush(self) -> None:
        """Write as much as there is room for; a child that closed its end wants no more."""
        with contextlib.suppress(BlockingIOError):
            try:
                while self.pending:
                    self.pending = self.pending[os.write(self.fd, self.pending) :]
            except BrokenPipeError:
                self.pending = b""


class Call:
    """One function call in a child of its own."""

    def __init__(self, command: Event, close_in_child: list[int]) -> None:
        self.id = command["id"]
        self.deadline = time.monotonic() + float(command["timeout_s"])
        self.started = time.monotonic()
        self.tainted = _tainted()
        self.state = "running"
        self.result: Event | None = None
        self.buffers: dict[int, bytes] = {}
        self.events, event_end = os.pipe()
        self.output, output_end = os.pipe()
        self.input = Input() if command.get("stdin") else None
        self.pid = os.fork()
        if self.pid == 0:
            unwanted = [self.events, self.output, *close_in_child]
            if self.input:
                unwanted.append(self.input.fd)
            input_end = self.input.child_end if self.input else os.open(os.devnull, os.O_RDONLY)
            _child(command, event_end, output_end, input_end, unwanted)
        for fd in (event_end, output_end, *([self.input.child_end] if self.input else [])):
            os.close(fd)
        self.pidfd = os.pidfd_open(self.pid)
        self.open = [self.events, self.output]

    def lines(self, fd: int) -> list[str]:
        """Return whole lines from the child's pipe `fd`; its end closes it."""
        chunk = os.read(fd, 65536)
        if not chunk:
            self.open.remove(fd)
            os.close(fd)
            rest = self.buffers.pop(fd, b"")
            return [rest.decode(errors="replace")] if rest else []
        *lines, self.buffers[fd] = (self.buffers.get(fd, b"") + chunk).split(b"\n")
        return [line.decode(errors="replace") for line in lines]

    def remaining(self) -> Iterator[tuple[int, str]]:
        """Yield what a dead child left in its pipes: descriptor and line.

        A process that the child left behind may hold the pipes open and even write on, so their
        end is not waited for.
        """
        until = time.monotonic() + _DRAIN_S
        while (ready := select.select(self.open, [], [], 0)[0]) and time.monotonic() < until:
            for fd in ready:
                for line in self.lines(fd):
                    yield fd, line
        for fd, rest in self.buffers.items():
            if rest:
                yield fd, rest.decode(errors="replace")

    def end(self) -> None:
        """Let the child clean up and end, and kill it if it does not; what it says is lost."""
        signal.pidfd_send_signal(self.pidfd, signal.SIGTERM)
        until = time.monotonic() + _CLEAN_UP_S
        while (left := until - time.monotonic()) > 0:
            ready = select.select([self.pidfd, *self.open], [], [], left)[0]
            if self.pidfd in ready:
                return
            # Read, so that the child does not wait for room in a pipe.
            for fd in ready:
                self.lines(fd)
        signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def expire(self) -> None:
        """Go one step further in getting rid of the child: stacks, SIGKILL, giving up."""
        now = time.monotonic()
        if self.state == "running":
            self.state, self.deadline = "dumping", now + _DUMP_S
            signal.pidfd_send_signal(self.pidfd, signal.SIGUSR2)
        elif self.state == "dumping":
            self.state, self.deadline = "killed", now + _REAP_S
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        else:
            self.state = "stuck"

    def kernel_stacks(self) -> dict[str, str]:
        """Return where each of the child's threads is in the kernel, if the kernel tells."""
        stacks = {}
        for task in Path(f"/proc/{self.pid}/task").glob("*"):
            with contextlib.suppress(OSError):
                stacks[task.name] = (task / "stack").read_text()
        return stacks

    def close(self) -> None:
        """Give the descriptors back."""
        for fd in [*self.open, self.pidfd, *([self.input.fd] if self.input else [])]:
            os.close(fd)


def _child(
    command: Event, events: int, output: int, standard_input: int, unwanted: list[int]
) -> None:
    """Run the call and exit; never returns."""
    status = 1
    try:
        for fd in unwanted:
            os.close(fd)
        # A local agent's standard input is its channel.
        os.dup2(standard_input, 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        faulthandler.enable(file=2)
        faulthandler.register(signal.SIGUSR2, file=2, all_threads=True)
        # SIGTERM must run the context managers that give the machine back as it was.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        # Also if the agent itself is killed: nobody else would end this call.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        # An agent that was started in the background may have inherited SIG_IGN.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        status = _invoke(command, Channel(-1, events).send)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _invoke(command: Event, send: Callable[[Event], None]) -> int:
    def emit(kind: str, **data: Any) -> None:
        send({"event": "emit", "kind": kind, "data": data})

    module, _, name = command["target"].partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
        value = function(emit=emit, **command["kwargs"])
        send({"event": "result", "outcome": "return", "value": value})
    except BaseException as e:
        error = {
            "type": type(e).__name__,
            "bases": [c.__name__ for c in type(e).__mro__],
            "message": str(e),
            "traceback": traceback.format_exc(),
        }
        send({"event": "result", "outcome": "raise", "error": error})
    return 0


class Agent:
    """The loop around one channel."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.kmsg = Kmsg()
        self.call: Call | None = None
        self.bundle = ""
        self.last_sent = 0.0

    def send(self, event: Event) -> None:
        """Send an event; anything sent counts as a heartbeat."""
        self.channel.send(event)
        self.last_sent = time.monotonic()

    def loop(self) -> None:
        """Serve until the channel closes or a command says so."""
        poller = select.poll()
        while True:
            for fd, mask in (poller_fds := self._fds()).items():
                poller.register(fd, mask)
            ready = [fd for fd, _ in poller.poll(self._wait_ms())]
            for fd in poller_fds:
                poller.unregister(fd)
            for fd in ready:
                self._serve(fd)
            self._watch()

    def _fds(self) -> dict[int, int]:
        """Return what to poll, and for what."""
        fds = [self.channel.fileno()]
        if self.call:
            fds += [*self.call.open, self.call.pidfd]
        masks = dict.fromkeys(fds, select.POLLIN)
        if self.call and self.call.input and self.call.input.pending:
            masks[self.call.input.fd] = select.POLLOUT
        return masks

    def _wait_ms(self) -> float:
        # While a call runs, the kernel log is looked at often: its splats are the last words.
        return 100.0 if self.call else _BEAT_S * 1000

    def _serve(self, fd: int) -> None:
        if fd == self.channel.fileno():
            for command in self.channel.commands():
                getattr(self, "_op_" + command["op"])(command)
        elif self.call and fd in self.call.open:
            for line in self.call.lines(fd):
                self._from_child(self.call, fd, line)
        elif self.call and self.call.input and fd == self.call.input.fd:
            self.call.input.flush()

    def _from_child(self, call: Call, fd: int, line: str) -> None:
        if fd == call.output:
            self.send({"event": "output", "id": call.id, "text": line})
            return
        try:
            event = json.loads(line)
        except ValueError:
            # A child that is killed while it writes leaves half a line.
            self.send({"event": "output", "id": call.id, "text": f"(cut short) {line}"})
            return
        if event["event"] == "result":
            call.result = event
        else:
            self.send({**event, "id": call.id})

    def _watch(self) -> None:
        """Forward the kernel log, end calls that are over or overdue, and send a heartbeat."""
        call = self.call
        if call:
            self._forward_log(call)
            if time.monotonic() > call.deadline:
                call.expire()
            if call.state == "stuck":
                self._finish(call, {"outcome": "stuck", "stacks": call.kernel_stacks()})
            elif select.select([call.pidfd], [], [], 0)[0]:
                self._reap(call)
        if time.monotonic() - self.last_sent >= _BEAT_S:
            self.send({"event": "beat"})

    def _forward_log(self, call: Call) -> None:
        for record in self.kmsg.records():
            self.send({"event": "kmsg", "id": call.id, **record})

    def _reap(self, call: Call) -> None:
        for fd, line in call.remaining():
            self._from_child(call, fd, line)
        _, status = os.waitpid(call.pid, 0)
        if call.state != "running":
            end: Event = {"outcome": "timeout"}
        elif call.result is not None:
            end = {k: v for k, v in call.result.items() if k != "event"}
        else:
            end = {"outcome": "died", "status": os.waitstatus_to_exitcode(status)}
        self._finish(call, end)

    def _finish(self, call: Call, end: Event) -> None:
        self._forward_log(call)
        self.call = None
        call.close()
        self.send({
            "event": "end",
            "id": call.id,
            **end,
            "seconds": round(time.monotonic() - call.started, 3),
            "tainted": [call.tainted, _tainted()],
        })  # fmt: skip

    def _op_hello(self, command: Event) -> None:
        readable = self.kmsg.fd is not None
        self.send({**hello(), "bundle": self.bundle, "kernel_log": readable})

    def _op_bundle(self, command: Event) -> None:
        _BUNDLES.mkdir(exist_ok=True)
        path = _BUNDLES / f"{command['name']}.zip"
        path.write_bytes(command["data"])
        sys.path.insert(0, str(path))
        self.bundle = command["name"]
        self.send({"event": "bundled", "name": command["name"]})

    def _op_preload(self, command: Event) -> None:
        for module in command["modules"]:
            importlib.import_module(module)
        # What is shared with every child stays out of the collector's and copy-on-write's way.
        gc.freeze()
        self.send({"event": "preloaded"})

    def _op_call(self, command: Event) -> None:
        if self.call:
            self.send({"event": "end", "id": command["id"], "outcome": "busy"})
            return
        self.kmsg.skip()
        unwanted = sorted({self.channel.fileno(), self.channel._writer} - {0, 1, 2})
        self.call = Call(command, unwanted)
        self.send({"event": "begin", "id": command["id"], "pid": self.call.pid})

    def _op_input(self, command: Event) -> None:
        if self.call and self.call.input:
            self.call.input.put(command["text"].encode())

    def _op_interrupt(self, command: Event) -> None:
        if self.call:
            signal.pidfd_send_signal(self.call.pidfd, signal.SIGINT)

    def _op_abort(self, command: Event) -> None:
        if self.call:
            signal.pidfd_send_signal(self.call.pidfd, signal.SIGTERM)

    def _op_power_off(self, command: Event) -> None:
        raise EOFError("told to stop")


def serve(reader: int, writer: int, hold: object = None) -> None:
    """Serve one channel until it closes. `hold` is kept alive meanwhile."""
    agent = Agent(Channel(reader, writer))
    agent.send({"event": "ready"})
    try:
        agent.loop()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        if agent.call:
            agent.call.end()
    del hold


if __name__ == "__main__":
    # A local host: commands on standard input, events on a copy of standard output.
    events = os.dup(1)
    os.dup2(2, 1)
    serve(0, events)
