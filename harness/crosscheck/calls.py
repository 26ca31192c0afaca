"""What is called inside a host: cross-checks, and the repetition of one sequence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any

from harness.crosscheck.campaign import Campaign, Finding, on_kvm
from harness.crosscheck.checker import Checked
from harness.crosscheck.deviations import applicable
from harness.crosscheck.generator import sequence
from harness.crosscheck.notation import sequence_from, to_plain
from harness.crosscheck.record import plain_difference
from harness.crosscheck.settings import Setting
from harness.crosscheck.silicon import is_emulated
from harness.probe.page_alloc import PageAllocProbe
from kvm_ioctl.handles import Kvm

Emit = Callable[..., None]


def crosscheck(
    emit: Emit,
    *,
    seed: int,
    first: int,
    steps: int,
    focus: str | None,
    setting: str,
    turned: Mapping[str, str],
    memory: bool,
    told: Sequence[str] = (),
    enough: int = 0,
) -> dict[str, Any]:
    """Run sequences until so many steps are done; events tell of each one as it comes.

    With `enough` it ends after as many findings.

    `begins` (number) goes out before a sequence: if the host dies, that was the one. `checked`
    tells what it did, `finding` what was not as the model said; `again` that it is one of those
    whose signatures were `told` before.
    """
    done, number, known = 0, first, set(told)
    most = len(known) + enough if enough else None
    with _campaign(setting, turned, memory) as campaign:
        for number in count(first):
            if done >= steps or len(known) == most:
                break
            operations = sequence(seed, number, focus)
            emit("begins", number=number)
            checked = campaign.run(operations)
            done += checked.steps
            emit("checked", number=number, **_told(campaign, checked))
            if checked.difference is None:
                continue
            signature = checked.difference.signature
            if signature in known:
                emit("again", number=number, signature=signature)
            else:
                known.add(signature)
                found = _plain(campaign.finding(operations, checked))
                emit("finding", number=number, signature=signature, **found)
        times = campaign.times
    return {
        "next": number,
        "model_s": times.model_s,
        "kernel_s": times.kernel_s,
        "harness_s": times.harness_s,
        "asked": sorted(campaign.asked),
    }


def repeat(
    emit: Emit,
    *,
    operations: Sequence[Any],
    setting: str,
    turned: Mapping[str, str],
    explain: bool = True,
) -> dict[str, Any]:
    """Run one sequence on a fresh pair; return the difference, or that there is none."""
    with _campaign(setting, turned, False) as campaign:
        wanted = sequence_from(operations)
        checked = campaign.again(wanted)
        if checked.difference is None:
            return {"difference": {}, "steps": checked.steps, "known": _known(checked)}
        turns = campaign.explained_by(wanted, checked) if explain else []
        return {
            "difference": plain_difference(checked.difference),
            "steps": checked.steps,
            "known": _known(checked),
            "explained_by": [str(turn) for turn in turns],
        }


@contextmanager
def _campaign(setting: str, turned: Mapping[str, str], memory: bool) -> Iterator[Campaign]:
    with ExitStack() as stack:
        kvm = stack.enter_context(Kvm())
        probe = _nested_memory(stack.enter_context(PageAllocProbe())) if memory else None
        knobs = Setting(setting, turned).knobs()
        yield on_kvm(kvm, knobs, applicable(is_emulated()), probe)


def _nested_memory(probe: PageAllocProbe) -> Callable[[], int]:
    """Return what counts the bytes that this process holds of nested state."""

    def held() -> int:
        return sum(
            site.size_bytes * blocks
            for site, blocks in probe.held_sites().items()
            if site.is_nested
        )

    return held


def _told(campaign: Campaign, checked: Checked) -> dict[str, Any]:
    rows = campaign.coverage.rows()
    hazards = dict(+campaign.hazards)
    campaign.coverage.transitions.clear()
    campaign.hazards.clear()
    return {"steps": checked.steps, "known": _known(checked) | hazards, "covered": rows}


def _known(checked: Checked) -> dict[str, int]:
    return dict(Counter(deviation.id for deviation, _ in checked.known))


def _plain(finding: Finding) -> dict[str, Any]:
    return {
        "operations": [to_plain(each) for each in finding.operations],
        "difference": plain_difference(finding.difference),
        "explained_by": [str(turn) for turn in finding.explained_by],
        "results": [outcome.result for outcome in finding.checked.outcomes],
        "reproducible": finding.reproducible,
    }
