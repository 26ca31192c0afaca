"""One live migration from QEMU to QEMU, by QMP, over a socket or through a file."""

from __future__ import annotations

import contextlib
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from harness.errors import HostError, ScenarioFailure
from harness.host.monitor import Monitor
from harness.migrate.loopback import raise_loopback
from harness.qemu_vmm.over import Over

_POLL_S: Final = 0.1
_LISTEN_S: Final = 60.0
_BANDWIDTH: Final = 1 << 34
"""Bytes per second (`max-bandwidth`): no limit worth the name."""
_DOWNTIME_MS: Final = 1000
"""What QEMU may plan for (`downtime-limit`); its 300 ms are short where a host is emulated."""
_FILE_NAME: Final = "nsvm-file"
_TRIES: Final = 60
"""To stop a machine while its guest runs."""


class Side(Protocol):
    """A QEMU, as far as a migration needs it: `process.QemuProcess`."""

    monitor: Monitor

    @property
    def ended(self) -> bool: ...  # noqa: D102

    def why_ended(self) -> str: ...  # noqa: D102
    def complaint(self) -> str: ...  # noqa: D102
    def wait(self, timeout_s: float) -> bool: ...  # noqa: D102
    def stop(self) -> None: ...  # noqa: D102


@dataclass(frozen=True)
class Journey:
    """What a migration needs besides its source."""

    start: Callable[[list[str], tuple[int, ...]], Side]
    """Starts the destination with more options, and descriptors that it inherits."""
    directory: Path
    timeout_s: float
    given_up: threading.Event
    """Set: nobody waits for it any more."""
    runs_guest: Callable[[Side], bool] = lambda side: True
    """Tells whether a machine that stands still has a guest of its own in a vCPU."""

    def pause(self, seconds: float = _POLL_S) -> None:
        """Let some time pass.

        Raises HostError: given up meanwhile.
        """
        if self.given_up.wait(seconds):
            raise HostError("the migration was given up")


def migrate(source: Side, over: Over, journey: Journey) -> tuple[Side, dict[str, Any]]:
    """Move a machine; return its new QEMU (the old one stays) and figures of `query-migrate`.

    Raises ScenarioFailure: QEMU could not; what it says, or the new one, is in the message.
    Raises HostError: QEMU refused to try, or did not answer.
    """
    started = time.monotonic()
    source.monitor.command(
        "migrate-set-parameters",
        **{"max-bandwidth": _BANDWIDTH, "downtime-limit": _DOWNTIME_MS},
    )
    if over is Over.FILE:
        stopped = _stop_in_guest(source, journey)
        target, sent = _through_file(source, journey)
    else:
        target, sent = _over_socket(source, over, journey)
    _wait_until_running(target, journey, started + journey.timeout_s)
    downtime_s = sent.get("downtime", 0) / 1e3
    if over is Over.FILE:
        # QEMU counts neither from our stop nor to the end of loading.
        downtime_s = time.monotonic() - stopped
    ram = sent.get("ram", {})
    return target, {
        "over": over.value,
        "downtime_s": round(downtime_s, 3),
        "seconds": round(time.monotonic() - started, 3),
        "bytes": ram.get("transferred", 0),
        "rounds": ram.get("dirty-sync-count", 0),
    }


def _over_socket(source: Side, over: Over, journey: Journey) -> tuple[Side, dict[str, Any]]:
    path = journey.directory / "migration"
    path.unlink(missing_ok=True)
    if over is Over.TCP:
        raise_loopback()
    # Port 0: whichever is free.
    incoming = f"unix:{path}" if over is Over.UNIX else "tcp:127.0.0.1:0"
    target = journey.start(["-incoming", incoming], ())
    try:
        # It answers once it listens.
        target.monitor.command("query-status")
        address = f"unix:{path}" if over is Over.UNIX else _tcp_address(target, journey)
        source.monitor.command("migrate", uri=address)
        return target, _completed(source, target, journey)
    except BaseException:
        target.stop()
        raise


def _tcp_address(target: Side, journey: Journey) -> str:
    """Return where the destination listens."""
    deadline = time.monotonic() + _LISTEN_S
    while time.monotonic() < deadline:
        for address in target.monitor.command("query-migrate").get("socket-address", ()):
            return f"tcp:{address['host']}:{address['port']}"
        journey.pause()
    raise HostError(f"the new QEMU does not listen within {_LISTEN_S:g} s")


def _stop_in_guest(source: Side, journey: Journey) -> float:
    """Stop the machine, if it can be while a guest of its own runs; return when.

    What is saved whole is stopped first, as `savevm` does it: so the moment can be chosen.
    """
    moments = random.Random(0)
    for left in reversed(range(_TRIES)):
        stopped = time.monotonic()
        source.monitor.command("stop")
        if journey.runs_guest(source) or not left:
            break
        source.monitor.command("cont")
        journey.pause(moments.uniform(0, _POLL_S))
    return stopped


def _through_file(source: Side, journey: Journey) -> tuple[Side, dict[str, Any]]:
    # By descriptor: "file:" is newer than many a QEMU, and "exec:" wants a shell in the host.
    with tempfile.TemporaryFile(dir=journey.directory) as file:
        fd = file.fileno()
        source.monitor.pass_descriptor(fd, _FILE_NAME)
        source.monitor.command("migrate", uri=f"fd:{_FILE_NAME}")
        try:
            sent = _completed(source, None, journey)
        except BaseException:
            with contextlib.suppress(HostError):
                source.monitor.command("cont")
            raise
        os.lseek(fd, 0, os.SEEK_SET)
        return journey.start(["-incoming", f"fd:{fd}"], (fd,)), sent


def _completed(source: Side, target: Side | None, journey: Journey) -> dict[str, Any]:
    """Wait for the source to have sent all; return what it says of it."""
    deadline = time.monotonic() + journey.timeout_s
    while time.monotonic() < deadline:
        told: dict[str, Any] = source.monitor.command("query-migrate")
        if told.get("status") == "completed":
            return told
        if told.get("status") in ("failed", "cancelled"):
            why = told.get("error-desc") or told["status"]
            raise ScenarioFailure(f"QEMU could not migrate: {why}{_word_of(target)}")
        journey.pause()
    raise HostError(f"the migration did not end within {journey.timeout_s:g} s")


def _word_of(target: Side | None) -> str:
    """Return what the destination has to say; it may be about to end."""
    if target is None:
        return ""
    target.wait(2.0)
    said = target.why_ended() or target.complaint()
    return f" (the other end: {said})" if said else ""


def _wait_until_running(target: Side, journey: Journey, deadline: float) -> None:
    while time.monotonic() < deadline:
        if target.ended:
            raise ScenarioFailure(f"the machine did not arrive: {target.why_ended()}")
        try:
            status = target.monitor.command("query-status")["status"]
        except HostError:
            if target.wait(2.0):
                continue
            raise
        if status == "running":
            return
        if status == "paused":
            # It was saved standing still.
            target.monitor.command("cont")
        elif status not in ("inmigrate", "finish-migrate"):
            raise ScenarioFailure(f"the machine arrived as {status!r}: {target.complaint()}")
        journey.pause()
    raise HostError("the machine does not run at the other end in time")
