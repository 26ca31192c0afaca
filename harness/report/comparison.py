"""Several runs side by side: which cases ended differently, and how.

Read are the results.jsonl files that runs wrote; a run that was cut short counts for what it has.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import HostError
from harness.report.results import read_results
from harness.report.verdict import Verdict

FILE = "results.jsonl"


class ResultsError(HostError):
    """A directory that holds no results; one line says what is wrong with it."""


@dataclass(frozen=True)
class Cell:
    """How one case ended in one run."""

    verdict: Verdict
    reason: str = ""
    known: str = ""
    """Id of the known issue that it is."""

    def __str__(self) -> str:
        """Return the verdict, with a star if it is a FAIL that is known."""
        star = "*" if self.known and self.verdict is Verdict.FAIL else ""
        return f"{self.verdict.value}{star}"


@dataclass(frozen=True)
class RunResults:
    """What one run recorded."""

    directory: Path
    kernel: str
    """Release of the kernel that the cases ran on; empty if none got so far."""
    cells: Mapping[str, Cell]


@dataclass(frozen=True)
class Row:
    """A case that did not end the same everywhere."""

    case: str
    cells: Sequence[Cell | None]
    """In the order of the runs; None: the run has no such case."""


@dataclass(frozen=True)
class Comparison:
    """What is the same in several runs, and what is not."""

    rows: Sequence[Row]
    same: int
    """Cases of all runs that ended the same in each."""
    partial: int
    """Cases that some runs do not have, and that ended the same in those that do."""


def read_run(directory: Path) -> RunResults:
    """Return what a run recorded in its directory; of a case that ran twice, the last end.

    Raises ResultsError: there are no results in it, or they are malformed.
    """
    path = directory / FILE
    try:
        events = read_results(path)
    except json.JSONDecodeError as e:
        raise ResultsError(f"{path}: a line is no JSON ({e.msg})") from None
    except UnicodeDecodeError:
        raise ResultsError(f"{path}: no text") from None
    except OSError as e:
        raise ResultsError(f"{path}: {e.strerror}") from None
    try:
        ends = [event for event in events if event["event"] == "end"]
        cells = {str(end["case"]): _cell(end) for end in ends}
        kernels = [str(end["host"]["kernel_release"]) for end in ends if end["host"]]
    except (KeyError, TypeError, ValueError) as e:
        raise ResultsError(f"{path}: malformed ({type(e).__name__}: {e})") from None
    if not cells:
        raise ResultsError(f"{path}: no case has ended")
    return RunResults(directory, kernels[0] if kernels else "", cells)


def _cell(end: Mapping[str, Any]) -> Cell:
    return Cell(Verdict(end["verdict"]), str(end["reason"]), str(end["known"]))


def titles(runs: Sequence[RunResults]) -> list[str]:
    """Return a title for each run: its kernel, or its directory too if two have the same."""
    kernels = [run.kernel for run in runs]
    return [
        run.kernel if run.kernel and kernels.count(run.kernel) == 1 else _named(run) for run in runs
    ]


def _named(run: RunResults) -> str:
    name = run.directory.resolve().name
    return f"{run.kernel} ({name})" if run.kernel else name


def compare(
    runs: Sequence[RunResults], wanted: Callable[[str], bool] = lambda case: True
) -> Comparison:
    """Compare the cases that are wanted, in the order in which they come."""
    cases = [case for case in dict.fromkeys(_all_cases(runs)) if wanted(case)]
    rows, same, partial = [], 0, 0
    for case in cases:
        cells = [run.cells.get(case) for run in runs]
        there = [cell for cell in cells if cell is not None]
        if len({cell.verdict for cell in there}) > 1:
            rows.append(Row(case, cells))
        elif len(there) == len(runs):
            same += 1
        else:
            partial += 1
    return Comparison(rows, same, partial)


def _all_cases(runs: Iterable[RunResults]) -> Iterable[str]:
    for run in runs:
        yield from run.cells
