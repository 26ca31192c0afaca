"""A broken kernel is found, made small and explained; the kernel is a model with a knob turned."""

import importlib.util
import sys
from pathlib import Path

import pytest

from harness.crosscheck.campaign import Campaign
from harness.crosscheck.explain import turns
from harness.crosscheck.generator import sequence
from harness.model import checks, vmrun
from harness.model.facts import CpuFacts
from harness.model.knobs import KNOBS, SETTINGS
from harness.model.model import Model
from harness.model.unreachable import UNREACHABLE

FACTS = CpuFacts()


def _witnesses():
    path = Path(__file__).parent.parent / "model" / "witnesses.py"
    spec = importlib.util.spec_from_file_location("model_witnesses", path)
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look their module up by its name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.WITNESSES


WITNESSES = _witnesses()


class Fake:
    """A machine that does what a model says."""

    def __init__(self, knobs, facts=FACTS):
        self._model = Model(knobs, facts)

    def apply(self, operation):
        return self._model.apply(operation)

    def close(self):
        """Nothing to close."""


def campaign(knobs, machine, facts=FACTS):
    return Campaign(knobs, lambda knobs: Model(knobs, facts), lambda _: Fake(machine, facts))


def values_of(name):
    first, *others = KNOBS[name].values
    return [(first, other) for other in others]


PAIRS = [
    pytest.param(name, one, other, id=f"{name}-{KNOBS[name].key_of(other)}")
    for name in KNOBS
    if name not in UNREACHABLE
    for one, other in values_of(name)
]


def left_out(knobs, facts, witness):
    """Names of what is predicted step by step, and results: what remains when values are equal."""
    found = []
    for operations in witness.sequences:
        model = Model(knobs, facts)
        found += [(each.result, set(each.seen)) for each in map(model.apply, operations)]
    return found


@pytest.mark.parametrize(("name", "one", "other"), PAIRS)
def test_a_turned_knob_is_found_made_small_and_explained(name, one, other):
    witness = WITNESSES[name]
    facts = CpuFacts(**witness.facts)
    base = SETTINGS[witness.setting].but(**witness.also)
    knobs, machine = base.but(**{name: one}), base.but(**{name: other})
    pair = campaign(knobs, machine, facts)
    for operations in witness.sequences:
        checked = pair.run(operations)
        if checked.difference is not None:
            break
    if checked.difference is None:
        # With one value the model does not know what it predicts with the other; a kernel would.
        assert left_out(knobs, facts, witness) != left_out(machine, facts, witness)
        return
    finding = pair.finding(operations, checked)
    assert finding.reproducible
    assert len(finding.operations) <= checked.difference.step + 1
    assert (name, other) in [(turn.knob, turn.value) for turn in finding.explained_by]


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_model_agrees_with_itself(setting):
    pair = campaign(SETTINGS[setting], SETTINGS[setting])
    for number in range(5):
        assert pair.run(sequence(2, number)).difference is None
    assert pair.times.model_s > 0
    assert "clean_bits" in pair.asked


@pytest.mark.parametrize(
    ("one", "other"),
    [("5.10", "6.1"), ("6.1", "6.12"), ("6.12", "7.3"), ("series v1", "series v2")],
)
def test_generated_sequences_tell_two_kernels_apart(one, other):
    pair = campaign(SETTINGS[one], SETTINGS[other])
    found = (pair.run(sequence(0, number)).difference for number in range(40))
    assert next((each for each in found if each is not None), None) is not None


@pytest.mark.parametrize("name", ["control_violations", "save_violations"])
def test_a_kernel_without_checks_is_found(monkeypatch, name):
    """The machine refuses nothing at VMRUN that the model's checks refuse."""
    knobs = SETTINGS["7.3"]
    genuine = getattr(checks, name)
    applying = []

    def violations(*arguments, **options):
        return [] if applying else genuine(*arguments, **options)

    monkeypatch.setattr(vmrun, name, violations)

    class Broken(Fake):
        def apply(self, operation):
            applying.append(operation)
            try:
                return super().apply(operation)
            finally:
                applying.pop()

    pair = Campaign(knobs, lambda knobs: Model(knobs, FACTS), lambda _: Broken(knobs))
    found = (pair.run(sequence(0, number, "vmrun")).difference for number in range(30))
    assert next((each for each in found if each is not None), None) is not None


def test_coverage_counts_transitions():
    pair = campaign(SETTINGS["6.1"], SETTINGS["6.1"])
    checked = pair.run(sequence(0, 1))
    rows = pair.coverage.rows()
    assert sum(count for *_, count in rows) == checked.steps
    assert any(before.startswith("svme") for _, before, _, _ in rows)


def test_every_turn_is_another_value():
    knobs = SETTINGS["6.1"]
    found = list(turns(knobs))
    assert all(getattr(knobs, turn.knob) != turn.value for turn in found)
    assert {turn.knob for turn in found} == set(KNOBS)


class Moody(Fake):
    """Differs only the first time."""

    times = 0

    def apply(self, operation):
        outcome = super().apply(operation)
        if Moody.times:
            return outcome
        Moody.times += 1
        return type(outcome)("EIO", outcome.seen)


def test_what_does_not_come_again_is_told_as_it_was():
    knobs = SETTINGS["6.1"]
    Moody.times = 0
    pair = Campaign(knobs, lambda knobs: Model(knobs, FACTS), lambda _: Moody(knobs))
    operations = sequence(0, 0)
    checked = pair.run(operations)
    finding = pair.finding(operations, checked)
    assert not finding.reproducible
    assert finding.difference.seen == "EIO"
    assert finding.explained_by == ()
