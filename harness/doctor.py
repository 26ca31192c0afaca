"""`nsvm doctor`: what this machine can do, with the evidence, and how to mend what it cannot.

Asks the facts of `harness.facts` and `harness.tools` and draws two conclusions from the answers:
whether this machine itself, and whether an emulated host, can run nested scenarios. Needs neither
/dev/kvm nor any right.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from harness import tools
from harness.facts import (
    KVM_FACTS,
    PROBE_FACTS,
    Answer,
    Fact,
    HostView,
    ask,
    ask_host,
)
from harness.host.session import Host
from harness.tools import ToolFunction, Tools

TOOL_FACTS: tuple[ToolFunction, ...] = (
    tools.python,
    tools.guest_compiler,
    tools.qemu,
    tools.qemu_svm,
    tools.setpriv,
    tools.debian_packages,
    tools.kernels_cached,
    tools.cache_space,
    tools.memory_space,
)

#: Without one of these there are no nested scenarios on this machine's own KVM.
LOCAL_NEEDS = ("x86_64", "kvm_device", "svm", "nested_svm", "nested_state", "guest_compiler")

#: Without one of these some scenarios or probes have nothing to work with there.
LOCAL_WANTS = ("smm", "memory_controller", "tracefs", "kprobe_events", "kernel_log")

#: Without one of these there is no emulated host. Where it gets its kernel is asked apart.
EMULATED_NEEDS = (
    "x86_64",
    "qemu_svm",
    "setpriv",
    "guest_compiler",
    "cache_space",
    "memory_space",
)

LOCAL = "local host usable for nested scenarios"
EMULATED = "emulated host usable"

_INSIDE_S = 60.0


@dataclass(frozen=True)
class Inside:
    """What a host that was started answered."""

    title: str
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class Report:
    """All answers of this machine by section, in the order asked, and the conclusions."""

    sections: dict[str, tuple[Answer, ...]]
    local: Answer
    emulated: Answer
    inside: Inside | None = None

    @property
    def answers(self) -> tuple[Answer, ...]:
        """The answers of all sections."""
        return tuple(answer for section in self.sections.values() for answer in section)

    @property
    def usable(self) -> bool:
        """Whether nested scenarios can run on at least one of both hosts."""
        return bool(self.local.holds or self.emulated.holds)

    def to_json(self) -> str:
        """Return the object that ``nsvm doctor --json`` prints."""
        conclusions = {}
        for key, answer in (("local", self.local), ("emulated", self.emulated)):
            conclusions[key] = asdict(answer)
        document: dict[str, Any] = {
            "facts": [asdict(a) for a in self.answers],
            "conclusions": conclusions,
        }
        if self.inside:
            facts = [asdict(answer) for answer in self.inside.answers]
            document["inside"] = {"host": self.inside.title, "facts": facts}
        return json.dumps(document, indent=2)


def collect(host: HostView | None = None, machine_tools: Tools | None = None) -> Report:
    """Ask this machine everything, and conclude. Never raises for what it lacks or refuses."""
    view, seen = host or HostView(), machine_tools or Tools()
    sections = {
        "KVM": ask_host(KVM_FACTS, view),
        "probes": ask_host(PROBE_FACTS, view),
        "tools": tuple(ask(f.__name__, partial(f, seen)) for f in TOOL_FACTS),
    }
    by_name = {answer.name: answer for section in sections.values() for answer in section}
    cached = ask("userland", lambda: _userland(seen))
    return Report(sections, conclude_local(by_name), conclude_emulated(by_name, cached))


def collect_inside(host: Host) -> Inside:
    """Start a host and ask it what scenarios will ask there.

    Raises:
        HostError: it does not come up, or does not answer.
    """
    result = host.start().call("harness.facts:ask_here", timeout_s=_INSIDE_S)
    answers = tuple(Answer(**answer) for answer in result.unwrap("asking the host"))
    return Inside(f"{host.kind} host, kernel {host.describe()['kernel_release']}", answers)


def _userland(seen: Tools) -> Fact:
    holds = seen.has_cached_userland()
    return Fact(holds, "the userland is in the cache" if holds else "no userland in the cache")


def conclude_local(answers: dict[str, Answer]) -> Answer:
    """Conclude whether this machine's own KVM can run nested scenarios."""
    verdict = _all_of(LOCAL, [answers[name] for name in LOCAL_NEEDS])
    lacking = [name for name in LOCAL_WANTS if not answers[name].holds]
    if not verdict.holds or not lacking:
        return verdict
    return Answer(LOCAL, True, f"{verdict.evidence}; less what needs {', '.join(lacking)}")


def conclude_emulated(answers: dict[str, Answer], userland: Answer) -> Answer:
    """Conclude whether an emulated host can be started: QEMU and all, and a kernel for it."""
    needed = [answers[name] for name in EMULATED_NEEDS]
    if not (answers["kernels_cached"].holds and userland.holds):
        # The network is not asked; whether the archive answers is seen at the first run.
        needed.append(answers["debian_packages"])
    return _all_of(EMULATED, needed)


def _all_of(name: str, needed: Iterable[Answer]) -> Answer:
    needed = list(needed)
    lacking = [answer for answer in needed if answer.holds is False]
    unknown = [answer for answer in needed if answer.holds is None]
    if not lacking and not unknown:
        return Answer(name, True, "all that it takes is there")
    open_points = "; ".join(f"{answer.name}: {answer.evidence}" for answer in lacking + unknown)
    # One way to mend things suffices to begin with; the table has the others.
    mend = next((answer.mend for answer in lacking if answer.mend), "")
    return Answer(name, False if lacking else None, open_points, mend)


# Showing it


_SHOWN = {True: ("yes", "green"), False: ("no", "red"), None: ("?", "yellow")}


def render(report: Report, console: Console | None = None) -> None:
    """Print the answers in tables, and the conclusions below them."""
    console = console or Console()
    inside = {report.inside.title: report.inside.answers} if report.inside else {}
    for title, answers in {**report.sections, **inside}.items():
        console.print(Text(title, style="bold"))
        console.print(_table(answers))
    console.print()
    for answer in (report.local, report.emulated):
        console.print(Text.assemble(answer.name, ": ", _holds(answer)))
        console.print(_evidence(answer), soft_wrap=True)


def _table(answers: Iterable[Answer]) -> Table:
    # One width for the names of all sections.
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, min_width=20)
    table.add_column(no_wrap=True, min_width=3)
    table.add_column(overflow="fold")
    for answer in answers:
        table.add_row(f"  {answer.name}", _holds(answer), _evidence(answer))
    return table


def _holds(answer: Answer) -> Text:
    return Text(*_SHOWN[answer.holds])


def _evidence(answer: Answer) -> Text:
    """Text objects, not markup: evidence may hold brackets."""
    text = Text(answer.evidence)
    if answer.mend:
        text.append(f"\n-> {answer.mend}", style="cyan")
    return text
