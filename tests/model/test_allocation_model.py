"""The model of allocation: whatever is done in whatever order, these hold."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.model.allocation import (
    NESTED_BLOCKS,
    Policy,
    VcpuState,
    created,
    delta_bytes,
    policy_of,
    set_svme,
)

ON_DEMAND = (Policy.ON_DEMAND, Policy.ON_DEMAND_V1)

policies = st.sampled_from(Policy)
#: ("svme", value, whether there is memory), or ("smm", value).
steps = st.lists(
    st.tuples(st.just("svme"), st.booleans(), st.booleans())
    | st.tuples(st.just("smm"), st.booleans())
)


def walk(policy, sequence):
    """Yield every step with the states before and after it, and whether it took effect."""
    state = created(policy)
    for step in sequence:
        before, took = state, True
        if step[0] == "smm":
            state = replace(state, smm=step[1])
        else:
            state, took = set_svme(state, step[1], memory=step[2])
        yield step, before, state, took


@given(policies, steps)
def test_svme_is_never_set_without_its_state(policy, sequence):
    for _, _, after, _ in walk(policy, sequence):
        assert after.allocated or not after.svme


@given(policies, steps)
def test_a_write_that_took_effect_is_what_is_read_back_and_one_that_did_not_changes_nothing(
    policy, sequence
):
    for step, before, after, took in walk(policy, sequence):
        if step[0] == "svme":
            assert after == before if not took else after.svme == step[1]
            # Only a first allocation can fail.
            assert took or (step[1] and not before.allocated and not step[2])


@given(st.sampled_from(ON_DEMAND), steps)
def test_on_demand_a_vcpu_without_svme_holds_nothing_outside_smm(policy, sequence):
    for _, before, after, _ in walk(policy, sequence):
        if before.svme and not after.svme and not after.smm:
            assert after.nested_bytes == 0


@given(st.sampled_from(ON_DEMAND), steps)
def test_in_smm_nothing_is_freed(policy, sequence):
    for step, before, after, _ in walk(policy, sequence):
        if before.smm and step[0] == "svme":
            assert after.nested_bytes >= before.nested_bytes


@given(steps)
def test_the_eager_design_never_changes_and_never_refuses(sequence):
    size = created(Policy.EAGER).nested_bytes
    assert size == 12288
    for _, _, after, took in walk(Policy.EAGER, sequence):
        assert after.nested_bytes == size
        assert took


@given(policies, steps)
def test_it_is_all_or_nothing(policy, sequence):
    whole = sum(block.size_bytes for block in NESTED_BLOCKS[policy])
    for _, _, after, _ in walk(policy, sequence):
        assert after.nested_bytes in (0, whole)


@given(policies, steps, st.booleans())
def test_writing_the_same_again_is_nothing(policy, sequence, memory):
    for _, _, after, _ in walk(policy, sequence):
        assert set_svme(after, after.svme, memory=memory) == (after, True)


DELTAS = {Policy.EAGER: 0, Policy.ON_DEMAND_V1: 16384, Policy.ON_DEMAND: 12288}


def test_every_policy_has_its_delta():
    assert {policy: delta_bytes(policy) for policy in Policy} == DELTAS


@pytest.mark.parametrize("policy", Policy)
def test_a_policy_is_known_by_its_delta(policy):
    assert policy_of(DELTAS[policy]) is policy


@given(st.integers().filter(lambda delta: delta not in DELTAS.values()))
def test_any_other_delta_is_a_finding(delta):
    assert policy_of(delta) is None


def test_a_new_vcpu_is_outside_of_all_of_it():
    for policy in ON_DEMAND:
        assert created(policy) == VcpuState(policy, allocated=False, svme=False, smm=False)
