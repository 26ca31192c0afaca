"""The matrix's cells: as many as are wanted, each by a name of its own, each a real change."""

import pytest

from harness.model import layout
from harness.model.checks import KVM_CHECKS, control_violations, save_violations
from harness.model.facts import CpuFacts
from harness.model.knobs import SETTINGS
from harness.model.operations import OPERATIONS
from harness.tamper import vmcb12
from harness.tamper.cells import Start
from harness.tamper.table import GROUPS, UnknownCell, all_cells, cells_of, matching

CELLS = all_cells()
HOST_S_OWN = {"NP_ENABLE"}


def test_there_are_as_many_as_wanted():
    assert len(CELLS) >= 300


def test_names_are_unique():
    names = [cell.name for cell in CELLS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_has_cells_of_its_own_name(group):
    assert {cell.group for cell in cells_of(group)} == {group}


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_interrupts_l1_and_l2(group):
    of_l2 = {"L2" in cell.start.value for cell in cells_of(group)}
    assert of_l2 == {False, True}


def test_every_start_is_used():
    assert {cell.start for cell in CELLS} == set(Start)


def test_cells_are_made_of_operations():
    for cell in CELLS:
        for operation in (*cell.into_smm(), *cell.tampering, *cell.rsm()):
            assert isinstance(operation, OPERATIONS)


def test_no_two_cells_do_the_same():
    done = {}
    for cell in CELLS:
        key = repr((cell.into_smm(), cell.tampering, cell.rsm()))
        done.setdefault(key, []).append(cell.name)
    # The same change may be told by two words, where one value is another one's special case.
    assert [names for names in done.values() if len(names) > 2] == []


def test_each_check_of_vmcb12_is_violated_once():
    assert set(vmcb12.CHECKED) == {check.name for check in KVM_CHECKS} - HOST_S_OWN


@pytest.mark.parametrize("name", vmcb12.CHECKED)
def test_a_change_violates_the_check_that_it_is_named_after(name):
    fields = {**layout.template_vmcb12(), **vmcb12.CHECKED[name]}
    control = {k.removeprefix("control."): v for k, v in fields.items() if k.startswith("control.")}
    save = {k.removeprefix("save."): v for k, v in fields.items() if k.startswith("save.")}
    knobs, facts = SETTINGS["7.3"], CpuFacts(vnmi=True)
    found = control_violations(control, knobs, facts) + save_violations(save, knobs, facts)
    assert name in {check.name for check in found}


def test_the_template_violates_nothing():
    control = {"asid": 1}
    assert not save_violations(
        {k.removeprefix("save."): v for k, v in layout.template_save().items()},
        SETTINGS["7.3"],
        CpuFacts(),
    ), control


def test_a_text_chooses_cells():
    chosen = matching("EFER[l2: ^ svme")
    assert [cell.name for cell in chosen] == ["efer[L2: ^ SVME]"]


@pytest.mark.parametrize("choose", [lambda: matching("no such cell"), lambda: cells_of("no group")])
def test_what_is_not_there_is_said_in_one_line(choose):
    with pytest.raises(UnknownCell, match=r"groups? ") as raised:
        choose()
    assert "\n" not in str(raised.value)
