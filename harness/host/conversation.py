"""The outer end of a prompt in a host: requests go in, what is printed and the answers come out."""

from __future__ import annotations

import json
import math
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

from harness.errors import HostError, NsvmError
from harness.host.session import CallResult, Event, Session

#: How long a prompt may stay open. Somebody sits in front of it: this only ends forgotten ones.
OPEN_S = 7 * 86400.0
#: For the inner end to come up, to answer after an interrupt, and to end.
START_S = 60.0
GRACE_S = 20.0
_END_S = 15.0

_LOOK_S = 0.2


class Conversation:
    """A running call that takes requests one at a time; a context manager that ends it.

    The call's events are read in a thread of its own, so that the host's signs of life, and its
    death, are noticed while nobody asks for anything. ^C does not break in anywhere: it is counted,
    and passed on.
    """

    def __init__(
        self, session: Session, target: str, on_event: Callable[[Event], None], **kwargs: Any
    ) -> None:
        """Prepare to call `target`, whose events but the answers go to `on_event`."""
        self._session = session
        self._target = target
        self._on_event = on_event
        self._kwargs = kwargs
        self._events: queue.SimpleQueue[Event | CallResult | NsvmError] = queue.SimpleQueue()
        self._number = 0
        self._interrupts = 0
        self._over = False
        self._previous: Any = None
        self._thread = threading.Thread(target=self._call, name="conversation", daemon=True)
        self.result: CallResult | None = None
        """How the call ended, once it has."""

    def __enter__(self) -> Self:
        """Start the call and wait until it is ready. To be done in the main thread.

        Raises HostError: it does not come up.
        """
        self._previous = signal.signal(signal.SIGINT, self._on_interrupt)
        self._thread.start()
        try:
            self._wait("ready", None, START_S, self._interrupts)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let ^C raise KeyboardInterrupt meanwhile; for whoever waits for the user."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, self._on_interrupt)

    def _on_interrupt(self, _number: int, _frame: FrameType | None) -> None:
        self._interrupts += 1

    def ask(self, do: str, timeout_s: float | None = None, **arguments: str) -> dict[str, Any]:
        """Send a request and return its answer; ^C meanwhile interrupts what it does.

        Args:
            do: what to do.
            timeout_s: when it is interrupted all the same; None: only ^C does that.
            arguments: of the request.

        After GRACE_S seconds, or at the timeout, it is interrupted once more, for the last time.

        Raises HostError: it did not stop within GRACE_S seconds of that, or the call ended.
        Raises HostLost: the host died.

        """
        self._number += 1
        seen = self._interrupts
        request = {"do": do, "number": self._number, **arguments}
        self._session.send_input(json.dumps(request) + "\n")
        return self._wait("answer", self._number, timeout_s, seen)

    def look(self) -> None:
        """Hand on what has come unasked: the kernel's log, or the end of the host."""
        while not self._events.empty():
            if (event := self._next(0)) is not None:
                self._handle(event)

    def _call(self) -> None:
        try:
            end: CallResult | NsvmError = self._session.converse(
                self._target, timeout_s=OPEN_S, on_event=self._events.put, **self._kwargs
            )
        except NsvmError as e:
            end = e
        except (OSError, ValueError) as e:
            # The host was closed, and the channel with it, while this thread was reading.
            end = HostError(f"the channel broke: {e}")
        self._events.put(end)

    def _wait(
        self, kind: str, number: int | None, timeout_s: float | None, passed_on: int
    ) -> dict[str, Any]:
        interrupt_at = None if timeout_s is None else time.monotonic() + timeout_s
        give_up_at = None
        while True:
            event = self._next(_LOOK_S)
            if self._interrupts > passed_on:
                passed_on = self._interrupts
                self._session.interrupt()
                interrupt_at = min(interrupt_at or math.inf, time.monotonic() + GRACE_S)
            if event is not None and (data := self._handle(event, kind, number)) is not None:
                return data
            now = time.monotonic()
            if give_up_at is not None and now > give_up_at:
                raise HostError(f"no answer within {GRACE_S:.0f} s of an interrupt")
            if give_up_at is None and interrupt_at is not None and now > interrupt_at:
                self._session.interrupt()
                give_up_at = now + GRACE_S

    def _next(self, timeout_s: float) -> Event | CallResult | NsvmError | None:
        try:
            event = self._events.get(timeout=timeout_s)
        except queue.Empty:
            return None
        self._over = not isinstance(event, dict)
        if isinstance(event, CallResult):
            self.result = event
        return event

    def _handle(
        self, event: Event | CallResult | NsvmError, kind: str = "", number: int | None = None
    ) -> dict[str, Any] | None:
        """Return the data of the event that is waited for; hand any other on."""
        if isinstance(event, NsvmError):
            raise event
        if isinstance(event, CallResult):
            event.unwrap("the prompt ended")
            raise HostError("the prompt ended")
        if event["event"] == "emit" and event["kind"] in ("answer", "ready"):
            data: dict[str, Any] = event["data"]
            if event["kind"] == kind and data.get("number") == number:
                return data
            return None
        self._on_event(event)
        return None

    def _end(self) -> None:
        """Let the call clean up and end; one that does not ends with its host."""
        try:
            if not self._over:
                self._session.abort()
            until = time.monotonic() + _END_S
            while not self._over and time.monotonic() < until:
                event = self._next(_LOOK_S)
                if isinstance(event, dict) and event["event"] != "emit":
                    self._on_event(event)
        except NsvmError:
            # The host has gone; whoever asked last was told.
            return
        finally:
            signal.signal(signal.SIGINT, self._previous or signal.default_int_handler)
