"""Every knob decides something that operations can show, or says why it cannot be shown."""

import pytest
from witnesses import WITNESSES

from harness.model.knobs import KNOBS
from harness.model.unreachable import UNREACHABLE


def test_every_knob_has_a_witness_or_a_reason():
    assert set(WITNESSES) | set(UNREACHABLE) == set(KNOBS)
    assert not set(WITNESSES) & set(UNREACHABLE)


@pytest.mark.parametrize("name", WITNESSES)
def test_turning_a_knob_changes_the_prediction(name):
    """Each value of the knob gives outcomes of its own."""
    outcomes = [WITNESSES[name].outcomes(name, value) for value in KNOBS[name].values]
    twins = [
        (one, other)
        for i, one in enumerate(KNOBS[name].values)
        for j, other in enumerate(KNOBS[name].values[:i])
        if outcomes[i] == outcomes[j]
    ]
    assert not twins
