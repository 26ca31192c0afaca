"""State as single values with names."""

import pytest
from forged_stream import nested_in_l2, vcpu_parts, vm_parts
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.migrate.difference import field_differences
from harness.migrate.fields import canonical_xsave, part_fields, state_fields
from harness.migrate.state import MachineState
from harness.migrate.vcpu_parts import VCPU_PARTS
from harness.migrate.vm_parts import VM_PARTS
from kvm_ioctl.asm_kvm import kvm_nested_state, kvm_pit_state2, kvm_sregs
from kvm_ioctl.linux_kvm import kvm_irqchip


def state(**changes):
    return MachineState(vm_parts(), (vcpu_parts(**changes),))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vcpu0.msrs.0xc0000080", 0x1500),
        ("vcpu0.cpuid.80000001.0.ecx", 4),
        ("vcpu0.sregs.cr0", 0x80000011),
        ("vcpu0.nested.flags", 0x103),
        ("vcpu0.nested.vmcb_pa", 0x3000),
        ("vcpu0.nested.vmcb12.control.asid", 1),
        ("vcpu0.nested.vmcb12.save.cs.selector", 8),
        ("vcpu0.tsc_khz", 0),
        ("vcpu0.lapic.0x390", 0),
        ("ioapic.redirtbl[0].fields.vector", 0),
        ("pic_master.imr", 0),
        ("clock.clock", 0),
    ],
)
def test_values_have_the_kernels_names(name, value):
    assert state_fields(state())[name] == value


def test_a_chip_has_only_its_own_fields():
    names = [name for name in state_fields(state()) if name.startswith("pic_master.")]
    assert not [name for name in names if "redirtbl" in name or "dummy" in name]


def test_short_sregs_are_read_as_such():
    data = kvm_sregs(efer=0x500).as_bytes()
    assert part_fields("sregs", data)["efer"] == 0x500


def test_nested_state_of_another_format_is_shown_as_bytes():
    other = kvm_nested_state.from_bytes(nested_in_l2())
    other.format = 0
    fields = part_fields("nested", other.as_bytes())
    assert "vmcb12.control.asid" not in fields
    assert "data[0x0]" in fields


@settings(deadline=None)
@given(st.data())
def test_every_byte_of_every_part_is_in_a_value(data):
    """Whatever is flipped is a difference; but for what names no value, said below."""
    kinds = {**VM_PARTS, **VCPU_PARTS}
    name = data.draw(st.sampled_from(sorted(kinds)))
    parts = {**whole_vm(), **vcpu_parts()}
    body = bytearray(parts[name])
    at = data.draw(st.integers(0, len(body) - 1))
    if is_no_value(name, at):
        return
    body[at] ^= data.draw(st.integers(1, 255))
    if name in VM_PARTS:
        changed = MachineState({**whole_vm(), name: bytes(body)}, (vcpu_parts(),))
    else:
        changed = state(**{name: bytes(body)})
    before = MachineState(whole_vm(), (vcpu_parts(),)) if name in VM_PARTS else state()
    assert field_differences(state_fields(before), state_fields(changed)), (name, at)


def whole_vm():
    """The parts of a VM, those that not every machine has included."""
    return {**vm_parts(), "pit": kvm_pit_state2().as_bytes()}


def is_no_value(name, at):
    if name.startswith(("pic", "ioapic")):
        chip = kvm_irqchip.chip.offset
        return at < chip + 16 or (name != "ioapic" and at >= chip + 16) or at >= chip + 216
    return (
        (name == "lapic" and at % 16 > 3)  # between the registers
        or (name == "msrs" and 4 <= at % 16 < 8)  # reserved
        or (name == "cpuid" and (at % 40 in range(8, 12) or at % 40 >= 28))  # flags, padding
        or (name == "cpuid" and at < 8)  # renames the leaf
        or (name == "nested" and (4 <= at < 8 or 24 <= at < 128))  # size, room for VMX
        or (name == "xsave" and 512 <= at < 520)  # see canonical_xsave
    )


# XSTATE_BV

INITIAL = b"\x7f\x03" + bytes(22) + bytes.fromhex("801f0000") + bytes(4096 - 28)


def xsave(bv, **at):
    area = bytearray(INITIAL)
    area[512] = bv
    for place, value in at.items():
        area[int(place[1:])] = value
    return bytes(area)


@pytest.mark.parametrize("bv", range(8))
def test_bits_of_initial_components_mean_nothing(bv):
    assert canonical_xsave(xsave(bv)) == INITIAL


@pytest.mark.parametrize(
    ("at", "bit"), [(0, 0), (23, 0), (32, 0), (159, 0), (160, 1), (415, 1), (576, 2), (831, 2)]
)
def test_bits_of_used_components_stay(at, bit):
    changes = {f"_{at}": 0xAA}
    assert canonical_xsave(xsave(7, **changes))[512] == 1 << bit
    assert canonical_xsave(xsave(7 & ~(1 << bit), **changes))[512] == 0


def test_bits_of_other_components_are_left_alone():
    assert canonical_xsave(xsave(0xF8))[512] == 0xF8


def test_values_are_those_of_the_canonical_area():
    assert part_fields("xsave", xsave(2)) == part_fields("xsave", xsave(0))
    assert part_fields("xsave", xsave(2, _160=1)) != part_fields("xsave", xsave(0, _160=1))
