"""What a header may say of a machine, and what no machine has."""

import json
import os

import pytest
from forged_stream import SHAPE

from harness.machine.machine import Machine
from harness.migrate.errors import Refused, StreamError
from harness.migrate.shape import MAX_MEMORY_BYTES, BlankMachine, Shape, SlotShape, backings_of

PAGE = 4096
GOOD = {"backings": [PAGE, PAGE], "slots": [[0, 0, 0, 0, 0], [1, 0, PAGE, 0, 1]], "vcpus": 1,
        "irqchip": False}  # fmt: skip


def with_slots(*slots):
    return {**GOOD, "slots": [list(slot) for slot in slots]}


def test_a_shape_comes_back_through_json():
    assert Shape.from_json(json.loads(json.dumps(SHAPE.to_json()))) == SHAPE
    assert Shape.from_json(GOOD).to_json() == GOOD


@pytest.mark.parametrize(
    ("shape", "line"),
    [
        (None, "malformed"),
        ({}, "malformed"),
        ({**GOOD, "new": 1}, "malformed"),
        ({**GOOD, "irqchip": 1}, "irqchip is neither"),
        ({**GOOD, "vcpus": -1}, "number of vCPUs is -0x1"),
        ({**GOOD, "vcpus": True}, "number of vCPUs is True"),
        ({**GOOD, "vcpus": 1.0}, r"number of vCPUs is 1\.0"),
        ({**GOOD, "vcpus": 10**4000}, "number of vCPUs is 0x"),
        ({**GOOD, "vcpus": [[1]]}, "number of vCPUs is a list"),
        ({**GOOD, "vcpus": 5000}, "5000 vCPUs"),
        ({**GOOD, "backings": {"0": PAGE}}, "backings is no list"),
        ({**GOOD, "backings": [PAGE] * 2000}, "backings is no list of at most"),
        ({**GOOD, "backings": [PAGE, 0]}, "not whole pages"),
        ({**GOOD, "backings": [PAGE, 100]}, "not whole pages"),
        ({**GOOD, "backings": [PAGE, MAX_MEMORY_BYTES]}, "bytes of memory"),
        ({**GOOD, "backings": [PAGE, 2**64]}, "size of a mapping"),
        ({**GOOD, "backings": [PAGE] * 3}, "a mapping without a slot"),
        ({**GOOD, "slots": []}, "a mapping without a slot"),
        ({**GOOD, "slots": "ab"}, "slots is no list"),
        ({**GOOD, "slots": ["abcde"]}, "a slot is malformed"),
        (with_slots([0, 0, 0, 0]), "a slot is malformed"),
        (with_slots([0, 0, 0, 0, 0], [1, 0, PAGE, 0, 2]), "shows mapping 2"),
        (with_slots([0, 0, 0, 0, 0], [0, 0, PAGE, 0, 1]), "two slots of one number"),
        (with_slots([0, 0, 0, 0, 0], [1, 0, 0, 0, 1]), "overlaps slot 1"),
        (with_slots([0, 0, 1, 0, 0], [1, 0, PAGE, 0, 1]), "is no place for memory"),
        (with_slots([0, 0, 2**64 - PAGE, 0, 0], [1, 0, 0, 0, 1]), "is no place for memory"),
        # Else KVM would take it for slot 0 of address space 1.
        (with_slots([0, 0, 0, 0, 0], [0x10000, 0, PAGE, 0, 1]), "number of a slot is 0x10000"),
        (with_slots([0, 0, 0, 0, 0], [1, 0x10000, PAGE, 0, 1]), "as_id of a slot is 0x10000"),
        (with_slots([0, 0, 0, 2**32, 0], [1, 0, PAGE, 0, 1]), "flags of a slot"),
    ],
)
def test_a_shape_that_no_machine_has(shape, line):
    with pytest.raises(StreamError, match=line) as caught:
        Shape.from_json(shape)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


def test_slots_may_overlap_in_different_address_spaces():
    Shape.from_json(with_slots([0, 0, 0, 0, 0], [0, 1, 0, 0, 1]))


@pytest.mark.kvm
def test_a_machine_of_a_machines_shape_has_the_same(kvm):
    with Machine(kvm, vcpus=2, memory_mib=4, irqchip=True) as machine:
        shape = Shape.of(machine)
        with BlankMachine(kvm, shape) as blank:
            assert Shape.of(blank) == shape
            assert [len(backing) for backing in backings_of(blank)] == list(shape.backings)
            assert blank.mappings == backings_of(blank)


def left_behind():
    with open("/proc/self/maps") as maps:
        vcpus = sum("kvm-vcpu" in line for line in maps)
    with open("/proc/self/statm") as statm:
        return len(os.listdir("/proc/self/fd")), vcpus, int(statm.read().split()[0])


@pytest.mark.kvm
@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"vcpus": 4096}, "this kernel has at most"),
        ({"backings": (1 << 40,)}, "this machine has"),
        # Refused by KVM when the other slot is there already.
        ({"slots": (SlotShape(0, 0, 0, 0, 0), SlotShape(0xFFFF, 0, 1 << 30, 0, 0))}, "EINVAL"),
        ({"slots": (SlotShape(0, 0, 0, 0, 0), SlotShape(0, 999, 0, 0, 0))}, "EINVAL"),
        ({"slots": (SlotShape(0, 0, 0, 0xFFFF, 0),)}, "EINVAL"),
    ],
)
def test_what_this_kernel_cannot_have_is_refused_and_nothing_stays(kvm, changes, line):
    good = {"backings": (512 << 20,), "slots": (SlotShape(0, 0, 0, 0, 0),), "vcpus": 1,
            "irqchip": True}  # fmt: skip
    before = left_behind()
    with pytest.raises(Refused, match=line):
        BlankMachine(kvm, Shape(**{**good, **changes}))
    fds, vcpus, pages = left_behind()
    assert (fds, vcpus) == before[:2]
    # A new thread alone makes glibc reserve 64 MiB; the machine's memory is far more.
    assert (pages - before[2]) * PAGE < 256 << 20
