"""How fast machines move, against the same ioctls and copies in C (migrate_loops.c).

A round is the first one: all memory that is not zero, once. The downtime is from the pause, with
so and so many pages left, to the destination's word that it runs; both sides also say how long its
parts took (`live.PARTS`), and for how long the machine was held back once before. Runs inside a
host. Standard library only.
"""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from harness.bench.inside import CSide
from harness.bench.migrate_links import LINKS
from harness.bench.migrate_load import Load, NestedLoad, PlainLoad, Size, witness_of
from harness.bench.migrate_points import POINT_NAMES, run_points
from harness.errors import HarnessError
from harness.facts import HostView, nested_svm
from harness.migrate import live
from harness.migrate.loopback import raise_loopback
from harness.migrate.precopy import Options
from kvm_ioctl.handles import Kvm

ROUND, DOWNTIME = "migrate_round", "migrate_downtime"
FEW: Final = "64"
LEFT: Final = {FEW: (64, 2), "2048": (2048, 2), "16mib": (4096, 1)}
"""Pages that are left, and how far they are apart: as many as `Options.few_pages`; many scattered
ones; and what a guest at work dirties in the meantime, a buffer of 16 MiB."""

ROUND_NAMES: Final = tuple(f"{ROUND}_{link}" for link in LINKS)
DOWNTIME_NAMES: Final = tuple(f"{DOWNTIME}_{link}_{left}" for link in LINKS for left in LEFT)
MIGRATE_NAMES: Final = (*ROUND_NAMES, *DOWNTIME_NAMES, *POINT_NAMES)

MOST_MIB: Final = 1024
_LEAST_MIB: Final = 32
_SHARE_OF_MEMORY: Final = 6
"""Both sides have a source of which half is in use, and one destination is alive at a time."""

_CHILD_S: Final = 60.0
_HEAD_PAGES: Final = 16
"""Page tables and descriptor tables, by which the sides may differ; a CPU writes to them too."""


@dataclass(frozen=True)
class Figures:
    """One migration."""

    pages: int
    """Of the first round."""
    size_bytes: int
    """The same on the link."""
    round_s: float
    rest_pages: int
    downtime_s: float
    parts_s: Mapping[str, float]
    """Of the downtime."""
    held_s: float
    """Before it."""


@dataclass(frozen=True)
class Bench:
    """Both sides, ready to move a machine of one size."""

    load: Load
    c_side: CSide
    kvm: Kvm
    size: Size

    @property
    def note(self) -> str:
        """What a row says of the machines."""
        plain = isinstance(self.load, PlainLoad)
        return f"{self.load.title}, {self.size}" + ("" if plain else "; C moves a plain VM")

    def in_c(self, link: str) -> Figures:
        """Move the machine of the C side.

        Raises HostError: it failed.
        """
        size = self.size
        request = f"migrate {link} {size.memory_mib} {size.dirty_pages} {size.stride_pages}"
        said = json.loads(self.c_side.ask(f"migrate {link}", request))
        return Figures(
            said["pages"],
            said["size_bytes"],
            said["round_ns"] / 1e9,
            said["rest_pages"],
            said["downtime_ns"] / 1e9,
            {part: ns / 1e9 for part, ns in said["parts_ns"].items()},
            said["held_ns"] / 1e9,
        )

    def in_python(self, link: str) -> Figures:
        """Move the machine by `live`, and take it back.

        Raises HarnessError: the destination has other memory.
        """
        options = Options(most_rounds=1, few_pages=0, welcome_s=_CHILD_S)
        with LINKS[link](self.kvm) as (ours, arrived):
            sent = live.send(self.load.machine, ours, stop=self.load.dirty, options=options)
            there = arrived()
        # The other one is gone, so that this one may run again.
        sent.machine.resume()
        if there.witness != witness_of(self.load.machine):
            raise HarnessError(f"{link}: the destination has other memory than the source")
        [first], rest = sent.rounds, sent.rest
        return Figures(
            first.pages,
            first.size_bytes,
            first.seconds,
            rest.pages,
            sent.downtime_s,
            sent.downtime_parts_s,
            sent.held_s,
        )

    def compare(self, link: str, *, c_first: bool) -> tuple[Figures, Figures]:
        """Move both machines, one right after the other; return C's figures and Python's.

        Raises HarnessError: they did not do the same.
        """
        c, python = (
            (self.in_c(link), self.in_python(link))
            if c_first
            else (self.in_python(link), self.in_c(link))[::-1]
        )
        self._expect_same(link, c, python)
        return c, python

    def _expect_same(self, link: str, c: Figures, python: Figures) -> None:
        wanted = self.size.dirty_pages
        rests = range(wanted, wanted + _HEAD_PAGES + 1)
        if isinstance(self.load, PlainLoad):
            same = abs(c.pages - python.pages) <= _HEAD_PAGES and python.rest_pages in rests
        else:
            # L1, L2 and their tables are memory too.
            same = python.rest_pages >= wanted
        if not same or c.rest_pages not in rests:
            raise HarnessError(
                f"{link}: C sent {c.pages} pages and then {c.rest_pages},"
                f" Python {python.pages} and then {python.rest_pages}"
            )


def fitting_mib(meminfo: str) -> int:
    """Return the largest power of two of MiB that fits into free memory, up to `MOST_MIB`.

    Args:
        meminfo: the text of /proc/meminfo.

    Raises HarnessError: it does not say how much there is.

    """
    for line in meminfo.splitlines():
        if line.startswith("MemAvailable:"):
            fits = int(line.split()[1]) // 1024 // _SHARE_OF_MEMORY
            return int(min(MOST_MIB, max(_LEAST_MIB, 1 << (max(1, fits).bit_length() - 1))))
    raise HarnessError("/proc/meminfo has no MemAvailable")


def run_migrate_benchmarks(
    emit: Callable[..., None],
    executable: str,
    names: list[str],
    repeat: int,
    sample_s: float,
    count: int | None = None,
    memory_mib: int | None = None,
) -> None:
    """Run the named benchmarks; emit a `pair` for every repetition, `skipped` for what cannot be.

    Args:
        emit: the agent's.
        executable: migrate_loops.c, compiled for any x86-64 Linux, in base64.
        names: of `MIGRATE_NAMES`.
        repeat: repetitions of each, C first in every other one.
        sample_s: seconds that a sample of the state's ioctls shall take in C.
        count: rounds of such a sample; by default as many as `sample_s` asks for.
        memory_mib: of the machines; by default what fits, see `fitting_mib`.

    Raises HostError: C was refused something. Raises HarnessError: the two did not do the same.

    """
    mib = memory_mib or fitting_mib(Path("/proc/meminfo").read_text())
    with Kvm() as kvm, CSide(base64.b64decode(executable), "migrate_loops") as c_side:
        for left in LEFT:
            _run_size(emit, names, repeat, c_side, kvm, mib, left)
        run_points(emit, names, repeat, c_side, kvm, sample_s, count)


def _run_size(
    emit: Callable[..., None],
    names: list[str],
    repeat: int,
    c_side: CSide,
    kvm: Kvm,
    mib: int,
    left: str,
) -> None:
    """Run what is wanted of one of `LEFT`."""
    links = [link for link in LINKS if _wanted(names, link, left)]
    if not links:
        return
    raise_loopback()
    size = Size(mib, *LEFT[left])
    with _opened(kvm, size) as load:
        bench = Bench(load, c_side, kvm, size)
        for link in links:
            # What is done for the first time takes longer, in Python above all.
            bench.compare(link, c_first=True)
            for number in range(repeat):
                c, python = bench.compare(link, c_first=number % 2 == 0)
                for name in _wanted(names, link, left):
                    _emit(emit, name, bench, c, python)


def _wanted(names: list[str], link: str, left: str) -> list[str]:
    rounds = [f"{ROUND}_{link}"] if left == FEW else []
    return [n for n in (*rounds, f"{DOWNTIME}_{link}_{left}") if n in names]


@contextlib.contextmanager
def _opened(kvm: Kvm, size: Size) -> Iterator[Load]:
    load: Load = (NestedLoad if nested_svm(HostView()).holds else PlainLoad)(kvm, size)
    with load.machine:
        yield load


def _emit(emit: Callable[..., None], name: str, bench: Bench, c: Figures, python: Figures) -> None:
    is_round = name.startswith(ROUND)
    side = _round if is_round else _downtime
    ours, theirs = side(python), side(c)
    emit(
        "pair",
        name=name,
        note=bench.note,
        unit="MiB" if is_round else "",
        count=max(1, ours["done"] >> 20) if is_round else 1,
        parts=[],
        ours=ours,
        theirs=theirs,
    )


def _round(figures: Figures) -> dict[str, Any]:
    return {"done": figures.size_bytes, "witness": figures.pages, "seconds": figures.round_s}


def _downtime(figures: Figures) -> dict[str, Any]:
    return {
        "done": 1,
        "witness": figures.rest_pages,
        "seconds": figures.downtime_s,
        "parts_s": {**figures.parts_s, "held before": figures.held_s},
    }
