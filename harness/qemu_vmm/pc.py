"""A Linux guest under QEMU: started, watched over QMP, moved from QEMU to QEMU, ended.

One thread of each guest starts all of its QEMUs and alone talks QMP with them: a QEMU is to end
with whoever started it, and a QMP connection serves one at a time.
"""

from __future__ import annotations

import contextlib
import queue
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, Final, TypeVar

from harness.errors import HostError, HostLost, NsvmError
from harness.qemu_vmm.channel import Channel
from harness.qemu_vmm.console import ConsoleWatch
from harness.qemu_vmm.errors import VmmLost
from harness.qemu_vmm.installation import Installation
from harness.qemu_vmm.migration import Journey, Side, migrate
from harness.qemu_vmm.over import Over
from harness.qemu_vmm.process import PcOptions, QemuProcess

T = TypeVar("T")

_START_S: Final = 60.0
_LOOK_S: Final = 1.0
_GONE_S: Final = 2.0
"""For a QEMU whose monitor went away to be gone itself."""
_STOP_S: Final = 20.0
_ASK_S: Final = 30.0


class QemuPc:
    """One guest, in whichever QEMU it currently is; a context manager would be its user's."""

    def __init__(
        self,
        installation: Installation,
        options: PcOptions,
        *,
        on_console: Callable[[str], None],
        life_s: float,
    ) -> None:
        """Start its first QEMU.

        Raises HostError: that cannot be started.
        """
        self.channel = Channel()
        self.console = ConsoleWatch(on_console, life_s)
        self.trouble: HostLost | None = None
        """What ended it, if something did."""
        self._installation = installation
        self._options = options
        self._directory = Path(tempfile.mkdtemp(prefix="nsvm-qemu-"))
        self._orders: queue.Queue[Callable[[], None]] = queue.Queue()
        self._over = threading.Event()
        self._life_s = life_s
        self._made: list[QemuProcess] = []
        self._qemu: QemuProcess | None = None
        self._thread = threading.Thread(target=self._work, name="qemu", daemon=True)
        self._thread.start()
        try:
            self._ask(self._begin, _START_S)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """The number of the QEMU process that it is in."""
        if self._qemu is None:
            raise HostError("there is no QEMU")
        return self._qemu.process.pid

    def move(self, over: Over, timeout_s: float) -> dict[str, Any]:
        """Migrate it to a new QEMU; return figures.

        Raises ScenarioFailure: QEMU could not; the guest is where it was, or lost.
        Raises HostError: it was not done in time, or refused.
        """
        return self._ask(lambda: self._move(over, timeout_s), 2 * timeout_s)

    def counts(self) -> dict[str, int]:
        """Return KVM's statistics of it, the vCPUs' added up; empty where there are none."""
        try:
            return self._ask(self._counts, _ASK_S)
        except NsvmError:
            return {}

    def why_dead(self, name: str, reason: str) -> HostLost:
        """Return what to raise once its channel ended, or fell silent for `reason`."""
        self._over.wait(_LOOK_S)
        if self.trouble is not None:
            kind, why = type(self.trouble), str(self.trouble)
        else:
            kind, why = HostLost, reason
        if self.console.panic:
            why = f"{self.console.panic} ({why})"
        return kind(f"{name} is lost: {why}", self.console.last_words)

    def close(self) -> None:
        """End it, and remove what it left."""
        self._over.set()
        for qemu in self._made:
            # Whoever waits for its answer waits no longer.
            qemu.process.kill()
        self._thread.join(_STOP_S)
        self.channel.close()
        self.console.close(_STOP_S)
        shutil.rmtree(self._directory, ignore_errors=True)

    # --- all of this in the guest's own thread

    def _work(self) -> None:
        deadline = time.monotonic() + self._life_s
        try:
            while not self._over.is_set() and self.trouble is None:
                if time.monotonic() > deadline:
                    self.trouble = HostLost(f"it did not end within {self._life_s:g} s")
                try:
                    self._orders.get(timeout=_LOOK_S)()
                except queue.Empty:
                    self._look()
        finally:
            self._over.set()
            self.channel.end()
            if self._qemu is not None:
                self._qemu.stop()

    def _ask(self, work: Callable[[], T], timeout_s: float) -> T:
        """Have the guest's thread do something; return what comes of it."""
        answer: Future[T] = Future()

        def do() -> None:
            try:
                answer.set_result(work())
            except BaseException as e:  # raised to whoever asked
                answer.set_exception(e)

        self._orders.put(do)
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if wait([answer], _LOOK_S).done:
                return answer.result()
            if self._over.is_set() and not self._thread.is_alive():
                raise self.trouble or HostError("QEMU was ended meanwhile")
        raise HostError(f"QEMU's guest was not ready within {timeout_s:g} s")

    def _begin(self) -> None:
        qemu = self._start([], ())
        self._qemu = qemu
        self.channel.plug(qemu.channel)

    def _start(self, extra: list[str], inherited: tuple[int, ...]) -> QemuProcess:
        qemu = QemuProcess(
            self._installation,
            [*self._options.words(), *extra],
            self._directory / f"qemu-{len(self._made)}.err",
            inherited,
        )
        self._made.append(qemu)
        self.console.read(qemu.console)
        return qemu

    def _move(self, over: Over, timeout_s: float) -> dict[str, Any]:
        source = self._qemu
        if source is None:
            raise HostError("there is no QEMU")
        already = len(self._made)
        with self.channel.held():
            try:
                journey = Journey(
                    self._start, self._directory, timeout_s, self._over, self._runs_guest
                )
                _, figures = migrate(source, over, journey)
            except BaseException:
                for qemu in self._made[already:]:
                    qemu.stop()
                raise
            self._qemu = self._made[-1]
            self.channel.plug(self._qemu.channel)
        # The old one's vCPUs stand as they were sent.
        figures["in_guest_mode"] = self._counts(source).get("guest_mode")
        source.stop()
        return figures

    def _runs_guest(self, side: Side) -> bool:
        """Tell whether a vCPU is in guest mode; where KVM does not tell, take it for so."""
        if not isinstance(side, QemuProcess):
            return True
        return bool(self._counts(side).get("guest_mode", 1))

    def _look(self) -> None:
        """See whether QEMU is there, answers, and lets the guest run."""
        qemu = self._qemu
        if qemu is None:
            return
        try:
            status = qemu.monitor.command("query-status")["status"]
        except HostError as e:
            if qemu.wait(_GONE_S):
                self.trouble = _ended(qemu)
            else:
                self.trouble = VmmLost(f"the connection to QEMU's monitor is lost: {e}")
            return
        if status != "running":
            said = f": {qemu.complaint()}" if qemu.complaint() else ""
            self.trouble = HostLost(f"QEMU stopped the guest ({status}){said}")

    def _counts(self, qemu: QemuProcess | None = None) -> dict[str, int]:
        found: Counter[str] = Counter()
        qemu = qemu or self._qemu
        for target in ("vm", "vcpu"):
            if qemu is None:
                break
            # QEMU has it since 7.1, KVM since Linux 5.14.
            with contextlib.suppress(HostError):
                for entry in qemu.monitor.command("query-stats", target=target):
                    for stat in entry["stats"]:
                        if isinstance(stat["value"], int):
                            found[stat["name"]] += stat["value"]
        return dict(found)


def _ended(qemu: QemuProcess) -> HostLost:
    why = qemu.why_ended()
    # A signal comes from outside, or is QEMU's own fault; all else is what the guest came to.
    killed = qemu.process.poll() is not None and qemu.process.returncode < 0
    return VmmLost(why) if killed else HostLost(why)
