"""Boots the next level's Linux, lets it go on from there, and passes on what it says."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from harness.errors import HostError, HostLost, ScenarioFailure
from harness.host.session import CallResult, Event
from harness.nest.guest import Guest, LinuxGuest
from harness.nest.host_memory import Tell, host_memory
from harness.nest.payload import find_source
from harness.nest.plan import ENOUGH, ENTERED, READY, ROUND, Plan, Vmm
from harness.nest.pulse import Pulse
from harness.nest.running import LinuxSpec
from harness.qemu_vmm.errors import VmmLost
from kvm_ioctl.handles import Kvm

Emit = Callable[..., None]

_HUGE_PAGES: Final = Path("/sys/kernel/mm/transparent_hugepage/enabled")

TARGET = "harness.nest.levels:descend"


_CRASHES: Final = (signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV, signal.SIGTRAP)
"""What ends Python only if the CPU, or memory, is not as it was left."""


class LevelFailed(HostError):
    """A level said that something went wrong; which, and what, is in the message."""


class LevelWrong(ScenarioFailure):
    """A level said that KVM did what it must not, or crashed by it."""


def boot_level(emit: Emit, level: int, plan: Plan) -> dict[str, Any]:
    """Boot Linux as this level, have it do its part of the plan; return its and deeper reports.

    Raises HostLost: the level died; a `lost` event says which, with its last console lines.
    Raises LevelFailed: it, or a deeper one, reports an error.
    Raises LevelWrong: what it, or a deeper one, reports is KVM's fault.
    """
    emit = _one_at_a_time(emit)
    started = time.monotonic()
    if level > 1:
        _allow_huge_pages()
    with ExitStack() as stack:
        counting = _Counting(emit, stack.enter_context(host_memory(emit, level)))
        emit = counting.emit

        def stage(what: str) -> None:
            emit("stage", level=level, what=what, seconds=round(time.monotonic() - started, 2))

        counting.guest = guest = stack.enter_context(_boot(stack, emit, level, plan))
        stage(ENTERED)
        if level == 1:
            # Deeper ones would pay for it, and their life shows in L1's numbers.
            stack.enter_context(Pulse(emit, level, guest))
        try:
            guest.session.wait_for("ready", plan.boot_s(level))
            stage(READY)
            result = _descend_in(guest, emit, level, plan)
        except HostLost as e:
            emit("lost", level=level, why=str(e), console=e.console, vmm=isinstance(e, VmmLost))
            raise
        stage("done")
        return _value(guest.name, result)


def _allow_huge_pages() -> None:
    """Let this guest have huge pages for its guest's memory: with others, every page costs exits.

    Kernels with less than 512 MiB turn them off (hugepage_init).
    """
    with suppress(FileNotFoundError):  # a kernel without any
        _HUGE_PAGES.write_text("madvise")


def _boot(stack: ExitStack, emit: Emit, level: int, plan: Plan) -> Guest:
    spec = LinuxSpec(
        name=f"L{level}",
        source=find_source(),
        shows_source=level < plan.linux_levels,
        vcpus=plan.vcpus,
        memory_mib=plan.memory_mib(level),
        options=lambda tsc_khz: f"{plan.options} {plan.clock_options(level, tsc_khz)}",
        life_s=plan.boot_s(level) + plan.call_s(level),
        silence_s=plan.silence_s(level),
        smm=level == 1 and plan.smis > 0,
    )

    def on_console(text: str) -> None:
        emit("console", level=level, text=text)

    if level == 1 and plan.vmm is Vmm.QEMU:
        return _boot_in_qemu(stack, spec, on_console, plan)
    if level == 1 and plan.moves:
        # Imported where it is needed: an import costs seconds where Python itself is nested.
        from harness.nest.travelling import TravellingGuest

        return TravellingGuest(spec, on_console)
    return LinuxGuest(stack.enter_context(Kvm()), spec, on_console)


def _boot_in_qemu(
    stack: ExitStack, spec: LinuxSpec, on_console: Callable[[str], None], plan: Plan
) -> Guest:
    from harness.qemu_vmm.installation import find_installation

    installation = find_installation()
    # Only now: it needs packages that may come with QEMU.
    from harness.nest.qemu_guest import QemuGuest

    kvm = stack.enter_context(Kvm())
    return QemuGuest(kvm, spec, on_console, installation, over=plan.move_over, move_s=plan.move_s)


def _descend_in(guest: Guest, emit: Emit, level: int, plan: Plan) -> CallResult:
    with _disturbing(emit, guest, level, plan) as begin:

        def take(event: Event) -> None:
            _pass_on(emit, level, event)
            if event["event"] == "emit" and event["data"].get("what") == plan.disturbed_from:
                begin()

        return guest.session.converse(
            TARGET,
            timeout_s=plan.call_s(level),
            on_event=take,
            level=level,
            plan=plan.to_json(),
        )


@contextmanager
def _disturbing(emit: Emit, guest: Guest, level: int, plan: Plan) -> Iterator[Callable[[], None]]:
    """Disturb L1, from the moment when what is yielded is called; tell it of the end."""
    if level != 1 or not plan.disturbed:
        yield lambda: None
        return
    # Imported where it is needed, as above.
    from harness.nest.disturbing import disturbing

    with disturbing(emit, guest, plan, lambda: guest.session.send_input(ENOUGH)) as begin:
        yield begin


class _Counting:
    """Has what the guest costs counted after every stage, apart from rounds of work."""

    def __init__(self, emit: Emit, tell: Tell) -> None:
        self._emit = emit
        self._tell = tell
        self.guest: Guest | None = None

    def emit(self, kind: str, **data: Any) -> None:
        """Pass an event on."""
        self._emit(kind, **data)
        if kind == "stage" and self.guest is not None and not data["what"].startswith(ROUND):
            self._tell(data, self.guest.counts)


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
        kind, message = result.error["type"], result.error["message"]
        # What a deeper level reports names its level already.
        named = kind in (LevelFailed.__name__, LevelWrong.__name__)
        raise _fault(result.error["bases"])(message if named else f"{name}: {kind}: {message}")
    status = result.raw.get("status", "")
    if result.outcome == "died" and status in [-number for number in _CRASHES]:
        raise LevelWrong(f"{name}: the call crashed, {signal.Signals(-status).name}")
    raise LevelFailed(f"{name}: the call ended as {result.outcome} {status}".rstrip())


def _fault(bases: Sequence[str]) -> type[LevelFailed | LevelWrong]:
    """Return what to raise for an exception of a deeper level, given the names of its classes."""
    # Whether a guest hangs or is only slow cannot be told from outside.
    hung = not {"ProxyTimeout", "VcpuTimeout", "VcpuStuck"}.isdisjoint(bases)
    return LevelWrong if ScenarioFailure.__name__ in bases and not hung else LevelFailed


def _one_at_a_time(emit: Emit) -> Emit:
    """Return what threads may call: an event's bytes must not mix with another's."""
    lock = threading.Lock()

    def emit_locked(kind: str, **data: Any) -> None:
        with lock:
            emit(kind, **data)

    return emit_locked
