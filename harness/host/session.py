"""The outer end of an agent's channel: send a call, receive its events, notice a dead host."""

from __future__ import annotations

import json
import select
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

from harness.errors import HostError, HostLost

Event = dict[str, Any]

#: An agent says something every second; on a busy emulated host, sometimes later.
SILENCE_S = 20.0

#: For all of the tree's code: a second on silicon, a minute on an emulated host beside others.
_PRELOAD_S = 180.0

#: How long a cancelled session may take to notice.
_LOOK_S = 0.2


class Cancelled(HostError):
    """Somebody else no longer wants what was waited for; this says nothing about the host."""


class Pipe(Protocol):
    """What carries the lines: a socket or a pair of pipes."""

    def fileno(self) -> int: ...  # noqa: D102
    def receive(self) -> bytes: ...  # noqa: D102
    def transmit(self, data: bytes) -> None: ...  # noqa: D102


@dataclass
class CallResult:
    """How a call ended, with all that was said meanwhile.

    `outcome`: return, raise, died (by a signal or exit), timeout (and killed), stuck (in the
    kernel, SIGKILL did not help).
    """

    outcome: str
    value: Any = None
    error: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    tainted: tuple[int, int] = (0, 0)
    output: list[str] = field(default_factory=list)
    kmsg: list[Event] = field(default_factory=list)
    raw: Event = field(default_factory=dict)

    def unwrap(self, what: str) -> Any:
        """Return the value, or raise what went wrong as the host's or the harness's fault."""
        if self.outcome == "return":
            return self.value
        detail = self.error.get("message") if self.error else self.raw.get("status", "")
        kind = self.error.get("type", self.outcome) if self.error else self.outcome
        raise HostError(f"{what}: {kind}: {detail}".rstrip(": "))


class Session:
    """One running agent; one call at a time. Not thread-safe, except where it says so.

    `why_dead` looks for the cause when the channel ends or falls silent for `silence_s` seconds.
    """

    def __init__(
        self, pipe: Pipe, why_dead: Callable[[str], HostLost], silence_s: float = SILENCE_S
    ) -> None:
        self._pipe = pipe
        self.silence_s = silence_s
        """After so many seconds without a word the host counts as dead."""
        self._why_dead = why_dead
        self._buffer = b""
        self._next_id = 1
        self._cancelled = False

    def _command(self, command: Event, payload: bytes = b"") -> None:
        try:
            self._pipe.transmit(json.dumps(command).encode() + b"\n" + payload)
        except OSError as e:
            raise self._why_dead(f"the channel broke: {e.strerror or e}") from e

    def events(self, silence_s: float | None = None) -> Iterator[Event]:
        """Yield events as they come.

        Raises:
            HostLost: the channel ended, or nothing came for `silence_s` seconds.
            Cancelled: `cancel` was called.
        """
        silence_s = self.silence_s if silence_s is None else silence_s
        while True:
            deadline = time.monotonic() + silence_s
            while b"\n" not in self._buffer:
                if not self._is_ready(deadline):
                    raise self._why_dead(f"no sign of life for {silence_s:.0f} s")
                try:
                    chunk = self._pipe.receive()
                except OSError as e:
                    raise self._why_dead(f"the channel broke: {e.strerror or e}") from e
                if not chunk:
                    raise self._why_dead("the channel ended")
                self._buffer += chunk
            line, _, self._buffer = self._buffer.partition(b"\n")
            yield json.loads(line)

    def _is_ready(self, deadline: float) -> bool:
        """Wait until something can be read, and say whether that was so before the deadline."""
        while (left := deadline - time.monotonic()) > 0:
            if self._cancelled:
                raise Cancelled("cancelled")
            if select.select([self._pipe.fileno()], [], [], min(left, _LOOK_S))[0]:
                return True
        return False

    def wait_for(self, kind: str, timeout_s: float) -> Event:
        """Return the next event of this kind; heartbeats do not extend the deadline."""
        deadline = time.monotonic() + timeout_s
        for event in self.events(silence_s=timeout_s):
            if event["event"] == kind:
                return event
            if time.monotonic() > deadline:
                break
        raise self._why_dead(f"no {kind!r} within {timeout_s:.0f} s")

    def hello(self, timeout_s: float = SILENCE_S) -> Event:
        """Return the agent's description of its host."""
        self._command({"op": "hello"})
        return self.wait_for("hello", timeout_s)

    def preload(self, modules: list[str]) -> None:
        """Have an agent that has the tree's code already import `modules`."""
        self._command({"op": "preload", "modules": modules})
        self.wait_for("preloaded", _PRELOAD_S)

    def send_bundle(self, name: str, data: bytes) -> None:
        """Give the agent the tree's code as an archive."""
        self._command({"op": "bundle", "name": name, "size": len(data)}, data)
        self.wait_for("bundled", 60)

    def call(
        self,
        target: str,
        *,
        timeout_s: float,
        on_event: Callable[[Event], None] = lambda event: None,
        **kwargs: Any,
    ) -> CallResult:
        """Call `module:function` with `kwargs` in the host; return how it ended.

        Raises:
            HostLost: the host died meanwhile; what it had said was given to `on_event`.
        """
        return self._run({"target": target, "kwargs": kwargs, "timeout_s": timeout_s}, on_event)

    def converse(
        self,
        target: str,
        *,
        timeout_s: float,
        on_event: Callable[[Event], None] = lambda event: None,
        **kwargs: Any,
    ) -> CallResult:
        """Call a function that reads, from its standard input, what `send_input` sends.

        Raises:
            HostLost: as `call`.
        """
        command = {"target": target, "kwargs": kwargs, "timeout_s": timeout_s, "stdin": True}
        return self._run(command, on_event)

    def _run(self, command: Event, on_event: Callable[[Event], None]) -> CallResult:
        call_id, self._next_id = self._next_id, self._next_id + 1
        timeout_s = command["timeout_s"]
        self._command({"op": "call", "id": call_id, **command})
        result = CallResult("lost")
        # The agent gives up on a child within timeout_s and a little; a host that then still says
        # nothing but heartbeats has a broken agent.
        overdue = time.monotonic() + timeout_s + 4 * self.silence_s
        for event in self.events():
            if event.get("id") == call_id:
                on_event(event)
                if event["event"] == "output":
                    result.output.append(event["text"])
                elif event["event"] == "kmsg":
                    result.kmsg.append(event)
                elif event["event"] == "end":
                    result.outcome = event["outcome"]
                    result.value = event.get("value")
                    result.error = event.get("error", {})
                    result.seconds = event.get("seconds", 0.0)
                    before, after = event.get("tainted", (0, 0))
                    result.tainted = (before, after)
                    result.raw = event
                    return result
            if time.monotonic() > overdue:
                break
        raise self._why_dead(f"the call did not end within {timeout_s:.0f} s")

    # These may come from another thread than the one that waits for the call.

    def cancel(self) -> None:
        """Make whoever waits here get Cancelled at once; the session is of no use afterwards."""
        self._cancelled = True

    def send_input(self, text: str) -> None:
        """Give the running call something to read; see `converse`."""
        self._command({"op": "input", "text": text})

    def interrupt(self) -> None:
        """Send the running call SIGINT, as ^C at a terminal would."""
        self._command({"op": "interrupt"})

    def abort(self) -> None:
        """Ask the running call to clean up and end."""
        self._command({"op": "abort"})

    def power_off(self) -> None:
        """Tell the agent to stop; the emulated host then turns itself off."""
        self._command({"op": "power_off"})


class Host(Protocol):
    """A place where calls run. `start` may be called again after the host was lost."""

    kind: str

    def start(self) -> Session: ...  # noqa: D102
    def describe(self) -> dict[str, Any]: ...  # noqa: D102
    def close(self) -> None: ...  # noqa: D102

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
