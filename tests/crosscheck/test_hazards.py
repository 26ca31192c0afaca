"""What a bench keeps off."""

import pytest

from harness.crosscheck.hazards import (
    Roots,
    drops_hsave,
    is_odd_mode,
    resets_under_l2,
    sets_lme_in_real_mode,
)
from harness.model import layout
from harness.model.operations import (
    Execute,
    Instruction,
    Outcome,
    Resume,
    SetMsr,
    SetNestedState,
    SetSmm,
    StepRsm,
)
from harness.svm.msrs import Msr

VMRUN = Execute(Instruction.VMRUN)
RSM = Execute(Instruction.RSM)
VMMCALL = Execute(Instruction.VMMCALL)
RESTORE = SetNestedState(0x101)
LEAVE = SetNestedState(0x100)


def stale_after(*steps):
    """Follow operations, each with whether L2 is current afterwards; tell of the last."""
    roots = Roots()
    for operation, guest_mode in steps:
        stale = roots.is_stale_after(operation, Outcome("ok", {"guest_mode": guest_mode}))
    return stale


@pytest.mark.parametrize("entry", [VMRUN, RESTORE, RSM])
@pytest.mark.parametrize("leave", [LEAVE, SetMsr(Msr.MSR_EFER, 0), SetSmm(True)])
def test_a_forced_leave_leaves_a_stale_root(entry, leave):
    assert stale_after((entry, True), (Resume(), True), (leave, False))


def test_a_vmexit_does_not():
    assert not stale_after((RESTORE, True), (VMMCALL, False))
    assert not stale_after((RESTORE, True), (VMMCALL, False), (LEAVE, False))


@pytest.mark.parametrize(
    ("seen", "stale"), [({}, True), ({"smm": True}, False), ({"efer": 0x1500}, False)]
)
def test_wrmsr_of_l2_does_if_it_takes_svme_away(seen, stale):
    roots = Roots()
    roots.is_stale_after(VMRUN, Outcome("report", {"guest_mode": True}))
    after = Outcome("report", {"guest_mode": False, "efer": 0x500} | seen)
    assert roots.is_stale_after(Execute(Instruction.WRMSR), after) is stale


def test_what_stays_in_l2_does_not():
    assert not stale_after((VMRUN, True), (RESTORE, True))


ABOVE_L2 = {"smm": True, "smram.svm_guest_flag": 1, "efer": 0x1000}


@pytest.mark.parametrize("operation", [RSM, StepRsm()])
def test_rsm_with_svme_set_above_l2_drops_the_hsave_page(operation):
    assert drops_hsave(operation, ABOVE_L2)
    for name, value in {"smm": False, "smram.svm_guest_flag": 0, "efer": 0}.items():
        assert not drops_hsave(operation, ABOVE_L2 | {name: value})
    assert not drops_hsave(VMMCALL, ABOVE_L2)


NESTED = {
    "init_pending": True,
    "nested.control.nested_ctl": 1,
    "nested.control.nested_cr3": layout.PML4_GPA,
}


def test_init_in_l2_on_other_nested_tables_than_the_layout_s():
    assert resets_under_l2(Resume(), NESTED)
    assert resets_under_l2(VMMCALL, NESTED)
    assert not resets_under_l2(LEAVE, NESTED)
    for changes in (
        {"init_pending": False},
        {"nested.control.nested_ctl": 0},
        {"nested.control.nested_cr3": layout.NESTED_PML4_GPA},
    ):
        assert not resets_under_l2(Resume(), NESTED | changes)
    assert not resets_under_l2(Resume(), {"init_pending": True})


LONG = {"cr0": 0x8000_0031, "cr4": 0x20, "efer": 0x1500}


def test_modes_that_cpus_have_are_not_odd():
    assert not is_odd_mode({})
    assert not is_odd_mode(LONG)
    assert not is_odd_mode({"cr0": 0x31, "cr4": 0, "efer": 0x100})
    assert not is_odd_mode({"cr0": 0x10, "cr4": 0, "efer": 0, "smm": True})


@pytest.mark.parametrize(
    "changes",
    [
        {"efer": 0x1400},
        {"efer": 0x1100},
        {"cr4": 0},
        {"cr0": 0x8000_0010},
        {"cr0": 0x10, "efer": 0, "smm": False},
        {"cr0": 0x10, "efer": 0x100, "smm": True},
    ],
)
def test_modes_that_none_has_are(changes):
    assert is_odd_mode(LONG | changes)


def test_lme_in_real_mode():
    enable = Execute(Instruction.WRMSR, rcx=Msr.MSR_EFER, rax=0x1500)
    assert sets_lme_in_real_mode(enable, {"cr0": 0x10})
    assert not sets_lme_in_real_mode(enable, LONG)
    no_lme = Execute(Instruction.WRMSR, rcx=Msr.MSR_EFER, rax=0x1000)
    assert not sets_lme_in_real_mode(no_lme, {"cr0": 0x10})
