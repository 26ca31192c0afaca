from types import SimpleNamespace

import pytest

from harness.errors import HarnessError
from harness.host.kernel_build import Variant
from harness.report.verdict import Outcome, Verdict
from harness.repro.mutants import (
    CrossChecked,
    Enough,
    KernelRun,
    Mutant,
    able_to_notice,
    by_peers,
    compare,
    elsewhere,
    noticed,
    run_until_noticed,
    score,
)

BUG = Variant("bug", "Put back\n\nArea: SMM\n\n--- a/arch/x86/kvm/svm/svm.c\n")
CLEAN = CrossChecked()
FOUND = CrossChecked(("the model and the machine differ: gif",))
OTHER = CrossChecked(("the model and the machine differ: efer", *FOUND.findings))


def run(crosscheck=None, **verdicts):
    outcomes = {
        case: Outcome(Verdict[word], f"{word}: why\nmore") for case, word in verdicts.items()
    }
    return KernelRun(outcomes, crosscheck)


@pytest.mark.parametrize(
    ("before", "after", "noticed", "broken"),
    [
        ("PASS", "FAIL", True, False),
        ("PASS", "PASS", False, False),
        ("FAIL", "FAIL", False, False),
        ("FAIL", "PASS", False, False),
        ("SKIP", "FAIL", False, False),
        ("PASS", "ERROR", False, True),
        ("ERROR", "FAIL", False, True),
        ("PASS", "MISS", False, True),
    ],
)
def test_a_case_notices_if_it_fails_with_the_bug_only(before, after, noticed, broken):
    mutant = compare(BUG, run(case=before), run(case=after))
    assert mutant.noticed is noticed
    assert mutant.scenarios == ({"case": "FAIL: why"} if noticed else {})
    assert mutant.broken == (("case",) if broken else ())


@pytest.mark.parametrize(
    ("before", "after", "noticed"),
    [
        (CLEAN, FOUND, True),
        (CLEAN, CLEAN, False),
        (FOUND, FOUND, False),
        (OTHER, FOUND, False),
        (CrossChecked(broke="no host"), FOUND, False),
        (None, None, False),
    ],
)
def test_the_crosscheck_notices_if_its_finding_is_none_without_the_bug(before, after, noticed):
    mutant = compare(BUG, run(before), run(after))
    assert mutant.noticed is noticed
    assert mutant.crosscheck == (FOUND.findings[0] if noticed else "")


def test_the_score_is_by_area():
    other = Variant("other", "Put back\n\nArea: events\n\n--- a/x\n")
    mutants = [
        Mutant(BUG, {"c": "r"}, "", own=("c",)),
        Mutant(BUG, {}, "", peers={"smm_test": "failed"}),
        Mutant(other, {"c": "r", "d": "r"}, "", own=("c",)),
        Mutant(other, {}, "", window="race for CR0: L2 ran", own=("race for CR0",)),
        Mutant(other, {}, "", window="race for CR0: L2 ran"),
    ]
    counts = score(mutants, [noticed, elsewhere, by_peers])
    assert counts == {"SMM": (1, 0, 1, 2), "events": (3, 2, 0, 3)}


def case(name):
    return SimpleNamespace(id=name)


def test_only_what_passes_without_the_bug_runs_its_own_cases_first_then_the_quickest():
    without = KernelRun(
        {
            "slow": Outcome(Verdict.PASS, seconds=9.0),
            "quick": Outcome(Verdict.PASS, seconds=1.0),
            "own": Outcome(Verdict.PASS, seconds=20.0),
            "failing": Outcome(Verdict.FAIL),
            "skipped": Outcome(Verdict.SKIP),
        },
        None,
    )
    cases = map(case, [*without.outcomes, "never ran"])
    assert [each.id for each in able_to_notice(without, cases, {"own"})] == ["own", "quick", "slow"]


class Results:
    """A lab in which each case ends as is said, once for each time that it runs."""

    def __init__(self, **words):
        self.words = {name: iter(each.split()) for name, each in words.items()}

    def run(self, pool, case):
        outcome = Outcome(Verdict[next(self.words[case.id])])
        return SimpleNamespace(outcome=outcome)


def ran(lab, enough):
    told = []
    run = run_until_noticed(
        None, lab, map(case, lab.words), lambda case, outcome: told.append(case.id), enough
    )
    assert told == list(run.outcomes)
    return run


def test_a_case_must_fail_twice():
    run = ran(Results(a="FAIL PASS", b="PASS", c="FAIL FAIL"), Enough())
    assert [each.verdict.value for each in run.outcomes.values()] == ["PASS", "PASS", "FAIL"]
    assert run.unsteady == ("a",)


@pytest.mark.parametrize(
    ("enough", "count"),
    [
        (Enough(1), 2),
        (Enough(2), 3),
        (Enough(), 4),
        (Enough(3, seconds=0), 2),
        (Enough(seconds=0, noticed=True), 1),
    ],
)
def test_it_ends_when_a_bug_is_noticed_well_enough(enough, count):
    lab = Results(a="PASS", b="FAIL FAIL", c="FAIL FAIL", d="PASS")
    assert len(ran(lab, enough).outcomes) == count


def test_what_nobody_noticed_has_everything_run():
    assert len(ran(Results(a="PASS", b="PASS"), Enough(1, seconds=0)).outcomes) == 2


def test_a_run_is_read_as_it_was_written(tmp_path):
    written = KernelRun(
        {"case": Outcome(Verdict.FAIL, "why", 1.5)},
        FOUND,
        peers={"smm_test": Outcome(Verdict.PASS, evidence={"kernel log": "WARNING: x"})},
    )
    file = tmp_path / "without.json"
    written.save(file, "6.1")
    assert KernelRun.load(file, "6.1") == written
    with pytest.raises(HarnessError, match=r"is of 6\.1, not of 7\.3"):
        KernelRun.load(file, "7.3")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"kernel": 1, "cases": [], "crosscheck": 2}'])
def test_a_file_that_is_no_run_is_refused_in_a_line(tmp_path, text):
    file = tmp_path / "x.json"
    file.write_text(text)
    with pytest.raises(HarnessError, match="not what a kernel"):
        KernelRun.load(file, "6.1")
