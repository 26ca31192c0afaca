"""Boots the next level's Linux, lets it go on from there, and passes on what it says."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from harness.errors import HostError, HostLost
from harness.host.session import CallResult, Event
from harness.nest.guest import LinuxGuest
from harness.nest.host_memory import host_memory
from harness.nest.payload import find_source
from harness.nest.plan import ENOUGH, READY, Plan
from harness.nest.pulse import Pulse
from kvm_ioctl.handles import Kvm

Emit = Callable[..., None]

TARGET = "harness.nest.levels:descend"


class LevelFailed(HostError):
    """A level said that something went wrong; which, and what, is in the message."""


def boot_level(emit: Emit, level: int, plan: Plan) -> dict[str, Any]:
    """Boot Linux as this level, have it do its part of the plan; return its and deeper reports.

    Raises HostLost: the level died; a `lost` event says which, with its last console lines.
    Raises LevelFailed: it, or a deeper one, reports an error.
    """
    emit = _one_at_a_time(emit)
    started = time.monotonic()
    with ExitStack() as stack:
        if level == 1:
            emit = _with_memory(emit, stack.enter_context(host_memory(emit)))

        def stage(what: str) -> None:
            emit("stage", level=level, what=what, seconds=round(time.monotonic() - started, 2))

        guest = stack.enter_context(_boot(stack.enter_context(Kvm()), emit, level, plan))
        stage("entered")
        if level == 1:
            # Deeper ones would pay for it, and their life shows in L1's numbers.
            stack.enter_context(Pulse(emit, level, guest.pc))
        try:
            guest.session.wait_for("ready", plan.boot_s(level))
            stage(READY)
            result = _descend_in(guest, emit, level, plan)
        except HostLost as e:
            emit("lost", level=level, why=str(e), console=e.console)
            raise
        stage("done")
        return _value(guest.name, result)


def _boot(kvm: Kvm, emit: Emit, level: int, plan: Plan) -> LinuxGuest:
    return LinuxGuest(
        kvm,
        find_source(),
        name=f"L{level}",
        shows_source=level < plan.linux_levels,
        vcpus=plan.vcpus,
        memory_mib=plan.memory_mib(level),
        options=lambda tsc_khz: f"{plan.options} {plan.clock_options(level, tsc_khz)}",
        life_s=plan.boot_s(level) + plan.call_s(level),
        silence_s=plan.silence_s(level),
        on_console=lambda text: emit("console", level=level, text=text),
    )


def _descend_in(guest: LinuxGuest, emit: Emit, level: int, plan: Plan) -> CallResult:
    with _moving(emit, guest, plan.moves if level == 1 else 0) as begin_moves:

        def take(event: Event) -> None:
            _pass_on(emit, level, event)
            if event["event"] == "emit" and event["data"].get("what") == plan.moves_from:
                begin_moves()

        return guest.session.converse(
            TARGET,
            timeout_s=plan.call_s(level),
            on_event=take,
            level=level,
            plan=plan.to_json(),
        )


def _with_memory(emit: Emit, tell: Callable[[dict[str, Any]], None]) -> Emit:
    """Return what tells of the host's memory after every stage."""

    def emit_both(kind: str, **data: Any) -> None:
        emit(kind, **data)
        if kind == "stage":
            tell(data)

    return emit_both


@contextmanager
def _moving(emit: Emit, guest: LinuxGuest, moves: int) -> Iterator[Callable[[], None]]:
    """Migrate a guest, from the moment when what is yielded is called; tell it of the end."""
    if not moves:
        yield lambda: None
        return
    # Imported where it is needed: an import costs seconds where Python itself is nested.
    from harness.nest.moving import Mover

    with Mover(emit, guest.pc, moves, lambda: guest.session.send_input(ENOUGH)) as mover:
        yield mover.begin


def _pass_on(emit: Emit, level: int, event: Event) -> None:
    if event["event"] == "emit":
        emit(event["kind"], **event["data"])
    elif event["event"] == "kmsg":
        emit("kmsg", level=level, priority=event["level"], text=event["text"])
    elif event["event"] == "output":
        emit("console", level=level, text=f"(agent) {event['text']}\n")


def _value(name: str, result: CallResult) -> dict[str, Any]:
    if result.outcome == "return":
        value: dict[str, Any] = result.value
        return value
    if result.outcome == "raise":
        # What a deeper level reports names its level already.
        kind, message = result.error["type"], result.error["message"]
        raise LevelFailed(message if kind == "LevelFailed" else f"{name}: {kind}: {message}")
    raise LevelFailed(f"{name}: the call ended as {result.outcome} {result.raw.get('status', '')}")


def _one_at_a_time(emit: Emit) -> Emit:
    """Return what threads may call: an event's bytes must not mix with another's."""
    lock = threading.Lock()

    def emit_locked(kind: str, **data: Any) -> None:
        with lock:
            emit(kind, **data)

    return emit_locked
