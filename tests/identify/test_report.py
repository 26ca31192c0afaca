"""Which setting a kernel is nearest to, and what changed between two, with no kernel at all."""

import json

import pytest

from harness.identify.battery import MODULES
from harness.identify.changes import changes
from harness.identify.finding import EXPERIMENTS, Finding, either
from harness.identify.report import Report
from harness.model.knobs import KNOBS, SETTINGS, differing


def report_of(knobs, *, without=()):
    """Return what a battery reports that sees all of a setting but some knobs."""
    return Report.of(
        Finding(name, None if name in without else getattr(knobs, name), f"saw {name}")
        for name in KNOBS
    )


def other_value(knob, value):
    return next(each for each in knob.values if each != value)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_kernel_that_is_a_setting_fits_it_exactly(name):
    fit = report_of(SETTINGS[name]).fit()
    assert (str(fit), fit.differences) == (f"{name} exactly", ())


@pytest.mark.parametrize("name", KNOBS)
def test_every_knob_that_is_turned_is_a_difference(name):
    turned = other_value(KNOBS[name], getattr(SETTINGS["6.1"], name))
    report = report_of(SETTINGS["6.1"].but(**{name: turned}))
    fit = report.fit({"6.1": SETTINGS["6.1"]})
    [difference] = fit.differences
    assert (difference.knob.name, difference.here) == (name, turned)
    assert difference.there == getattr(SETTINGS["6.1"], name)
    assert str(fit) == f"6.1, but for {name}"
    assert str(report.fit()) != "6.1 exactly"
    words = KNOBS[name].in_words
    assert words(turned) in str(difference)
    assert words(difference.there) in str(difference)


def test_a_kernel_in_between_is_named_by_the_nearer_setting_and_what_it_has_more():
    backported = SETTINGS["6.1"].but(sregs_checks_efer=True)
    fit = report_of(backported).fit()
    assert str(fit) == "6.1, plus sregs_checks_efer"
    assert str(fit.differences[0]).endswith("is EINVAL, as in 6.12; not: any value is taken")


def test_what_no_later_kernel_does_is_no_plus():
    odd = SETTINGS["7.3"].but(sregs_checks_efer=False, vmrun_refused_gif="kept")
    assert str(report_of(odd).fit()) == "7.3, but for sregs_checks_efer, vmrun_refused_gif"
    both = SETTINGS["6.1"].but(sregs_checks_efer=True, vmrun_refused_gif="kept")
    named = "6.1, plus sregs_checks_efer, but for vmrun_refused_gif"
    assert str(report_of(both).fit()) == named


def test_what_is_not_seen_does_not_count_against_a_setting():
    without = {knob.name for knob in differing(SETTINGS["6.12"], SETTINGS["7.3"])}
    report = report_of(SETTINGS["6.12"], without=without)
    # Both fit then: the newest.
    assert str(report.fit()) == "7.3 exactly"
    assert {each.knob for each in report.not_seen} == without


def test_a_knob_nobody_spoke_of_is_not_seen():
    report = Report.of([Finding("alloc_failure", "gp", "seen")])
    assert report.seen == {"alloc_failure": "gp"}
    assert list(report.findings) == list(KNOBS)


@pytest.mark.parametrize("order", [1, -1])
def test_of_two_findings_the_one_that_is_seen_counts(order):
    findings = [Finding("alloc_failure", None, "no"), Finding("alloc_failure", "gp", "yes")]
    assert Report.of(findings[::order]).findings["alloc_failure"].evidence == "yes"


def test_a_report_goes_through_json_and_back():
    for knobs in SETTINGS.values():
        report = report_of(knobs, without=["save_area"])
        assert Report.from_plain(json.loads(json.dumps(report.to_plain()))) == report


@pytest.mark.parametrize("name", KNOBS)
def test_every_value_of_a_knob_has_a_text_of_its_own(name):
    knob = KNOBS[name]
    assert [knob.value_of(knob.key_of(value)) for value in knob.values] == list(knob.values)


def test_changes_are_those_of_the_table_in_the_words_of_the_knobs():
    one, other = SETTINGS["5.10"], SETTINGS["6.1"]
    found = changes(report_of(one), report_of(other))
    assert [each.knob for each in found] == differing(one, other)
    assert all(each.seen for each in found)
    assert "VMRUN while VM_HSAVE_PA is 0: runs L2 -> raises #GP" in map(str, found)


def test_there_is_no_change_from_a_kernel_to_itself():
    report = report_of(SETTINGS["6.12"], without=["save_area"])
    assert changes(report, report) == []


def test_a_change_that_one_kernel_did_not_show_is_marked():
    one = report_of(SETTINGS["6.1"], without=["checks_v_nmi"])
    found = changes(one, report_of(SETTINGS["6.12"]))
    assert [each.knob.name for each in found if not each.seen] == ["checks_v_nmi"]


def test_an_answer_that_no_value_explains_is_not_seen():
    answers = {"#GP": True}
    assert either("vmrun_needs_hsave", "#GP", answers, "VMRUN").value is True
    odd = either("vmrun_needs_hsave", "shutdown", answers, "VMRUN")
    assert (odd.seen, odd.in_words()) == (False, "not seen")
    assert odd.evidence == "VMRUN: shutdown, which no value of the knob explains"


def test_every_knob_is_some_experiments_and_only_one():
    assert MODULES
    declared = [knob for each in EXPERIMENTS.values() for knob in each.knobs]
    assert sorted(declared) == sorted(KNOBS)
