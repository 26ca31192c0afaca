"""results.jsonl: one event per line, written as it happens: a crash loses nothing recorded."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from harness.errors import HostError


class ResultsFile:
    """An append-only file of events; each line is whole and flushed before the next is begun.

    Any thread may write.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _keep_earlier(path)
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115
        except OSError as e:
            raise HostError(f"cannot write results to {path}: {e.strerror}") from e

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # Closing tries once more to write what could not be written, and was reported, before.
        with contextlib.suppress(OSError):
            self._file.close()

    def write(self, event: str, **data: Any) -> None:
        """Append one event with the wall-clock time.

        Raises:
            HostError: no space; what was written before is whole.
        """
        line = json.dumps({"event": event, "time": round(time.time(), 3), **data}, default=repr)
        try:
            with self._lock:
                self._file.write(line + "\n")
                self._file.flush()
        except OSError as e:
            raise HostError(f"cannot write results to {self.path}: {e.strerror}") from e


def _keep_earlier(path: Path) -> None:
    """Move an earlier run's file aside: two runs in one file would read as one."""
    if path.exists():
        number = 1
        while (aside := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
            number += 1
        path.rename(aside)


def read_results(path: Path) -> list[Mapping[str, Any]]:
    """Return the events of a results file; a last line cut short by a crash is left out."""
    events = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            events.append(json.loads(line))
    return events
