"""What is called at every level: boot the next one, if there is one, then work.

Levels are counted from the host, 0. Whatever happens deeper reaches the outside as events: `stage`
(where a level stands), `console` and `kmsg` (what its kernel says), `memory`, `pulse`, `moved`,
`smi`, `lost`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from harness.nest.plan import Plan


def descend(emit: Callable[..., None], *, level: int, plan: dict[str, Any]) -> dict[str, Any]:
    """Do at `level` what the plan says, and all that lies deeper; return the levels' reports.

    Raises HostLost: a level died.
    Raises LevelFailed: a deeper level reports an error.
    Raises LevelWrong: what a deeper level reports is KVM's fault.
    Raises ScenarioFailure: something in this level's own work was not as it must be.
    """
    # Imported where they are needed: an import costs seconds where Python itself is nested.
    wanted = Plan.from_json(plan)
    reports: dict[str, Any] = {}
    with ExitStack() as stack:
        if level == 1 and wanted.disturbed:
            from harness.nest.dirtying import Dirtying

            stack.enter_context(Dirtying())
        if level < wanted.linux_levels:
            from harness.nest.next_level import boot_level

            reports = boot_level(emit, level + 1, wanted)
        if level:
            from harness.nest.work import work

            reports[f"L{level}"] = work(emit, level, wanted)
    return reports
