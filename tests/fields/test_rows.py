"""What is said of rows: differences, departures from the manual, lines of the table."""

import json

import pytest

from harness.fields.known import issue_of
from harness.fields.rows import EARLY, ENTERED, LATE, LOST, STOPPED, TAKEN, Predicted, Row
from harness.fields.table import Departure, departures, lines, shortened


def row(vmrun, predicted, *, apm=(), why=(), value="bit 1", set_state=TAKEN, told=True):
    said = Predicted(predicted, tuple(why), TAKEN, tuple(apm))
    return Row("save.cr0", value, {"save.cr0": 3}, said, vmrun, "how", set_state, told)


@pytest.mark.parametrize("what", [ENTERED, EARLY, LATE, STOPPED])
def test_what_was_predicted_is_no_difference(what):
    assert row(what, what).differences() == []


@pytest.mark.parametrize(
    ("seen", "predicted"),
    [(ENTERED, EARLY), (EARLY, ENTERED), (LATE, EARLY), (EARLY, LATE), (LOST, ENTERED)],
)
def test_anything_else_is_one(seen, predicted):
    [said] = row(seen, predicted, why=["CR4"]).differences()
    assert predicted in said
    assert seen in said
    assert "CR4" in said
    assert "how" in said


def test_late_is_no_difference_where_it_cannot_be_told():
    assert row(EARLY, LATE, told=False).differences() == []
    assert row(ENTERED, LATE, told=False).differences() != []


def test_the_errno_is_compared_too():
    [said] = row(ENTERED, ENTERED, set_state="EINVAL").differences()
    assert said == "KVM_SET_NESTED_STATE: expected ok, saw EINVAL"


def test_departures_from_the_manual():
    assert row(ENTERED, ENTERED).from_the_manual() is None
    assert row(EARLY, EARLY, apm=["CR4"]).from_the_manual() is None
    assert row(ENTERED, ENTERED, apm=["CR4"]).from_the_manual() == "must be refused: CR4"
    assert row(LATE, LATE, why=["PDPTRs"]).from_the_manual() == "is refused: PDPTRs"
    assert row(STOPPED, STOPPED, why=["VMMCALL"]).from_the_manual() == "ends L1: VMMCALL"
    both = row(STOPPED, STOPPED, why=["root"], apm=["nCR3"]).from_the_manual()
    assert both == "must be refused: nCR3, and L1 does not go on (root)"


def test_departures_are_gathered_by_field_and_reason():
    rows = [row(ENTERED, ENTERED, apm=["CR4"], value=f"bit {n}") for n in (3, 4, 5, 9)]
    rows += [row(ENTERED, ENTERED, apm=["CR3"], value="0"), row(ENTERED, ENTERED)]
    assert departures(rows) == [
        Departure("save.cr0", "must be refused: CR4", ("bits 3-5", "bit 9")),
        Departure("save.cr0", "must be refused: CR3", ("0",)),
    ]


def test_runs_of_bits_are_shortened():
    values = ["0", "bit 1", "bit 2", "bit 4", "no memory", "bit 63"]
    assert shortened(values) == ("0", "bits 1-2", "bit 4", "no memory", "bit 63")
    assert shortened([]) == ()


def test_a_line_counts_every_row_once():
    rows = [
        row(ENTERED, ENTERED, apm=["CR4"]),
        row(EARLY, ENTERED, set_state="EINVAL"),
        row(LATE, LATE),
        row(STOPPED, STOPPED),
    ]
    [line] = lines(rows)
    assert (line.values, line.entered, line.refused, line.stopped) == (4, 1, 2, 1)
    assert (line.taken, line.manual_refuses, line.departing, line.differing) == (3, 1, 4, 1)


def test_a_row_goes_through_json():
    one = row(LATE, EARLY, apm=["CR4"], why=["CR3", "CR4"], told=False)
    assert Row.from_json(json.loads(json.dumps(one.to_json()))) == one


WARNING = "WARNING: CPU: 0 PID: 8 at arch/x86/kvm/svm/nested.c:957 nested_svm_vmexit+0x6d1/0x740"


def test_a_known_warning_is_known_for_its_field_only():
    assert issue_of(WARNING, "control.nested_cr3") == "root-without-memory-warns"
    assert issue_of(WARNING, "save.cr0") is None
    assert issue_of(WARNING.replace("vmexit", "vmrun"), "control.nested_cr3") is None


def test_known_warnings_are_known_issues():
    from harness.fields.known import KNOWN_WARNINGS
    from harness.runner.known_issues import load

    assert {known.issue for known in KNOWN_WARNINGS} <= {issue.id for issue in load()}
