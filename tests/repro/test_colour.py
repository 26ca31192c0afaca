import pytest

from harness.identify.finding import Finding, unseen
from harness.report.verdict import Outcome, Verdict
from harness.repro.colour import Colour, Sight, of_findings, of_outcome, of_race, whole
from harness.repro.table import Reproducer

WARNS = "WARNING: CPU: 0 PID: 9 at arch/x86/kvm/svm/nested.c:957 nested_svm_vmexit"


def by_case(symptom):
    return Reproducer("n", "c", "m", "f", "7.1", ("6.1",), ("case",), symptom)


BY_KNOB = Reproducer(
    "n", "c", "m", "f", "7.1", ("6.1",), knob="tlb_ctl_after_exit", bad=("written",)
)


@pytest.mark.parametrize(
    ("outcome", "colour"),
    [
        (Outcome(Verdict.PASS), Colour.GREEN),
        (Outcome(Verdict.FAIL, "GIF: expected False, saw True"), Colour.RED),
        (Outcome(Verdict.FAIL, "vCPU 0 did not stop"), Colour.OTHER),
        (Outcome(Verdict.FAIL, "x", evidence={"traceback": "GIF: expected False"}), Colour.OTHER),
        (Outcome(Verdict.SKIP, "no vgif"), Colour.SKIP),
        (Outcome(Verdict.ERROR, "GIF: expected False"), Colour.BROKE),
        (Outcome(Verdict.MISS, "GIF: expected False"), Colour.BROKE),
    ],
)
def test_only_a_fail_with_the_bugs_own_symptom_is_red(outcome, colour):
    assert of_outcome(by_case("GIF: expected False"), "case", outcome).colour is colour


@pytest.mark.parametrize("title", ["kernel log", "console", "kernel stacks"])
def test_a_symptom_may_be_in_what_the_kernel_said(title):
    outcome = Outcome(Verdict.FAIL, "the host was lost", evidence={title: f"boot\n{WARNS}\nmore"})
    sight = of_outcome(by_case("WARNING: .*nested_svm_vmexit"), "case", outcome)
    # What decided is kept, wherever it was found.
    assert (sight.colour, sight.saw) == (Colour.RED, f"FAIL: the host was lost\n{WARNS}")


def test_a_symptom_may_go_over_lines():
    outcome = Outcome(Verdict.FAIL, "did not stop\nrip=0x1 code=0f 01 d9")
    one = by_case("did not stop.*code=0f 01 d9")
    sight = of_outcome(one, "case", outcome)
    assert (sight.colour, sight.saw) == (Colour.RED, "FAIL: did not stop\nrip=0x1 code=0f 01 d9")


@pytest.mark.parametrize(
    ("findings", "colour"),
    [
        ([Finding("tlb_ctl_after_exit", "written", "e")], Colour.RED),
        ([Finding("tlb_ctl_after_exit", "kept", "e")], Colour.GREEN),
        ([Finding("pause_filter_after_exit", "written", "e")], Colour.BROKE),
        ([unseen("tlb_ctl_after_exit", "it died")], Colour.BROKE),
        ([], Colour.BROKE),
    ],
)
def test_a_knob_is_red_at_a_bad_value(findings, colour):
    assert of_findings(BY_KNOB, findings).colour is colour


@pytest.mark.parametrize(
    ("parts", "colour"),
    [
        ("green green", "green"),
        ("green red other", "red"),
        ("green other", "other"),
        ("green broke", "broke"),
        ("green skip", "green"),
        ("skip", "skip"),
        ("", "skip"),
    ],
)
def test_green_needs_all_parts_and_red_one(parts, colour):
    assert whole([Sight("x", Colour(part), "") for part in parts.split()]) is Colour(colour)


@pytest.mark.parametrize(
    ("row", "colour", "saw"),
    [
        (
            {"hits": 9, "first_evidence": {"proof": "L2 ran"}},
            Colour.RED,
            "64 attempts, 9 hits\nL2 ran",
        ),
        ({}, Colour.GREEN, "64 attempts, 0 hits"),
        ({"unchecked": "ran"}, Colour.OTHER, "not checked at all: ran"),
    ],
)
def test_a_race_is_red_if_it_was_won(row, colour, saw):
    tally = {"field": "EFER", "attempts": 64, "hits": 0, "unchecked": "", "first_evidence": None}
    sight = of_race(tally | row)
    assert (sight.what, sight.colour, sight.saw) == ("race for EFER", colour, saw)
