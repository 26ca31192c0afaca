"""Orders of restore: complete, the default within all constraints, and what others do not keep."""

import pytest

from harness.migrate.orders import CONSTRAINTS, DEFAULT, NAMED, broken_by, moved
from harness.migrate.vcpu_parts import VCPU_PARTS


@pytest.mark.parametrize("order", NAMED.values(), ids=NAMED)
def test_every_order_has_every_part_once(order):
    assert sorted(order) == sorted(VCPU_PARTS)


def test_the_default_keeps_all_constraints():
    assert broken_by(DEFAULT) == []


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=str)
def test_every_constraint_names_parts_and_can_be_broken(constraint):
    assert {constraint.first, constraint.second} <= set(DEFAULT)
    at_the_end = [part for part in DEFAULT if part != constraint.first] + [constraint.first]
    assert constraint in broken_by(at_the_end)


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("selftests", {"regs before events", "nested before events", "lapic before msrs"}),
        ("qemu", {"sregs before lapic"}),
    ],
)
def test_what_tools_do_not_keep(name, broken):
    assert {str(constraint) for constraint in broken_by(NAMED[name])} == broken


@pytest.mark.parametrize("part", DEFAULT[1:])
def test_a_part_is_moved_to_every_other_place(part):
    orders = list(moved(part))
    assert len(orders) == len(set(orders)) == len(DEFAULT) - 2
    assert DEFAULT not in orders
    for order in orders:
        assert order[0] == "cpuid"
        assert [it for it in order if it != part] == [it for it in DEFAULT if it != part]
