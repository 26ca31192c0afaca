"""The plan: what every level of a tower gets."""

import pytest

from harness.nest.plan import Inner, Plan


def test_it_travels():
    plan = Plan(depth=2, inner=Inner.LINUX, vcpus=2, patience=2.5)
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(("inner", "levels"), [(Inner.PROXY, 2), (Inner.LINUX, 3)])
def test_the_guest_of_the_last_level_may_be_linux_too(inner, levels):
    assert Plan(depth=2, inner=inner).linux_levels == levels


def test_every_level_has_room_for_the_next_one():
    plan = Plan(depth=3)
    sizes = [plan.memory_mib(level) for level in (1, 2, 3)]
    # The next one's memory, what it takes to run it, and the image if it has guests too.
    assert sizes[0] - sizes[1] > sizes[1] - sizes[2] > sizes[2]
    assert plan.host_mib - sizes[0] > 512
    assert Plan().memory_mib(1) == sizes[2]


def test_what_takes_longer_may_take_longer():
    plan = Plan(depth=3)
    assert plan.boot_s(3) > plan.boot_s(2) > plan.boot_s(1)
    for level in (0, 1, 2):
        # A level waits for all that happens deeper.
        assert plan.call_s(level) > plan.boot_s(level + 1) + plan.call_s(level + 1)
    assert Plan(patience=2).boot_s(2) == 2 * Plan().boot_s(2)


def test_time_is_slowed_once_and_inherited():
    plan = Plan(slow_clock=8)
    assert plan.clock_options(1, 1000) == "no-kvmclock tsc_early_khz=8000"
    assert plan.clock_options(2, 8000) == ""
    assert Plan().clock_options(1, 1000) == ""
    assert plan.clock_options(1, 0) == ""


def test_what_disturbs_l1_begins_with_its_guest():
    assert Plan(moves=1).disturbed_from == "proxy launched"
    assert Plan(smis=1, inner=Inner.LINUX).disturbed_from == "entered"
    assert not Plan().disturbed


def test_only_a_proxy_in_l1_waits_for_all_that_is_done_to_l1():
    plan = Plan(moves=3, smis=5)
    assert plan.works_until_told(1)
    assert not plan.works_until_told(2)
    assert (plan.fewest(3), plan.fewest(5)) == (3, 5)
    assert [Plan(inner=Inner.LINUX).fewest(count) for count in (0, 1, 5)] == [0, 1, 1]
