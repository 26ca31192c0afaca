"""Orders of restore: complete, the default within all constraints, and what others do not keep."""

import pytest

from harness.migrate.orders import (
    CONSTRAINTS,
    DEFAULT,
    NAMED,
    breaking,
    broken_by,
    covering,
    moved,
)
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


# Few orders that say as much as all of them


def test_covering_orders_keep_all_constraints_and_are_few():
    orders = covering()
    assert orders == covering()
    assert [broken_by(order) for order in orders] == [[]] * len(orders)
    assert all(sorted(order) == sorted(DEFAULT) for order in orders)
    assert len(orders) <= 20


@pytest.mark.parametrize("part", DEFAULT[1:])
def test_covering_orders_have_a_part_wherever_it_may_be(part):
    allowed = [order.index(part) for order in moved(part) if not broken_by(order)]
    found = {order.index(part) for order in covering()}
    assert found >= {*allowed, DEFAULT.index(part)}


def test_covering_orders_have_two_parts_both_ways_round_unless_one_must_be_first():
    def firsts(orders):
        return {(a, b) for order in orders for n, a in enumerate(order) for b in order[n + 1 :]}

    found = firsts(covering())
    swapped = [order for part in DEFAULT[1:] for order in moved(part) if not broken_by(order)]
    assert found >= firsts(swapped)
    for constraint in CONSTRAINTS:
        assert (constraint.second, constraint.first) not in found


def test_there_is_an_order_against_every_constraint_that_can_be_broken():
    orders = dict(breaking())
    assert set(orders) == {c for c in CONSTRAINTS if c.first != "cpuid"}
    for constraint, order in orders.items():
        assert constraint in broken_by(order)
        assert order[0] == "cpuid"
        assert order in {it for part in DEFAULT[1:] for it in moved(part)}
