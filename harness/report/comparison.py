"""Several runs side by side: which cases ended differently, and how.

Read are the results.jsonl files that runs wrote; a run that was cut short counts for what it has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.report.run_record import CaseRecord, ResultsError, read_record, worst
from harness.report.signature import signature
from harness.report.verdict import Verdict


@dataclass(frozen=True)
class Cell:
    """How one case ended in one run."""

    verdict: Verdict
    reason: str = ""
    known: str = ""
    """Id of the known issue that it is."""
    signature: str = ""
    """What a failure is called (`harness.report.signature`); empty for a PASS and a SKIP."""

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
    same_failures: int
    """Those of them that failed, and in the same way everywhere."""
    partial: int
    """Cases that some runs do not have, and that ended the same in those that do."""


def read_run(directory: Path) -> RunResults:
    """Return what a run recorded in its directory; of a case that was repeated, the worst end.

    Raises ResultsError: there are no results in it, or they are malformed.
    """
    record = read_record(directory)
    if not record.cases:
        raise ResultsError(f"{directory}: no case has ended")
    cells = {case.case: _cell(case) for case in worst(record.cases)}
    return RunResults(directory, str(record.host.get("kernel_release", "")), cells)


def _cell(case: CaseRecord) -> Cell:
    failed = case.verdict not in (Verdict.PASS, Verdict.SKIP)
    return Cell(case.verdict, case.reason, case.known, signature(case) if failed else "")


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
    """Compare the cases that are wanted, in the order in which they come.

    They differ by their verdict, or fail in different ways: by their failure's signature.
    """
    cases = [case for case in dict.fromkeys(_all_cases(runs)) if wanted(case)]
    rows, same, same_failures, partial = [], 0, 0, 0
    for case in cases:
        cells = [run.cells.get(case) for run in runs]
        there = [cell for cell in cells if cell is not None]
        if len({(cell.verdict, cell.signature) for cell in there}) > 1:
            rows.append(Row(case, cells))
        elif len(there) == len(runs):
            same += 1
            same_failures += bool(there[0].signature)
        else:
            partial += 1
    return Comparison(rows, same, same_failures, partial)


def _all_cases(runs: Iterable[RunResults]) -> Iterable[str]:
    for run in runs:
        yield from run.cells
