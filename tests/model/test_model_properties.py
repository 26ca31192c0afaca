"""Whatever is done in whatever order, with whatever knobs, these hold."""

from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sequences import sequences
from witnesses import GIF, GM, ON, RUN_PENDING, WITNESSES, A, B, l2, vmrun

from harness.model.errors import BadOperation, ModelBug
from harness.model.facts import CpuFacts
from harness.model.knobs import KNOBS, SETTINGS, Knobs
from harness.model.model import Model
from harness.model.operations import (
    Execute,
    GetNestedState,
    Instruction,
    Resume,
    SetNestedState,
    WriteVmcb,
)

names = st.sampled_from(sorted(SETTINGS))
any_knobs = st.builds(Knobs, **{name: st.sampled_from(k.values) for name, k in KNOBS.items()})


def walked(knobs, sequence):
    model = Model(knobs)
    return model, [model.apply(operation) for operation in sequence]


@settings(deadline=None)
@given(names, sequences)
def test_no_sequence_comes_to_an_impossible_state(name, sequence):
    """apply() raises ModelBug where an invariant of the state does not hold."""
    walked(SETTINGS[name], sequence)


@settings(deadline=None)
@given(any_knobs, sequences)
def test_nor_with_knobs_that_no_kernel_has(knobs, sequence):
    walked(knobs, sequence)


@settings(deadline=None)
@given(names, sequences)
def test_the_same_operations_have_the_same_outcomes(name, sequence):
    assert walked(SETTINGS[name], sequence)[1] == walked(SETTINGS[name], sequence)[1]


@settings(deadline=None)
@given(names, sequences, sequences)
def test_a_copy_goes_on_alone(name, before, after):
    model, _ = walked(SETTINGS[name], before)
    other = model.copy()
    seen = [model.apply(operation) for operation in after]
    assert [other.apply(operation) for operation in after] == seen


@settings(deadline=None)
@given(names, sequences)
def test_reading_changes_nothing(name, sequence):
    model, _ = walked(SETTINGS[name], sequence)
    assume(not model.over)
    first = model.apply(GetNestedState())
    assert model.apply(GetNestedState()) == first


@settings(deadline=None)
@given(names, sequences)
def test_after_vmexit_gif_is_clear(name, sequence):
    """APM vol. 2, 15.6: #VMEXIT clears GIF. Seen where VMMCALL has ended L2."""
    model, _ = walked(SETTINGS[name], (*l2(), *sequence))
    assume(not model.over and model.state.guest_mode)
    ended = model.apply(Execute(Instruction.VMMCALL))
    assume(ended.result == "report" and not ended.seen["guest_mode"] and not ended.seen["smm"])
    assert not ended.seen["gif"]


@settings(deadline=None)
@given(names, sequences, st.sampled_from([GM, GM | GIF, GM | RUN_PENDING | GIF]))
def test_what_is_set_is_what_one_gets(name, sequence, flags):
    """KVM_GET_NESTED_STATE after KVM_SET_NESTED_STATE of it, as far as the knobs promise."""
    knobs = SETTINGS[name]
    model, _ = walked(knobs, (*ON, *sequence))
    gif = model.state.gif
    done = model.apply(SetNestedState(flags, vmcb_pa=B))
    assume(done.result == "ok")
    wanted = GM
    wanted |= flags & RUN_PENDING if knobs.set_state_restores_run_pending else 0
    wanted |= flags & GIF if knobs.set_state_gif_in_gm == "honoured" else GIF * gif
    assert done.seen["nested.flags"] == wanted
    assert done.seen["vmcb_pa"] == B
    assert model.apply(GetNestedState()).seen["get.flags"] == wanted


@settings(deadline=None)
@given(names, sequences)
def test_the_blob_goes_back_and_forth(name, sequence):
    """What one kernel gives it takes back, and gives the same again."""
    model, _ = walked(SETTINGS[name], (*l2(), *sequence))
    assume(not model.over and model.state.guest_mode)
    first = model.apply(GetNestedState())
    flags, gpa = first.seen["nested.flags"], first.seen["vmcb_pa"]
    again = model.apply(SetNestedState(flags, vmcb_pa=gpa, kept=True))
    assume(again.result == "ok")
    blob = {k: v for k, v in first.seen.items() if k.startswith(("nested.control", "nested.save"))}
    # Forced in on the way: bit 1 of L1's RFLAGS, and CPL 0.
    for key in ("nested.save.rflags", "nested.save.cpl"):
        blob.pop(key, None)
    assert {key: again.seen.get(key) for key in blob} == blob


@pytest.mark.parametrize("name", SETTINGS)
def test_round_trips_end_where_they_began(name):
    model, _ = walked(SETTINGS[name], ON)
    before = model.apply(Resume()).seen
    for operation in (vmrun(), Execute(Instruction.VMMCALL)):
        assert model.apply(operation).result == "report"
    after = model.apply(Resume()).seen
    assert {k: after[k] for k in ("efer", "cr0", "cr3", "cr4")} == {
        k: before[k] for k in ("efer", "cr0", "cr3", "cr4")
    }


def test_a_state_that_cannot_be_is_a_bug_of_the_model():
    model, _ = walked(SETTINGS["6.1"], l2())
    model.state.regs["efer"] = 0
    with pytest.raises(ModelBug, match="SVME is what allocation"):
        model.apply(GetNestedState())


def test_allocation_is_checked_against_efer():
    model, _ = walked(SETTINGS["6.1"], ON)
    model.state.nested = replace(model.state.nested, allocated=False)
    with pytest.raises(ModelBug, match="SVME without nested state"):
        model.apply(GetNestedState())


def test_a_field_that_is_not_there_is_named():
    with pytest.raises(BadOperation, match=r"'control\.nonsense'"):
        Model(SETTINGS["6.1"]).apply(WriteVmcb("a", {"control.nonsense": 1}))


@pytest.mark.parametrize("name", SETTINGS)
def test_the_round_trip_is_predicted_for_every_kernel(name):
    """No part of the plainest sequence is unknown, on any CPU."""
    model = Model(SETTINGS[name], CpuFacts(silicon="silicon"))
    outcomes = [model.apply(each) for each in (*l2(), Resume(), Execute(Instruction.VMMCALL))]
    assert [outcome.result for outcome in outcomes] == ["ok"] * 3 + ["report"] * 3
    assert outcomes[3].seen["guest_mode"]
    assert not outcomes[5].seen["guest_mode"]
    assert outcomes[5].seen["vmcb_a.control.exit_code"] == 0x81
    assert outcomes[5].seen["vmcb_pa"] == 0
    assert outcomes[3].seen["vmcb_pa"] == A


def test_the_witnesses_are_predicted_up_to_their_end():
    """A witness that is unknown from its first steps on would show nothing."""
    for name, witness in WITNESSES.items():
        for outcomes in witness.outcomes(name, KNOBS[name].values[0]):
            assert all(outcome.result != "unknown" for outcome in outcomes[:-1]), name
