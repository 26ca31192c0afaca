"""A tower of Linux levels, seen from outside: progress, consoles, a verdict with evidence."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.errors import HostError, HostLost, ScenarioFailure
from harness.facts import HostView, nested_svm
from harness.host.emulated import EmulatedHost, Hardware
from harness.host.guest_payload import build_payload
from harness.host.kernels import resolve
from harness.host.local import LocalHost
from harness.host.qemu_payload import build_qemu_payload
from harness.host.session import CallResult, Event, Host, Session
from harness.nest.plan import Plan, Vmm
from harness.nest.workloads import entry_sums
from harness.probe.kmsg import new_taints, splats
from harness.report.verdict import Verdict
from harness.runner.hosts import DEFAULT_KERNEL, HostChoice

TARGET, EXPECTED = "harness.nest.levels:descend", "harness.nest.work:expected"
_EXPECTED_S = 300.0
_SILENCE_S = 60.0

Tell = Callable[[str], None]


@dataclass
class Level:
    """What is known of one level."""

    number: int
    stages: dict[str, float] = field(default_factory=dict)
    """Seconds since the level was begun, by what it had come to."""
    at: str = "not begun"
    console: str = ""
    kernel_log: list[str] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """As "L1"."""
        return f"L{self.number}"


class Tower:
    """Takes the events of all levels; consoles go to files below `directory` as they come."""

    def __init__(self, tell: Tell, directory: Path | None = None, slow_clock: int = 1) -> None:
        self._slow_clock = slow_clock
        self.levels: dict[int, Level] = {}
        self.lost: dict[str, Any] = {}
        """The innermost level that died: its number, why, and its last console lines."""
        self.moves: list[dict[str, Any]] = []
        self.smis: list[dict[str, Any]] = []
        self.memory: list[dict[str, Any]] = []
        """What the tower cost the host at every stage, in bytes."""
        self._tell = tell
        self._directory = directory
        self._started = time.monotonic()
        if directory is not None:
            try:
                directory.mkdir(parents=True, exist_ok=True)
            except OSError as e:
                raise HostError(f"{directory}: {e.strerror}") from e

    def level(self, number: int) -> Level:
        """Return a level, known or not."""
        return self.levels.setdefault(number, Level(number))

    def take(self, event: Event) -> None:
        """Take an event of the call in the host."""
        if event["event"] == "kmsg":
            self._log(0, event["text"])
        elif event["event"] == "output":
            self._write(0, "output", event["text"] + "\n")
        elif event["event"] == "emit":
            getattr(self, f"_on_{event['kind']}", self._ignore)(event["data"])

    def _on_stage(self, data: Event) -> None:
        level = self.level(data["level"])
        level.at = data["what"]
        if data["seconds"] is not None:
            # The level that has it as a guest counts them; from L1 on by a slow clock.
            slower = self._slow_clock if level.number > 1 else 1
            level.stages[level.at] = round(data["seconds"] * slower, 2)
        self._say(f"{level.name} {level.at}")

    def _on_console(self, data: Event) -> None:
        level = self.level(data["level"])
        level.console += data["text"]
        self._write(level.number, "console", data["text"])

    def _on_kmsg(self, data: Event) -> None:
        self._log(data["level"], data["text"])

    def _on_pulse(self, data: Event) -> None:
        rates = {name: value for name, value in data.items() if name != "level" and value}
        said = ", ".join(f"{value:.0f} {name.replace('_', ' ')}" for name, value in rates.items())
        self._say(f"{self.level(data['level']).name} alive, per second: {said or 'nothing'}")

    def _on_memory(self, data: Event) -> None:
        self.memory.append(data)

    def _on_moved(self, data: Event) -> None:
        self.moves.append(data)
        self._say(f"L1 moved, {data['downtime_s'] * 1e3:.0f} ms")

    def _on_smi(self, data: Event) -> None:
        self.smis.append(data)
        if data["number"] == data["of"]:
            hit = sum(smi["left_guest"] for smi in self.smis)
            self._say(f"L1 took {data['of']} SMIs, {hit} of them while a guest of its ran")

    def _on_lost(self, data: Event) -> None:
        # The innermost tells first; that the outer ones lose it too is no news.
        self.lost = self.lost or data

    @staticmethod
    def _ignore(data: Event) -> None:
        pass

    def _say(self, text: str) -> None:
        self._tell(f"{time.monotonic() - self._started:6.1f} s  {text}")

    def _log(self, number: int, text: str) -> None:
        self.level(number).kernel_log.append(text)
        self._write(number, "kernel", text + "\n")

    def _write(self, number: int, kind: str, text: str) -> None:
        if self._directory is not None:
            with open(self._directory / f"L{number}-{kind}.log", "a", encoding="utf-8") as file:
                file.write(text)


def nest(
    choice: HostChoice,
    plan: Plan,
    guest_kernel: str | None,
    tell: Tell,
    consoles: Path | None = None,
) -> dict[str, Any]:
    """Build the tower in a fresh host, let it work, take it down; return the report.

    Raises HostError: there is no such host, or none of its kernels can be had.
    """
    tower = Tower(tell, consoles, plan.slow_clock)
    started = time.monotonic()
    with _host(choice, plan, guest_kernel, tell) as host:
        session = host.start()
        # It is busy with all the levels, and says so last of all.
        session.silence_s = max(session.silence_s, _SILENCE_S * plan.patience)
        tell(f"host up after {time.monotonic() - started:.1f} s")
        try:
            built = _build(session, plan, tower)
            result: CallResult | HostLost = built
            wanted = _expected(session, plan, built)
        except HostLost as e:
            result, wanted = e, {}
        console = getattr(host, "console_text", "")
        about = host.describe()
    tower.level(0).console = console
    if consoles is not None:
        (consoles / "L0-console.log").write_text(console)
    verdict, why = judge(result, tower, plan, wanted)
    return {
        "verdict": verdict.value,
        "why": why,
        "host": about,
        "plan": plan.to_json(),
        "seconds": round(time.monotonic() - started, 1),
        "levels": [vars(tower.levels[number]) for number in sorted(tower.levels)],
        "lost": tower.lost,
        "moves": tower.moves,
        "smis": tower.smis,
        "memory": tower.memory,
    }


def judge(
    result: CallResult | HostLost, tower: Tower, plan: Plan, wanted: Mapping[str, list[str]]
) -> tuple[Verdict, str]:
    """Return the verdict on a tower, and the reason in one line."""
    for level in sorted(tower.levels.values(), key=lambda level: level.number):
        if said := splats([*level.kernel_log, *level.console.splitlines()]):
            return Verdict.FAIL, f"{level.name}'s kernel: {said[0].strip()}"
    if isinstance(result, HostLost):
        return Verdict.ERROR, f"L0: {result}"
    if tower.lost:
        # Whether a level hangs or is only slow cannot be told from outside.
        hung = "no sign of life" in tower.lost["why"] or " within " in tower.lost["why"]
        not_its_own = hung or tower.lost.get("vmm", False)
        return Verdict.ERROR if not_its_own else Verdict.FAIL, str(tower.lost["why"])
    if taints := new_taints(*result.tainted):
        return Verdict.FAIL, f"L0: the kernel is tainted: {', '.join(taints)}"
    if not _returned(result):
        failed = ScenarioFailure.__name__ in result.error.get("bases", ())
        message = result.error.get("message") or f"the call ended as {result.outcome}"
        return Verdict.FAIL if failed else Verdict.ERROR, message
    for name, report in result.value.items():
        level = tower.level(int(name[1:]))
        level.report = report
        for kind, entries in wanted.items():
            if (difference := _difference(name, kind, report.get(kind), entries)) is not None:
                return Verdict.FAIL, difference
    for what, seen, asked in (("move", tower.moves, plan.moves), ("SMI", tower.smis, plan.smis)):
        if len(seen) < plan.fewest(asked):
            return Verdict.ERROR, f"L1: {what}: {len(seen)} times, not {asked}"
    if sorted(result.value) != [f"L{n}" for n in range(1, plan.linux_levels + 1)]:
        return Verdict.ERROR, f"only {', '.join(sorted(result.value))} reported"
    for name, kind in plan.transcripts:
        if not result.value[name].get(kind):
            return Verdict.ERROR, f"{name}: {kind}: nothing was reported"
    return Verdict.PASS, f"{plan.linux_levels} levels of Linux worked, all transcripts agree"


def _difference(name: str, kind: str, sums: list[str] | None, entries: list[str]) -> str | None:
    """Return how a level's entries differ from the expected ones; None: not at all."""
    if sums is None:
        return None
    should_be = entry_sums(entries)
    if len(sums) != len(should_be):
        return f"{name}: {kind}: {len(sums)} entries, not {len(should_be)}"
    for got, want, entry in zip(sums, should_be, entries, strict=True):
        if got != want:
            return f"{name}: {kind}: differs from what it must be at {entry!r}"
    return None


def _returned(result: CallResult | HostLost) -> bool:
    return isinstance(result, CallResult) and result.outcome == "return"


def _build(session: Session, plan: Plan, tower: Tower) -> CallResult:
    return session.call(
        TARGET, timeout_s=plan.call_s(0), on_event=tower.take, level=0, plan=plan.to_json()
    )


def _expected(session: Session, plan: Plan, result: CallResult) -> dict[str, list[str]]:
    if not _returned(result):
        return {}
    made = session.call(
        EXPECTED,
        timeout_s=_EXPECTED_S * plan.patience,
        plan=plan.to_json(),
        reports=result.value,
    )
    value: dict[str, list[str]] = made.unwrap("the expected transcripts")
    return value


def _host(choice: HostChoice, plan: Plan, guest_kernel: str | None, tell: Tell) -> Host:
    kind = choice.resolved()
    if kind not in ("local", "emulated"):
        raise HostError(f"{kind}: no image of Linux is carried to lab machines")
    local = kind == "local"
    if local and not (fact := nested_svm(HostView())).holds:
        raise HostError(f"no nested SVM on this machine: {fact.evidence}")
    kernel = resolve(choice.kernel or DEFAULT_KERNEL, choice.modules)
    payload = build_payload(resolve(guest_kernel) if guest_kernel else kernel)
    if local:
        return LocalHost(dict(choice.params), payload, tell)
    qemu = build_qemu_payload() if plan.vmm is Vmm.QEMU else None
    hardware = Hardware(memory_mib=plan.host_mib, disk=payload, qemu_disk=qemu)
    return EmulatedHost(kernel, dict(choice.params), hardware, log=tell)
