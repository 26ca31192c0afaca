"""How far each host is: one line for each, from what it has recorded so far."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.fleet.plan import FleetPlan
from harness.report.run_record import FILE

#: Where nobody sees a line change: so often at most for each host.
_TOLD_EVERY_S = 30.0


class HostProgress:
    """Reads on in a host's results, event by event."""

    def __init__(self, host: str, file: Path) -> None:
        self.host = host
        self.counts: Counter[str] = Counter()
        self.planned: int | None = None
        self.has_ended = False
        self._file = file
        self._offset = 0
        self._case = ""

    def read_on(self) -> bool:
        """Take what is new; say whether there was something."""
        try:
            with self._file.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return False
        # What is behind the last end of a line is being written just now.
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            self._take(json.loads(line))
        return bool(whole)

    def _take(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "plan":
            self.planned = len(event["cases"])
        elif kind == "begin":
            self._case = event["case"]
        elif kind == "end":
            self._case = ""
            self.counts[event["verdict"]] += 1
        elif kind == "summary":
            self.has_ended = True

    def line(self) -> str:
        """Return the host's line."""
        if self.planned is None:
            return f"{self.host}: being reached"
        said = ", ".join(f"{count} {verdict}" for verdict, count in self.counts.items())
        done = f"{self.counts.total()} of {self.planned}"
        now = "" if self.has_ended or not self._case else f" ({self._case})"
        return f"{self.host}: {done}{': ' if said else ''}{said}{now}"


class Progress:
    """Tells the lines of all hosts, each when it has changed and not too often."""

    def __init__(self, plan: FleetPlan, tell: Callable[[str], None]) -> None:
        self._hosts = [HostProgress(host, plan.where(host) / FILE) for host in plan.hosts]
        self._tell = tell
        self._told: dict[str, tuple[float, str]] = {}

    def look(self, *, last: bool = False) -> None:
        """Read on, and tell what is due; the `last` time, all that was not told."""
        for host in self._hosts:
            host.read_on()
            line = host.line()
            at, before = self._told.get(host.host, (-_TOLD_EVERY_S, ""))
            is_due = last or host.has_ended or time.monotonic() - at > _TOLD_EVERY_S
            if line != before and is_due:
                self._told[host.host] = (time.monotonic(), line)
                self._tell(line)
