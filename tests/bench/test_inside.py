import pytest

from harness.bench.inside import compare, fitting_count
from harness.bench.loops import IoctlBenchmark, Work
from harness.errors import HarnessError


class Clock:
    """Runs that take a fixed time per round and some for starting."""

    def __init__(self, per_round_s, start_s=0.0):
        self.per_round_s, self.start_s = per_round_s, start_s
        self.counts = []

    def __call__(self, count):
        self.counts.append(count)
        return self.start_s + count * self.per_round_s


@pytest.mark.parametrize("per_round_s", [1e-7, 1e-5, 1e-3, 1e-2])
def test_the_count_fits_the_time(per_round_s):
    count = fitting_count(Clock(per_round_s), sample_s=0.1, most=1 << 30)
    assert count * per_round_s == pytest.approx(0.1, rel=0.01)


def test_the_count_never_passes_the_most():
    clock = Clock(1e-7)
    assert fitting_count(clock, sample_s=1.0, most=50) == 50
    assert max(clock.counts) == 50


def test_a_slow_round_is_run_at_least_once():
    assert fitting_count(Clock(10.0), sample_s=0.1, most=50) == 1


class FakeC:
    def __init__(self, order, work):
        self.order, self.work = order, work

    def run(self, loop, count, parts):
        self.order.append(("C", loop, count, parts))
        return self.work


def benchmark(order, work):
    def run(kvm, count, parts):
        order.append(("Python", count, parts))
        return work

    return IoctlBenchmark("exits", run, "run_exit", ("regs",))


@pytest.mark.parametrize("c_first", [True, False])
def test_the_two_sides_get_the_same_count_and_parts_in_turn(c_first):
    order = []
    c, python = Work(7, 42, 0.1), Work(7, 42, 0.3)
    seen = compare(benchmark(order, python), FakeC(order, c), None, 7, c_first=c_first)
    assert seen == (c, python)
    in_order = [("C", "run_exit", 7, ("regs",)), ("Python", 7, ("regs",))]
    assert order == (in_order if c_first else in_order[::-1])


@pytest.mark.parametrize("python", [Work(6, 42, 0.1), Work(7, 41, 0.1)])
def test_two_sides_that_did_not_do_the_same_are_not_compared(python):
    with pytest.raises(HarnessError, match=r"exits: C did 7 \(witness 42\), Python"):
        compare(benchmark([], python), FakeC([], Work(7, 42, 0.1)), None, 7, c_first=True)


def test_what_a_host_refuses_is_left_out():
    whole = IoctlBenchmark("state", None, "get_state", ("regs", "nested", "msrs"))
    assert whole.without({"nested", "lapic"}).parts == ("regs", "msrs")
    assert whole.without({"nested", "lapic"}).c_loop == "get_state"
