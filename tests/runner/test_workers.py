"""Cases on several hosts at once: who runs what, in which order it is shown, how it ends."""

import threading
from collections import Counter

import pytest
from fake_pool import FakePool, scenario_source
from waiting import wait_until

from harness.errors import HarnessError, HostError
from harness.host.session import Cancelled
from harness.report.verdict import Outcome, Verdict
from harness.runner.lab import Ran
from harness.runner.workers import CaseQueue, Workers
from harness.scenarios.case import Case, Scenario

DEADLINE_S = 30


def case(name="x", **params):
    def function(context):
        """Claim something."""

    function.__name__ = f"test_{name}"
    return Case(Scenario(function, params=params), {})


PLAIN, OTHER = case(), case(nested="0")


def taken(queue, worker, count):
    return [queue.take(worker) for _ in range(count)]


def test_without_parameters_the_next_case_is_anybodys():
    queue = CaseQueue([PLAIN] * 3)
    assert [queue.take(worker) for worker in ("a", "b", "a", "b")] == [0, 1, 2, None]


def test_cases_with_parameters_stay_with_whoever_has_the_host():
    queue = CaseQueue([OTHER, OTHER, PLAIN, OTHER, PLAIN])
    assert queue.take("a") == 0
    assert taken(queue, "b", 2) == [2, 4]
    assert taken(queue, "a", 2) == [1, 3]


def test_nobody_is_idle_because_of_that():
    queue = CaseQueue([OTHER] * 3)
    assert [queue.take(worker) for worker in ("a", "b", "a", "b")] == [0, 1, 2, None]


def test_each_set_of_parameters_is_one_of_its_own():
    queue = CaseQueue([case(npt="0"), case(nested="0"), case(npt="0"), case(nested="0")])
    assert [queue.take(worker) for worker in ("a", "b", "a", "b")] == [0, 1, 2, 3]


class FakeLab:
    """In place of Lab: what each case does is a function, by its name."""

    def __init__(self, **does):
        self.stopping = threading.Event()
        self.does = does
        self.ran_by = {}

    def run(self, pool, its_case):
        name = its_case.scenario.name
        self.ran_by[name] = pool
        self.does.get(name, lambda lab: None)(self)
        if self.stopping.is_set():
            raise Cancelled("the run ends early")
        return Ran(Outcome(Verdict.PASS, name), 0.0)


def raises(error):
    def do(lab):
        raise error

    return do


def workers(names, jobs=2, **does):
    lab = FakeLab(**does)
    made = Workers(lab, [FakePool() for _ in range(jobs)], [case(name) for name in names])
    return lab, made


def test_two_are_at_work_at_once():
    both = threading.Barrier(2, timeout=DEADLINE_S)
    lab, made = workers("ab", a=lambda lab: both.wait(), b=lambda lab: both.wait())
    with made:
        assert [made.wait(n).outcome.reason for n in (0, 1)] == ["a", "b"]
    assert lab.ran_by["a"] is not lab.ran_by["b"]


def test_a_slow_case_does_not_hold_the_others_up():
    seen = threading.Event()
    lab, made = workers("abcd", a=lambda lab: seen.wait(DEADLINE_S))
    with made:
        assert made.wait(3).outcome.reason == "d"
        assert list(made.ended()) == [1, 2, 3]
        seen.set()
        assert made.wait(0).outcome.reason == "a"
    assert Counter(id(pool) for pool in lab.ran_by.values()) == {
        id(lab.ran_by["a"]): 1,
        id(lab.ran_by["b"]): 3,
    }


def test_pools_are_closed_by_the_threads_that_used_them():
    """An emulated machine ends with the thread that started it."""

    class Pool(FakePool):
        def __enter__(self):
            self.opened_in = threading.get_ident()
            return super().__enter__()

        def __exit__(self, *error):
            self.closed_in = threading.get_ident()
            super().__exit__(*error)

    pools = [Pool(), Pool()]
    with Workers(FakeLab(), pools, [case()] * 4) as made:
        made.wait(3)
    assert all(pool.closed and pool.opened_in == pool.closed_in for pool in pools)
    assert threading.get_ident() not in [pool.closed_in for pool in pools]
    assert made.hosts() == [{"kind": "emulated", "kernel_release": "6.1.0-fake"}]


def test_to_leave_early_ends_what_is_under_way():
    """Each is told to stop, and has no outcome; what was done before keeps its own."""

    def hang(lab):
        wait_until(lab.stopping.is_set)

    def interrupt(lab, made):
        with made:
            made.wait(0)
            wait_until(lambda: {"b", "c"} <= set(lab.ran_by))
            raise KeyboardInterrupt

    lab, made = workers("abcd", b=hang, c=hang)
    with pytest.raises(KeyboardInterrupt):
        interrupt(lab, made)
    assert list(made.ended()) == [0]
    assert "d" not in lab.ran_by
    assert all(pool.closed and pool.cancelled for pool in made._pools)
    with pytest.raises(Cancelled):
        made.wait(1)


def test_after_a_whole_run_nothing_is_cancelled():
    lab, made = workers("ab")
    with made:
        made.wait(1)
        made.wait(0)
    assert not any(pool.cancelled for pool in made._pools)
    assert not lab.stopping.is_set()


def test_an_error_of_the_harness_is_its_cases_and_the_rest_goes_on():
    _, made = workers("abc", a=raises(HarnessError("a bug")))
    with made:
        with pytest.raises(HarnessError, match="a bug"):
            made.wait(0)
        assert made.wait(2).outcome.reason == "c"


class Stubborn(FakePool):
    def __exit__(self, *error):
        if not self.closed:
            self.closed = True
            raise HostError("it does not end")


def test_a_worker_that_cannot_close_its_hosts_is_told_of():
    made = Workers(FakeLab(), [Stubborn()], [case()])
    with made:
        made.wait(0)
    assert [str(error) for error in made.errors] == ["it does not end"]


# Through the command


def test_the_order_of_what_is_shown_is_that_of_collection(run):
    names = [f"n{number}" for number in range(12)]
    ran = run(jobs=3, **dict.fromkeys(names, "pass"))
    assert len(ran.pools) == 3
    assert [c.get("name") for c in ran.junit.iter("testcase")] == names
    shown = [x.split("::")[1].split()[0] for x in ran.output.splitlines() if x.endswith(" PASS")]
    assert shown == names
    assert sorted(c[0] for pool in ran.pools for c in pool.calls) == sorted(names)
    assert ran.events[-1]["counts"]["PASS"] == len(names)
    assert (ran.events[-1]["event"], ran.events[-1]["jobs"]) == ("summary", 3)


def test_a_lost_host_is_one_workers(run):
    ran = run(jobs=2, one="lost", two="pass", three="pass", four="hang once")
    assert ran.verdicts == {"one": "FAIL", "two": "PASS", "three": "PASS", "four": "PASS"}
    for pool in ran.pools:
        lost = [c[0] for c in pool.calls if c[0] in ("one", "four")]
        assert len(pool.dropped) == len(set(lost))


def test_junit_has_what_never_ran(run):
    ran = run(one="pass", two="interrupt", three="pass")
    for name in ("two", "three"):
        [error] = ran.testcase(name)
        assert error.tag == "error"
        assert "ended early" in error.get("message") + (error.text or "")
    assert list(ran.testcase("one")) == []


def test_a_host_that_cannot_be_ended_makes_the_run_an_error(run):
    ran = run(pool=Stubborn, one="pass")
    assert (ran.status, ran.verdicts) == (2, {"one": "PASS"})
    assert "ERROR  the harness's own: HostError: it does not end" in ran.output.splitlines()


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_local_host_takes_one_case_at_a_time(run, jobs):
    sources = [scenario_source("a", "pass")]
    if jobs == 1:
        assert run("--host", "local", jobs=1, sources=sources).status == 0
        return
    with pytest.raises(AssertionError, match="cases run one after the other"):
        run("--host", "local", jobs=2, sources=sources)
