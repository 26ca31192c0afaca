"""What the commands that let a storm blow share: the call with its progress, the verdict."""

from __future__ import annotations

from typing import Any

from harness.commands.output import log, progress_bar
from harness.host.session import Event, Host
from harness.probe.kmsg import splats

_BASE_S = 120.0
_TOLD_EVERY = 100
"""Where nobody sees a bar grow."""


def storm(
    where: Host, target: str, count: int, what: str, kind: str, each_s: float, **options: Any
) -> dict[str, Any]:
    """Let a storm blow on a host; return its report, with the verdict.

    Args:
        where: the host.
        target: what is called there, with `count` by the name of `what` in lower case.
        count: how many moves, SMIs, ...
        what: their name, in the plural.
        kind: of the events that come with each `number`.
        each_s: seconds that each may take.
        options: more arguments of the call.

    """
    session = where.start()
    with progress_bar() as progress:
        task = progress.add_task(what, total=count)

        def on_event(event: Event) -> None:
            if event["event"] == "emit" and event["kind"] == kind:
                number = event["data"]["number"]
                progress.update(task, completed=number)
                if not progress.console.is_terminal and number % _TOLD_EVERY == 0:
                    log(f"{number} of {count} {what}")

        result = session.call(
            target,
            timeout_s=_BASE_S + each_s * count,
            on_event=on_event,
            **{what.lower(): count},
            **options,
        )
    host = {"host": where.describe()}
    said = splats(event["text"] for event in result.kmsg)
    if result.outcome == "raise" and "ScenarioFailure" in result.error.get("bases", ()):
        return {**host, "verdict": "FAIL", "why": result.error["message"], "kernel_log": said}
    report: dict[str, Any] = result.unwrap("the storm")
    failed = report["divergences"] or report.get("implausible_save_areas") or said
    return {**host, "verdict": "FAIL" if failed else "PASS", **report, "kernel_log": said}
