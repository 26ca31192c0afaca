"""The manual's answers."""

import pytest

from harness.model.apm import ANSWERS, departures
from harness.model.knobs import KNOBS, SETTINGS


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_is_about_a_knob_and_its_values(name):
    answer = ANSWERS[name]
    assert answer.values
    assert set(answer.values) <= set(KNOBS[name].values)
    assert answer.section.startswith("APM vol. ")


def test_a_departure_names_behaviour_and_section():
    [found] = [d for d in departures(SETTINGS["5.10"]) if d.knob.name == "vmrun_needs_hsave"]
    assert str(found).startswith("VMRUN while VM_HSAVE_PA is 0: runs L2; APM vol. 2, 15.30")


def test_newer_kernels_depart_less():
    left = {name: {d.knob.name for d in departures(SETTINGS[name])} for name in ("5.10", "7.3")}
    assert left["7.3"] == {"smi_in_l2_exit_code", "stgi_without_svme"}
    assert len(left["5.10"]) > 10
