"""Bench: what is run, how often, and what becomes of hosts that die. The host is a fake."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from harness.errors import HostError, HostLost
from harness.host.session import CallResult
from harness.report.verdict import Outcome, Verdict
from harness.repro.colour import Colour
from harness.repro.run import Bench
from harness.repro.table import Reproducer, ReproError

KEPT = [{"knob": "tlb_ctl_after_exit", "value": "kept", "evidence": "seen"}]


class Pool:
    """Hands out sessions whose call gives the next of `answers`; exceptions are raised."""

    def __init__(self, *answers):
        self.answers, self.calls, self.dropped = list(answers), [], []

    def session(self, params):
        return None, SimpleNamespace(call=lambda target, **more: self.answer(params, more))

    def answer(self, params, more):
        self.calls.append((params, more["name"]))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return CallResult("return", value=answer)

    def drop(self, params):
        self.dropped.append(params)


class FakeLab:
    def __init__(self, outcome):
        self.outcome, self.ran = outcome, []

    def run(self, pool, case):
        self.ran.append(case)
        return SimpleNamespace(outcome=self.outcome)


def by_case(**more):
    return Reproducer("n", "c", "m", "f", "7.1", ("6.1",), ("one",), "GIF", **more)


def by_knob(knob="tlb_ctl_after_exit", **more):
    return Reproducer("n", "c", "m", "f", "7.1", ("6.1",), knob=knob, bad=("written",), **more)


def bench(pool=None, outcome=None, kind="emulated", **options):
    lab = FakeLab(outcome or Outcome(Verdict.PASS))
    return Bench(pool or Pool(), lab, {"one": "case one"}, kind, **options), lab


def test_a_case_that_two_bugs_share_runs_once():
    tested, lab = bench(outcome=Outcome(Verdict.FAIL, "GIF: saw 1"))
    assert [tested.run(by_case()).colour for _ in range(2)] == [Colour.RED, Colour.RED]
    assert lab.ran == ["case one"]


def test_an_experiment_that_two_knobs_share_runs_once_for_the_same_parameters():
    pool = Pool(KEPT, KEPT)
    tested, _ = bench(pool)
    assert tested.run(by_knob()).colour is Colour.GREEN
    tested.run(by_knob("pause_filter_after_exit"))
    tested.run(by_knob(params={"vgif": "0"}))
    assert pool.calls == [({}, "written_back"), ({"vgif": "0"}, "written_back")]


def test_a_silent_host_gets_one_more_try():
    pool = Pool(HostLost("it hangs", silent=True), KEPT)
    tested, _ = bench(pool)
    assert tested.run(by_knob()).colour is Colour.GREEN
    assert pool.dropped == [{}]


@pytest.mark.parametrize(
    "answers",
    [
        [HostLost("it hangs", silent=True)] * 2,
        [HostLost("panic")],
        [HostError("no memory")],
    ],
)
def test_a_host_that_broke_is_no_colour_of_the_bug(answers):
    tested, _ = bench(Pool(*answers))
    ran = tested.run(by_knob())
    assert ran.colour is Colour.BROKE
    assert str(answers[0]) in ran.decisive.saw


def test_a_case_that_does_not_exist_is_named():
    tested = Bench(Pool(), FakeLab(None), {}, "emulated")
    with pytest.raises(ReproError, match="no case one"):
        tested.run(by_case())


@pytest.mark.parametrize(
    ("kind", "more", "options", "colour"),
    [
        ("local", {"unsafe": True}, {}, Colour.SKIP),
        ("local", {"unsafe": True}, {"unsafe": True}, Colour.GREEN),
        ("local", {}, {}, Colour.GREEN),
        ("emulated", {"unsafe": True}, {}, Colour.GREEN),
        ("local", {"host": "emulated"}, {}, Colour.SKIP),
    ],
)
def test_what_may_end_a_real_host_waits_to_be_asked_for(kind, more, options, colour):
    tested, lab = bench(kind=kind, **options)
    assert tested.run(by_case(**more)).colour is colour
    assert bool(lab.ran) is (colour is Colour.GREEN)


LOST = {"field": "EFER", "attempts": 64, "hits": 0, "unchecked": "", "first_evidence": None}


class Racers:
    """A host whose races end as is said, one after the other."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.cpus = None

    def make(self, cpus):
        self.cpus = cpus
        return nullcontext(
            SimpleNamespace(
                start=lambda: SimpleNamespace(call=self.call),
                describe=lambda: {"kernel_release": "5.10"},
            )
        )

    def call(self, target, *, fields, **more):
        assert target == "harness.race.calls:run"
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return CallResult("return", value=[{**answer, "field": fields[0]}])


WON = {**LOST, "hits": 3, "first_evidence": {"proof": "L2 ran and read it"}}


@pytest.mark.parametrize(
    ("answers", "colour", "saw"),
    [
        ((LOST, WON), Colour.RED, "64 attempts, 3 hits\nL2 ran and read it"),
        ((LOST, LOST), Colour.GREEN, "64 attempts, 0 hits"),
        ((LOST, HostError("one CPU")), Colour.BROKE, "one CPU"),
    ],
)
def test_a_race_is_held_on_a_host_with_two_cpus(answers, colour, saw):
    racers = Racers(*answers)
    one = Reproducer("n", "c", "m", "f", "5.17", ("5.10",), races=("EFER", "CR0"))
    tested = Bench(Pool(), FakeLab(None), {}, "emulated", make=racers.make)
    ran = tested.run(one)
    assert tested.described == {"kernel_release": "5.10"}
    assert racers.cpus == 2
    assert (ran.colour, ran.decisive.saw) == (colour, saw)
