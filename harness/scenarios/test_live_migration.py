"""Live migration: memory is sent while L2 or L3 writes it, and nothing that they write is lost.

KVM write-protects what it logs (KVM_MEM_LOG_DIRTY_PAGES), also below nested page tables and in its
shadows of L1's tables; what L2 writes is dirty as an address of L1. With dirty rings KVM queues
pages per vCPU, and leaves the guest (KVM_EXIT_DIRTY_RING_FULL) when a ring is full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Final

from harness.facts import dirty_rings, nested_svm
from harness.migrate.difference import memory_differences, state_differences
from harness.migrate.live_move import hand_over
from harness.migrate.notes import Note
from harness.migrate.precopy import Options
from harness.migrate.state import capture
from harness.proxy.level import Level
from harness.proxy.machine import ProxyMachine
from harness.proxy.ops import Op
from harness.proxy.paging import PAGE
from harness.proxy.program import atomic_add, fill, load, loop, store
from harness.scenarios.case import scenario
from harness.scenarios.context import Context
from harness.scenarios.twins import Log, Stop, expect_twins

RING_BYTES: Final = 4096
"""256 entries, the shortest that KVM takes; 64 of them KVM keeps for itself."""
MANY_PAGES: Final = 320
"""Pages that do not go into a ring."""

PAGES: Final = 12
"""Pages that a loop writes."""
OPERATIONS: Final = 3_000_000
"""Of a loop: seconds, in which it is moved a few times."""
TIMEOUT_S: Final = 60.0
FILLED_BYTES_PER_S: Final = 4 << 20
"""So slow that rings fill up meanwhile."""
FILLS: Final = 16
"""How often the guest writes all pages: enough for more than one migration of that speed."""

CONVERGES: Final = Options(few_pages=256)
DOES_NOT: Final = Options(few_pages=-1, most_rounds=4)
"""However little is left, it is not few enough."""

_GUESTS: Final[dict[str, Callable[[ProxyMachine], Level]]] = {
    "l1": lambda machine: machine.l1,
    "l2_npt": lambda machine: machine.l1.launch(npt=True),
    "l2_shadow": lambda machine: machine.l1.launch(npt=False),
    "l3": lambda machine: machine.l1.launch().launch(),
    "l3_shadow": lambda machine: machine.l1.launch(npt=False).launch(npt=False),
}


def _pages(machine: ProxyMachine) -> list[int]:
    return [int(machine.pages.take()) for _ in range(PAGES)]


def _writes(machine: ProxyMachine, log: Log, guest: str) -> Iterator[Stop]:
    """Have a guest count in many pages, and compare what it counted with how often it did."""
    level = _GUESTS[guest](machine)
    pages = _pages(machine)
    body: list[Op] = [atomic_add(page, 1) for page in pages]
    program = loop(OPERATIONS // len(body), [*body, store(pages[0] + PAGE // 2, 7)])
    thread = machine.in_thread(level, lambda level: level.run(program, timeout_s=TIMEOUT_S))
    yield thread
    log("the loop", thread.join(TIMEOUT_S))
    log("the counters", level.run([load(page) for page in pages]))


class _Live:
    """Moves machines live, and looks whether both sides have the same at that moment."""

    def __init__(self, context: Context, options: Options) -> None:
        self.converged: list[bool] = []
        self.pages_again = 0
        """Pages that were sent more than once, for they were written meanwhile."""
        self.rings_full = 0
        self._context = context
        self._options = options

    def __call__(self, machine: ProxyMachine) -> tuple[Note, ...]:
        """Move one; return what the kernel did not give or take."""
        handed = hand_over(machine, options=self._options, sides=lambda: {"user": [1, 2]})
        sent, received = handed.sent, handed.received
        found = [
            *memory_differences(machine, received.machine),
            *state_differences(sent.state, capture(received.machine)),
        ]
        self._context.expect("differences of the two sides", "; ".join(map(str, found)), "", str)
        self._context.expect("what the user sent along", received.sides, {"user": [1, 2]})
        self._context.note(
            "live migration",
            rounds=[str(done) for done in sent.rounds],
            rest=str(sent.rest),
            converged=sent.converged,
            downtime_s=round(sent.downtime_s, 3),
        )
        self.converged.append(sent.converged)
        self.pages_again += sum(done.pages for done in (*sent.rounds[1:], sent.rest))
        if machine.dirty_rings:
            self.rings_full += machine.dirty_rings.times_full
        handed.go_on()
        return (*sent.state.notes, *received.notes)


def _expect_twins(
    context: Context, guest: str, options: Options, *, dirty_ring_bytes: int = 0
) -> _Live:
    live = _Live(context, options)
    journey = partial(_writes, guest=guest)
    expect_twins(context, journey, mover=live, dirty_ring_bytes=dirty_ring_bytes)
    context.expect("pages were written while they were sent", live.pages_again > 0, True)
    return live


@scenario(
    needs=[nested_svm], axes={"guest": tuple(_GUESTS)}, levels=3, timeout_s=TIMEOUT_S, quick=True
)
def test_live_migration_by_dirty_log(context: Context, guest: str) -> None:
    """A machine moved live by the dirty log, its guest writing memory, ends as its twin."""
    live = _expect_twins(context, guest, CONVERGES)
    context.expect("every migration converged", all(live.converged), True)


@scenario(
    needs=[nested_svm, dirty_rings], axes={"guest": tuple(_GUESTS)}, levels=3, timeout_s=TIMEOUT_S
)
def test_live_migration_by_dirty_rings(context: Context, guest: str) -> None:
    """A machine moved live by dirty rings, its guest writing memory, ends as its twin."""
    live = _expect_twins(context, guest, CONVERGES, dirty_ring_bytes=RING_BYTES)
    context.expect("every migration converged", all(live.converged), True)
    context.note("KVM_EXIT_DIRTY_RING_FULL", answered=live.rings_full)


def _fills(machine: ProxyMachine, log: Log, guest: str) -> Iterator[Stop]:
    """Have a guest write more pages than a ring has room for, again and again."""
    level = _GUESTS[guest](machine)
    at = machine.pages.take(MANY_PAGES * PAGE)
    body = [fill(at, value, MANY_PAGES * PAGE) for value in (1, 2, 3)]
    thread = machine.in_thread(
        level, lambda level: level.run(loop(FILLS, body), timeout_s=TIMEOUT_S)
    )
    yield thread
    log("the loop", thread.join(TIMEOUT_S))
    log("what it wrote", machine.memory.read(at, MANY_PAGES * PAGE))


@scenario(
    needs=[nested_svm, dirty_rings],
    axes={"guest": ("l1", "l2_npt", "l2_shadow")},
    levels=2,
    timeout_s=TIMEOUT_S,
)
def test_live_migration_with_full_dirty_rings(context: Context, guest: str) -> None:
    """A dirty ring that is full stops the guest until it is emptied, and no page is lost."""
    live = _Live(context, Options(few_pages=MANY_PAGES * 2, bytes_per_s=FILLED_BYTES_PER_S))
    journey = partial(_fills, guest=guest)
    expect_twins(context, journey, mover=live, dirty_ring_bytes=RING_BYTES)
    context.note("KVM_EXIT_DIRTY_RING_FULL", answered=live.rings_full)
    context.expect("KVM_EXIT_DIRTY_RING_FULL was seen", live.rings_full > 0, True)


@scenario(needs=[nested_svm], axes={"guest": ("l2_npt", "l3")}, levels=3, timeout_s=TIMEOUT_S)
def test_live_migration_that_does_not_converge(context: Context, guest: str) -> None:
    """A machine of which there is always too much left is stopped at the limit, and is its twin."""
    live = _expect_twins(context, guest, DOES_NOT)
    context.expect("a migration converged", any(live.converged), False)
