"""How fast guests are driven through their proxies: operations and VMRUNs at L1, L2 and L3.

Every operation and every entry of a guest adds 1 to a counter of the guest's; what it counted must
be what was done. Runs inside a host. Standard library only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from time import monotonic_ns
from typing import Final

from harness.bench.inside import fitting_count
from harness.bench.loops import Work, run_machine
from harness.errors import HarnessError
from harness.facts import HostView, nested_svm
from harness.machine.addresses import Gpa
from harness.proxy.guest_level import GuestLevel
from harness.proxy.level import Level
from harness.proxy.machine import ProxyMachine
from harness.proxy.ops import EnterFlag, Status
from harness.proxy.program import Result, atomic_add, loop, rdtsc, simple
from harness.proxy.vmexit import INSTRUCTION_LENGTHS
from harness.svm.exit_codes import ExitCode
from kvm_ioctl.handles import Kvm

BATCH: Final = 1000
"""Operations in a program of `batched`; they cost one crossing to Python."""

VMRUN_BATCH: Final = {1: 100, 2: 5}
"""VMRUNs in a program, by the depth of the level that executes them."""

EMULATED_SVM_NOTE: Final = "each is two exits to Python, which emulates SVM for L2"

_COUNTING_GUEST = bytes.fromhex("48ffc3 0f01d9 ebf8")
"""inc %rbx; vmmcall; jmp back. The host moves RIP past the VMMCALL."""

_MOST_ROUNDS = 1 << 20


class Bench:
    """The levels that are measured, each made when it is first wanted; a context manager."""

    def __init__(self, kvm: Kvm) -> None:
        self.kvm = kvm
        self._machine: ProxyMachine | None = None
        self._levels: list[Level] = []
        self._counting: dict[int, GuestLevel] = {}

    def close(self) -> None:
        """End the machine."""
        if self._machine is not None:
            self._machine.close()

    @property
    def machine(self) -> ProxyMachine:
        """The machine of all levels."""
        if self._machine is None:
            self._machine = ProxyMachine(self.kvm)
            self._levels = [self._machine.l1]
        return self._machine

    def level(self, depth: int) -> Level:
        """Return the level of a depth, ready for a program."""
        machine = self.machine
        while len(self._levels) < depth:
            self._levels.append(self._levels[-1].launch())
        found = self._levels[depth - 1]
        found.make_current(machine.timeout_s)
        return found

    def counting_guest(self, host: Level) -> GuestLevel:
        """Return a guest of `host` that counts its entries in RBX and exits at once.

        It has VMRUN and #VMEXIT only: no VMLOAD and VMSAVE, no STGI.
        """
        if host.depth not in self._counting:
            guest = host.launch(name=f"counting L{host.depth + 1}", enter_flags=EnterFlag.REPORT)
            guest.vmcb["rip"] = host.instance.put_code(_COUNTING_GUEST)
            guest.set_gprs(rbx=0)
            self._counting[host.depth] = guest
        return self._counting[host.depth]


@contextmanager
def opened_bench(kvm: Kvm) -> Iterator[Bench]:
    """Give a `Bench`, and end its machine afterwards."""
    bench = Bench(kvm)
    try:
        yield bench
    finally:
        bench.close()


def _counter(level: Level) -> int:
    """Return what the level has counted, as its memory has it, not as it says."""
    gpa = level.machine_address(level.scratch)
    if gpa is None:
        raise HarnessError(f"{level.name}: its scratch memory is nowhere")
    return level.cpu.machine.memory.read_int(Gpa(gpa), 8)


def _must_be_done(level: Level, result: Result) -> None:
    if result.status is not Status.DONE:
        raise HarnessError(f"{level.name}: {result}")


def single(depth: int, bench: Bench, rounds: int) -> Work:
    """Run operations one by one, each a crossing to Python; the witness is the guest's counter."""
    level = bench.level(depth)
    op = atomic_add(level.scratch, 1)
    level.do(op)  # what is touched first is mapped now
    done, before = 0, _counter(level)
    start = monotonic_ns()
    for done in range(1, rounds + 1):  # noqa: B007
        _must_be_done(level, level.do(op))
    seconds = (monotonic_ns() - start) / 1e9
    return Work(done, _counter(level) - before, seconds)


def batched(depth: int, bench: Bench, rounds: int) -> Work:
    """Run programs of `BATCH` operations, each a crossing; the witness is the guest's counter."""
    level = bench.level(depth)
    op = atomic_add(level.scratch, 1)
    level.do(op)  # what is touched first is mapped now
    program = loop(BATCH, [op])
    done, before = 0, _counter(level)
    start = monotonic_ns()
    for _ in range(rounds):
        done += level.run(program)[0].values[0]
    seconds = (monotonic_ns() - start) / 1e9
    return Work(done, _counter(level) - before, seconds)


def vmrun(depth: int, bench: Bench, rounds: int) -> Work:
    """Run a guest that exits at once; the witness is that guest's counter.

    The seconds are the host level's, by its time stamp counter from the first VMRUN of a program to
    the last #VMEXIT: no crossing for the program is in them.
    """
    level = bench.level(depth)
    guest = bench.counting_guest(level)
    entry = guest.entry_op(INSTRUCTION_LENGTHS[ExitCode.SVM_EXIT_VMMCALL])
    level.run([entry, simple("STGI")])  # what is touched first is mapped now
    # #VMEXIT leaves GIF at 0, which the next VMRUN does not mind.
    program = [rdtsc(), *loop(VMRUN_BATCH[depth], [entry]), rdtsc(), simple("STGI")]
    before, done, ticks = guest.gprs.rbx, 0, 0
    for _ in range(rounds):
        first, looped, entered, last, _ = level.run(program)
        _must_be_done(level, entered)
        if entered.values[0] != ExitCode.SVM_EXIT_VMMCALL:
            raise HarnessError(f"{guest.name}: exit code {entered.values[0]:#x}, not its VMMCALL's")
        done += looped.values[0]
        ticks += last.value - first.value
    tsc_khz = level.cpu.runner.vcpu.get_tsc_khz()
    return Work(done, guest.gprs.rbx - before, ticks / tsc_khz / 1e3)


def port_exit(bench: Bench, rounds: int) -> Work:
    """Run a guest of a port exit per round, without a proxy: what a crossing costs at least."""
    return run_machine(bench.kvm, rounds, ())


@dataclass(frozen=True)
class Activity:
    """Something to be done in rounds, and the levels that it takes."""

    title: str
    run: Callable[[Bench, int], Work]
    depth: int = 1


def _at(depth: int, what: Callable[[int, Bench, int], Work]) -> Activity:
    return Activity(f"{what.__name__} L{depth}", partial(what, depth), depth)


PORT_EXIT: Final = Activity("port exit", port_exit)
SINGLE: Final = {depth: _at(depth, single) for depth in (1, 2, 3)}
BATCHED: Final = {depth: _at(depth, batched) for depth in (1, 2, 3)}
VMRUN: Final = {
    depth: Activity(f"VMRUN L{depth}", partial(vmrun, depth), depth + 1) for depth in (1, 2)
}


@dataclass(frozen=True)
class ProxyBenchmark:
    """One row: an activity, and another one that it is a share of."""

    name: str
    unit: str
    """What a round is, in the plural."""
    ours: Activity
    against: Activity
    note: str = ""

    @property
    def depth(self) -> int:
        """The levels that it takes."""
        return max(self.ours.depth, self.against.depth)


_OPERATIONS = "operations"

PROXY_BENCHMARKS: Final = (
    ProxyBenchmark("proxy_single_l1", _OPERATIONS, SINGLE[1], PORT_EXIT),
    ProxyBenchmark("proxy_batched_l1", _OPERATIONS, BATCHED[1], SINGLE[1]),
    ProxyBenchmark("proxy_single_l2", _OPERATIONS, SINGLE[2], SINGLE[1]),
    ProxyBenchmark("proxy_batched_l2", _OPERATIONS, BATCHED[2], SINGLE[2]),
    ProxyBenchmark("proxy_inside_l2", _OPERATIONS, BATCHED[2], BATCHED[1]),
    ProxyBenchmark("proxy_vmrun_l1_l2", "VMRUNs", VMRUN[1], SINGLE[1]),
    ProxyBenchmark("proxy_single_l3", _OPERATIONS, SINGLE[3], SINGLE[2]),
    ProxyBenchmark("proxy_batched_l3", _OPERATIONS, BATCHED[3], SINGLE[3]),
    ProxyBenchmark("proxy_inside_l3", _OPERATIONS, BATCHED[3], BATCHED[2]),
    ProxyBenchmark("proxy_vmrun_l2_l3", "VMRUNs", VMRUN[2], SINGLE[2], EMULATED_SVM_NOTE),
)
"""In the order of their levels: what fails at L3 costs no row of L2."""


def measure(activity: Activity, bench: Bench, rounds: int) -> Work:
    """Run an activity.

    Raises HarnessError: the guest did not count what was done.
    """
    work = activity.run(bench, rounds)
    if work.witness != work.done:
        raise HarnessError(f"{activity.title}: did {work.done}, the guest counted {work.witness}")
    return work


def compare(
    benchmark: ProxyBenchmark, bench: Bench, rounds: Callable[[Activity], int], *, ours_first: bool
) -> tuple[Work, Work]:
    """Run both activities, one right after the other; return ours and the other."""
    sides = (benchmark.ours, benchmark.against)
    ordered = sides if ours_first else sides[::-1]
    works = [measure(side, bench, rounds(side)) for side in ordered]
    ours, theirs = works if ours_first else works[::-1]
    return ours, theirs


def run_proxy_benchmarks(
    emit: Callable[..., None],
    names: list[str],
    repeat: int,
    sample_s: float,
    count: int | None = None,
) -> None:
    """Run the named benchmarks; emit a `pair` for every repetition, `skipped` for what cannot be.

    Args:
        emit: the agent's.
        names: of `PROXY_BENCHMARKS`.
        repeat: repetitions of each, ours first in every other one.
        sample_s: seconds that each side shall take.
        count: rounds of each side; by default as many as `sample_s` asks for.

    Raises HarnessError: a guest did not do what was asked for. Raises ScenarioFailure: it crashed.

    """
    nested = nested_svm(HostView())
    with Kvm() as kvm, opened_bench(kvm) as bench:
        found: dict[Activity, int] = {}

        def rounds(activity: Activity) -> int:
            if activity not in found:
                found[activity] = count or fitting_count(
                    lambda trial: measure(activity, bench, trial).seconds, sample_s, _MOST_ROUNDS
                )
            return found[activity]

        for benchmark in PROXY_BENCHMARKS:
            if benchmark.name not in names:
                continue
            if benchmark.depth > 1 and not nested.holds:
                emit("skipped", name=benchmark.name, reason=f"nested_svm: {nested.evidence}")
                continue
            rounds(benchmark.ours), rounds(benchmark.against)
            for number in range(repeat):
                works = compare(benchmark, bench, rounds, ours_first=number % 2 == 1)
                _emit_pair(emit, benchmark, *works)


def _emit_pair(
    emit: Callable[..., None], benchmark: ProxyBenchmark, ours: Work, theirs: Work
) -> None:
    emit(
        "pair",
        name=benchmark.name,
        against=benchmark.against.title,
        unit=benchmark.unit,
        note=benchmark.note,
        count=ours.done,
        parts=[],
        ours={"done": ours.done, "witness": ours.witness, "seconds": ours.seconds},
        theirs={"done": theirs.done, "witness": theirs.witness, "seconds": theirs.seconds},
    )
