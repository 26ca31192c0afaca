"""A cell beside the model, with another model in the place of the machine."""

import json
from dataclasses import replace

import pytest

from harness.model.facts import CpuFacts
from harness.model.knobs import SETTINGS
from harness.model.model import Model
from harness.tamper.across import compare
from harness.tamper.rows import LOST, NOT_PREDICTED, Row, lost
from harness.tamper.table import all_cells, matching
from harness.tamper.trial import beside, predicted

FACTS = CpuFacts()


def one(name):
    [cell] = [cell for cell in all_cells() if cell.name == name]
    return cell


def row(name, machine, model=None):
    model = model or machine
    return beside(one(name), Model(machine, FACTS), Model(model, FACTS))


@pytest.mark.parametrize("kernel", ["5.10", "6.1", "6.12", "7.3"])
def test_a_model_agrees_with_itself(kernel):
    knobs = SETTINGS[kernel]
    for cell in matching("svm guest flag"):
        assert not beside(cell, Model(knobs, FACTS), Model(knobs, FACTS)).differs


@pytest.mark.parametrize(
    ("name", "turned"),
    [
        ("dr6 dr7[L1: dr6 bit 32]", {"rsm_checks": "strict"}),
        ("vmcb12 contents[L2: ASID]", {"smm_checks": "svme"}),
        ("segments[L1: ds limit 0x7fffffff]", {"rsm_limits": "as a descriptor"}),
        ("rip rflags[L1: rflags bit 32]", {"rsm_rflags": "32 bits"}),
        ("cr0[L1: ^ bit 32]", {"rsm_cr_high": "ignored"}),
    ],
)
def test_another_knob_is_a_difference(name, turned):
    knobs = SETTINGS["7.3"]
    assert not row(name, knobs).differs
    assert row(name, knobs, knobs.but(**turned)).differs


def test_where_rsm_led_is_told():
    knobs = SETTINGS["6.1"]
    assert row("svm guest flag[L2: flag 1]", knobs).outcome == "L2"
    assert row("svm guest flag[L1: flag 0]", knobs).outcome == "L1"
    assert row("efer[L2: 0]", knobs).outcome == "shutdown"
    assert row("efer[L1: ^ bit 2]", SETTINGS["5.10"]).outcome == "internal error"


def test_a_row_survives_json():
    first = row("efer[L2: 0]", SETTINGS["6.1"], SETTINGS["5.10"])
    assert first.differs
    assert Row.from_json(json.loads(json.dumps(first.to_json()))) == first


def test_a_complaint_of_the_kernel_is_a_difference():
    good = row("efer[L2: 0]", SETTINGS["6.1"])
    assert not good.differs
    warned = replace(good, log=("WARNING: arch/x86/kvm/x86.c",))
    assert warned.differs
    assert warned.how() == ["kernel log: WARNING: arch/x86/kvm/x86.c"]


def test_a_lost_host_is_a_difference():
    assert lost("a cell", "a group", "it fell silent").differs
    assert lost("a cell", "a group", "it fell silent").outcome == LOST


def test_most_cells_are_predicted_to_their_end():
    for kernel in ("5.10", "6.1", "6.12", "7.3"):
        said = [predicted(cell, SETTINGS[kernel], FACTS) for cell in all_cells()[::7]]
        assert sum("outcome" in each for each in said) > len(said) * 0.7


def across(name, older, newer):
    cells = {name: one(name)}
    knobs = (SETTINGS[older], SETTINGS[newer])
    rows = [{name: row(name, each)} for each in knobs]
    return compare(cells, *rows, knobs, (FACTS, FACTS))


@pytest.mark.parametrize(
    ("name", "older", "newer", "knob"),
    [
        ("efer[L1: ^ bit 2]", "5.10", "6.1", "rsm_failure: internal error -> shutdown"),
        ("vmcb12 contents[L2: ASID]", "6.1", "6.12", "smm_checks: svme -> svme and vmcb12"),
        ("segments[L1: ds limit 0x7fffffff]", "6.1", "6.12",
         "rsm_limits: as a descriptor -> as saved"),
    ],
)  # fmt: skip
def test_a_difference_between_kernels_is_explained_by_its_knob(name, older, newer, knob):
    [found] = across(name, older, newer)
    assert found.knobs == (knob,)


def test_two_knobs_explain_what_one_does_not():
    [found] = across("dr6 dr7[L1: dr6 bit 32]", "5.10", "6.1")
    assert {each.partition(":")[0] for each in found.knobs} == {"rsm_checks", "rsm_failure"}


def test_kernels_that_agree_have_no_difference():
    assert across("gprs[L1: rax]", "6.12", "6.12") == []


def test_what_no_knob_explains_is_said_so():
    name = "gprs[L1: rax]"
    knobs = SETTINGS["6.12"]
    same = row(name, knobs)
    other = Row.from_json({**same.to_json(), "outcome": "hang"})
    [found] = compare({name: one(name)}, {name: same}, {name: other}, (knobs, knobs),
                      (FACTS, FACTS))  # fmt: skip
    assert found.knobs == ()
    assert found.what == ("outcome",)
    assert NOT_PREDICTED not in (found.one, found.other)
