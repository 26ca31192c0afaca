"""After which sequences L1 goes on by a root of page tables that may not serve it."""

import pytest
from witnesses import GIF, GM, OFF, ON, SMI_IN_L2, A, do, l2, l2_with, vmrun, wrmsr

from harness.model import layout
from harness.model.facts import CpuFacts
from harness.model.knobs import SETTINGS
from harness.model.model import Model
from harness.model.operations import SetNestedState, SetSlot, SetSmm, SetSregs
from harness.model.seen import STALE_ROOT
from harness.svm.msrs import Efer
from harness.svm.vmcb import NestedCtl

NESTED_PAGING = {
    "control.nested_ctl": NestedCtl.NP_ENABLE.mask,
    "control.nested_cr3": layout.NESTED_PML4_GPA,
}
RESTORE = SetNestedState(GM | GIF, vmcb_pa=A)
SLOT_WENT = SetSlot("msrpm", False)
LEAVE = SetNestedState(GIF, size=128)
CLEAR = wrmsr(OFF)

LIVES = {
    "VMRUN": l2(),
    "and restored over it": (*l2(), RESTORE),
    "restored after #VMEXIT": (*l2(), do("VMMCALL"), RESTORE),
    "a slot went before": (*ON, SLOT_WENT, vmrun()),
    "a slot went, and L2 has nested paging": (*l2_with(NESTED_PAGING), SLOT_WENT),
    "restored, and L2 has nested paging": (
        *ON, SetNestedState(GM | GIF, vmcb_pa=A, changes=NESTED_PAGING)
    ),
    "CR4 was changed": (*l2(), SetSregs({"cr4": layout.CR4_ON | 1 << 7})),
    "executed with the flag of SMM": (*ON, SetSmm(True), do("NOP"), SetSmm(False), *ON, RESTORE),
}  # fmt: skip
GONE = {
    "L1 never ran": (*ON, RESTORE),
    "a slot went": (*l2(), SLOT_WENT),
    "a slot went before the restore": (*l2(), do("VMMCALL"), SLOT_WENT, RESTORE),
    "left by force, which renews roots": (*l2(), LEAVE, RESTORE),
    "back from SMM": (*l2(), *SMI_IN_L2, do("RSM")),
}


def cleared(operations, clear=CLEAR, facts=None, kernel="6.1"):
    """Let L2 clear EFER.SVME; return what is predicted, and the model."""
    model = Model(SETTINGS[kernel], facts)
    for operation in operations:
        assert model.apply(operation).result not in ("unknown", "over")
    assert model.state.guest_mode
    return model.apply(clear), model


@pytest.mark.parametrize("name", LIVES)
def test_l1_goes_on_by_its_root(name):
    outcome, model = cleared(LIVES[name])
    assert (outcome.result, STALE_ROOT in outcome.seen, model.over) == ("report", False, "")


@pytest.mark.parametrize("name", GONE)
def test_l1_has_another_root_than_kvm(name):
    outcome, model = cleared(GONE[name])
    assert (outcome.result, outcome.seen.get(STALE_ROOT)) == ("report", True)
    assert "root" in model.over


@pytest.mark.parametrize("name", GONE)
def test_what_changes_the_role_of_the_mmu_loads_a_root(name):
    outcome, model = cleared(GONE[name], wrmsr(OFF | Efer.NX.mask))
    assert STALE_ROOT not in outcome.seen
    assert not model.over


def test_roots_of_shadow_paging_are_not_counted_on():
    outcome, _ = cleared(LIVES["VMRUN"], facts=CpuFacts(npt_on_l0=False))
    assert outcome.seen[STALE_ROOT]


def test_kernels_that_shut_l1_down_have_no_such_root():
    outcome, _ = cleared(GONE["a slot went"], kernel="7.3")
    assert outcome.result == "shutdown"
    assert STALE_ROOT not in outcome.seen
