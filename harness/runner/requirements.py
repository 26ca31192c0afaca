"""`--require`: facts that must hold on the host, or the run is an ERROR.

A scenario whose `needs` say no is a SKIP. In a lab that is there for that very thing, a SKIP would
hide that the lab is broken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from harness.errors import HarnessError, HostError
from harness.facts import KVM_FACTS, PROBE_FACTS, Answer
from harness.runner.hosts import HostChoice, make_host

#: What can be required: all that `harness.facts.ask_here` answers.
NAMES = tuple(fact.__name__ for fact in KVM_FACTS + PROBE_FACTS)

_ASK_S = 120.0


def check_names(names: Iterable[str]) -> None:
    """Check that there are facts of these names.

    Raises:
        HarnessError: there is none of one of them.
    """
    for name in names:
        if name not in NAMES:
            raise HarnessError(f"--require {name}: no such fact; there are {', '.join(NAMES)}")


def ask(
    choice: HostChoice, names: Iterable[str], log: Callable[[str], None] = lambda text: None
) -> list[Answer]:
    """Return the host's answers, each name's once; or as the only one why the host did not start.

    A machine of its own is started for that where the host can give one.
    """
    try:
        with make_host(choice, log=log) as host:
            result = host.start().call("harness.facts:ask_here", timeout_s=_ASK_S)
            answers = [Answer(**answer) for answer in result.unwrap("asking the host")]
    except HostError as e:
        return [Answer("start", None, str(e).partition("\n")[0])]
    by_name = {answer.name: answer for answer in answers}
    return [by_name[name] for name in dict.fromkeys(names)]


def complaint(answer: Answer) -> str:
    """Return, in one line, what is wrong about a required fact; empty if it holds."""
    if answer.holds:
        return ""
    what = "does not hold" if answer.holds is False else "cannot be told"
    mend = f" -> {answer.mend}" if answer.mend else ""
    return f"required fact {answer.name} {what}: {answer.evidence}{mend}"
