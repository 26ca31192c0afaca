"""Which cases a run has, and how often: chosen by id, repeated, until one fails."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest

from harness.report.verdict import Verdict
from harness.runner.plugin import ScenarioItem
from harness.runner.run import Part, Run


@dataclass(frozen=True)
class Choice:
    """What the command line says about the cases, beside pytest's -k and -m."""

    #: Ids; none for all.
    cases: tuple[str, ...] = ()
    repeat: int = 1
    until_fail: bool = False
    part: Part | None = None


class Selection:
    """A pytest plugin: hooks that choose and multiply what was collected."""

    def __init__(self, run: Run, choice: Choice) -> None:
        self._run = run
        self._choice = choice

    # After pytest's own, which know nothing of repeats.
    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        """Leave the cases that were chosen, as often as each is to run: round after round."""
        if self._choice.cases:
            wanted = set(self._choice.cases)
            left_out = [item for item in items if item.name not in wanted]
            items[:] = [item for item in items if item.name in wanted]
            config.hook.pytest_deselected(items=left_out)
            if unknown := sorted(wanted - {item.name for item in items}):
                raise pytest.UsageError(f"no case {unknown[0]}")
        if self._choice.part is not None:
            self._deal(config, items, self._choice.part)
        if self._choice.repeat > 1:
            items[:] = _repeated(items, self._choice.repeat)

    def _deal(self, config: pytest.Config, items: list[pytest.Item], part: Part) -> None:
        """Leave every `count`th case: neighbours take equally long, and go to different parts."""
        self._run.part = replace(part, of=len(items))
        own = items[part.number - 1 :: part.count]
        config.hook.pytest_deselected(items=[item for item in items if item not in own])
        items[:] = own

    def pytest_runtest_teardown(self, item: pytest.Item) -> None:
        """End the run with the first failure, if that is what was asked for."""
        if not self._choice.until_fail or not isinstance(item, ScenarioItem) or item.ran is None:
            return
        outcome = item.ran.outcome
        bad = outcome.verdict not in (Verdict.PASS, Verdict.SKIP)
        if bad and not self._run.lab.is_known_fail(outcome):
            self._run.has_enough = True
            item.session.shouldfail = f"{item.name}: {outcome.verdict.value}"


def _repeated(items: Sequence[pytest.Item], times: int) -> list[pytest.Item]:
    found: list[pytest.Item] = []
    for number in range(1, times + 1):
        for item in items:
            if not isinstance(item, ScenarioItem):
                found += [item] if number == 1 else []
                continue
            copy: pytest.Item = ScenarioItem.from_parent(
                item.parent,  # type: ignore[arg-type]  # an item has one
                name=f"{item.name} ({number} of {times})",
                case=replace(item.case, repeat=number),
            )
            found.append(copy)
    return found
