import pytest

from harness.host.kernel_build import Variant
from harness.report.verdict import Outcome, Verdict
from harness.repro.mutants import CrossChecked, KernelRun, Mutant, compare, score

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
    mutants = [Mutant(BUG, {"c": "r"}, ""), Mutant(BUG, {}, ""), Mutant(other, {}, "found")]
    assert score(mutants) == {"SMM": (1, 2), "events": (1, 1)}
