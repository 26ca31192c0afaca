"""Which cells there are, without a kernel."""

import pytest

from harness.fields.table import TEMPLATE, UnknownField, fields_named
from harness.fields.template import LIMIT, RESERVED, Layout, area, image, place, template
from harness.fields.values import ADDRESSES, ALL_FIELDS, COMBINED, cells_of
from harness.model.areas import VMCB
from harness.model.checks import apm_violations, control_violations, save_violations
from harness.model.facts import CpuFacts
from harness.model.knobs import SETTINGS
from harness.svm.vmcb import VMCB_SAVE_OFFSET, vmcb

LAYOUT = Layout(0x1_1000, 0x1_2000, 0x1_6000, 0x2_0000, 0x2_4000)
FIELDS = template(LAYOUT)
FACTS = CpuFacts(maxphyaddr=36)


def test_the_template_is_legal_for_every_kernel_and_the_manual():
    control, save = area(FIELDS, "control"), area(FIELDS, "save")
    for knobs in SETTINGS.values():
        assert control_violations(control, knobs, FACTS) == []
        assert save_violations(save, knobs, FACTS) == []
    assert apm_violations(control, save, FACTS) == []


def test_the_image_is_what_the_structs_read():
    block = vmcb.from_buffer_copy(image(FIELDS | {"control.reserved_0x018.3": 0xFF}))
    assert block.control.asid == FIELDS["control.asid"]
    assert block.save.cs.attrib == FIELDS["save.cs.attrib"]
    assert block.save.efer == FIELDS["save.efer"]
    assert block.control.reserved_0x018[3] == 0xFF


def test_no_byte_of_either_area_is_forgotten():
    covered = set()
    for at, size in (*VMCB.values(), *RESERVED.values()):
        assert not covered & set(range(at, at + size))
        covered |= set(range(at, at + size))
    save_end = VMCB_SAVE_OFFSET + type(vmcb().save).spec_ctrl.offset + 8
    assert covered == set(range(save_end))


@pytest.mark.parametrize("field", sorted(VMCB))
def test_every_bit_of_every_number_is_tried(field):
    tried = [cell.changes.get(field) for cell in cells_of(field, FIELDS)]
    for bit in range(8 * place(field)[1]):
        assert FIELDS.get(field, 0) ^ 1 << bit in tried


@pytest.mark.parametrize("field", ALL_FIELDS)
def test_no_cell_is_the_template_or_is_tried_twice(field):
    cells = cells_of(field, FIELDS)
    changes = [tuple(sorted(cell.changes.items())) for cell in cells]
    assert len(set(changes)) == len(changes)
    assert all(image(FIELDS | cell.changes) != image(FIELDS) for cell in cells)
    assert len({cell.value for cell in cells}) == len(cells)


@pytest.mark.parametrize("field", sorted(ADDRESSES))
def test_addresses_are_tried_at_their_boundary(field):
    tried = {cell.changes.get(field) for cell in cells_of(field, FIELDS)}
    assert {LIMIT - ADDRESSES[field], LIMIT} <= tried


def test_combinations_are_of_fields_that_exist():
    assert COMBINED.keys() <= set(VMCB)
    for field in COMBINED:
        for cell in cells_of(field, FIELDS):
            assert all(place(name) for name in cell.changes)


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["save.cr0"], ["save.cr0"]),
        (["cr0"], ["save.cr0"]),
        (["save.cr0", "cr0"], ["save.cr0"]),
        (["cs"], [f"save.cs.{part}" for part in ("selector", "attrib", "limit", "base")]),
        ([TEMPLATE], [TEMPLATE]),
        ([], [TEMPLATE, *ALL_FIELDS]),
    ],
)
def test_fields_are_named_in_several_ways(names, found):
    assert fields_named(names) == found


def test_a_field_that_is_none_is_named():
    with pytest.raises(UnknownField, match="no field cr5"):
        fields_named(["cr0", "cr5"])
