"""SMM in the model: the save area in both its forms, and what a tampered one leads to."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from witnesses import GIF, GM, ON, SMI_IN_L2, SVME, A, do, l2, vmrun

from harness.model import layout, save_area
from harness.model.facts import CpuFacts
from harness.model.knobs import SETTINGS
from harness.model.model import Model
from harness.model.operations import (
    GetNestedState,
    Resume,
    SetCpuid,
    SetNestedState,
    SetSlot,
    SetSmm,
    Smi,
    WriteSaveArea,
    WriteVmcb,
)
from harness.svm.msrs import Efer
from harness.svm.smram import SMM_REVISION_32
from harness.svm.vmcb import SegAttrib


def model_after(*operations, kernel="6.1", **facts):
    model = Model(SETTINGS[kernel], CpuFacts(**facts))
    outcomes = [model.apply(each) for each in operations]
    return model, outcomes[-1]


@given(st.builds(SegAttrib, st.integers(0, 0xFFF)))
def test_attributes_go_to_smram_and_back(attrib):
    assert save_area.attrib_of(save_area.attributes_of(attrib)) == attrib


def test_an_smi_in_l2_saves_l2():
    _, inside = model_after(*l2(), *SMI_IN_L2)
    assert inside.seen["smram.svm_guest_flag"] == 1
    assert inside.seen["smram.svm_guest_vmcb_gpa"] == A
    assert inside.seen["smram.efer"] == SVME
    assert inside.seen["smram.rip"] == layout.IDLE_L2 + layout.REPORT_BYTES
    assert inside.seen["smram.cs.selector"] == layout.KERNEL_CS
    assert inside.seen["smm"]
    assert inside.seen["efer"] == 0


def test_an_smi_in_l1_saves_l1():
    _, inside = model_after(*ON, Smi(), Resume())
    assert inside.seen["smram.svm_guest_flag"] == 0
    assert inside.seen["smram.rip"] == layout.IDLE_L1


def test_without_long_mode_the_save_area_is_the_32_bit_one():
    model, inside = model_after(SetCpuid("lm", False), Smi(), Resume())
    image = save_area.read_32(model.state)
    assert image["smm_revision"] == SMM_REVISION_32
    assert image["cr3"] == layout.PML4_GPA
    assert image["eip"] == layout.IDLE_L1
    assert image["cs_sel"] == layout.KERNEL_CS
    assert not any(name.startswith("smram.") for name in inside.seen)


@pytest.mark.parametrize(("kernel", "wanted"), [("6.1", "unknown"), ("6.12", "run: EIO")])
def test_the_32_bit_form_cannot_tell_of_l2(kernel, wanted):
    paged = SetNestedState(GM | GIF, vmcb_pa=A, changes={"save.efer": int(Efer.of(SVME=1))})
    _, inside = model_after(SetCpuid("lm", False), *ON, paged, *SMI_IN_L2, kernel=kernel)
    assert inside.result == wanted


def test_nested_state_stays_allocated_in_smm_and_comes_back():
    _, inside = model_after(*ON, Smi(), Resume())
    assert inside.seen["nested_bytes"] == 12288
    _, outside = model_after(*ON, Smi(), Resume(), do("RSM"))
    assert outside.seen["nested_bytes"] == 12288
    assert outside.seen["efer"] == SVME


def test_a_handler_that_clears_svme_leaves_nested_state_behind():
    """Retained: no SVME, 12 KiB all the same (until SVME is cleared outside SMM)."""
    _, outside = model_after(
        *ON, Smi(), Resume(), WriteSaveArea({"efer": int(layout.EFER_ON)}), do("RSM")
    )
    assert outside.result == "report"
    assert outside.seen["efer"] == int(layout.EFER_ON)
    assert outside.seen["nested_bytes"] == 12288


@pytest.mark.parametrize(("kernel", "wanted"), [("series v1", "internal error"), ("6.1", "report")])
def test_forged_without_nested_state(kernel, wanted):
    """Series v1 wants it to be allocated; later kernels allocate it then."""
    forged = WriteSaveArea({"svm_guest_flag": 1, "svm_guest_vmcb_gpa": A, "efer": SVME})
    _, after = model_after(Smi(), Resume(), forged, do("RSM"), kernel=kernel)
    assert after.result == wanted


def test_svm_in_smm_is_undefined():
    _, inside = model_after(*ON, SetSmm(True), vmrun())
    assert inside.result == "#UD"


def test_l1_comes_back_from_the_host_save_page():
    """6.1 and later: what was written there is what L1 gets, kept in guest memory meanwhile."""
    _, back = model_after(*l2(), *SMI_IN_L2, do("RSM"), do("VMMCALL"))
    assert not back.seen["guest_mode"]
    assert back.seen["efer"] == SVME
    _, lost = model_after(*l2(), *SMI_IN_L2, SetSlot("hsave", False), do("RSM"))
    assert lost.result == "shutdown"


def test_an_smi_waits_for_gif():
    _, waiting = model_after(*ON, do("CLGI"), Smi(), do("NOP"))
    assert waiting.seen["smi_pending"]
    assert not waiting.seen["smm"]
    _, taken = model_after(*ON, do("CLGI"), Smi(), do("NOP"), do("STGI"))
    assert taken.seen["smm"]


@pytest.mark.parametrize("loads_shadow", [False, True])
def test_a_shadow_given_to_vmrun_outlives_an_smi_where_the_cpu_takes_it(loads_shadow):
    """L2 is entered and left at once: there is no instruction that would end the shadow."""
    shadow = WriteVmcb("a", {"control.int_state": 1})
    _, inside = model_after(
        *(*ON, do("CLGI"), shadow, Smi(), vmrun()), kernel="6.12", loads_shadow=loads_shadow
    )
    assert inside.seen["smm"]
    assert inside.seen["vmcb_a.control.int_state"] == loads_shadow


def test_stgi_is_open_only_until_intercepts_are_computed_anew():
    set_gif = SetNestedState(GIF, size=128)
    opened, closed = (do("NOP"), set_gif), (set_gif, do("NOP"))
    assert model_after(*opened, do("STGI"), kernel="7.3")[1].result == "report"
    assert model_after(*closed, do("STGI"), kernel="7.3")[1].result == "#UD"
    waits = (SetNestedState(0, size=128), Smi(), do("NOP"))
    assert model_after(*opened, *waits, do("STGI"), kernel="7.3")[1].result == "#UD"


def test_l2_has_the_fixed_bit_of_rflags_once_it_was_entered():
    zero = WriteVmcb("a", {"save.rflags": 0})
    _, inside = model_after(*ON, do("CLGI"), zero, Smi(), vmrun(), kernel="5.10")
    assert inside.seen["vmcb_a.save.rflags"] == layout.RFLAGS_ON


def test_what_is_not_known_of_nested_state_is_not_known_after_its_restore():
    given = SetNestedState(GM | GIF, vmcb_pa=A, changes={"control.next_rip": 0x1234})
    kept = (GetNestedState(), SetNestedState(GM | GIF, vmcb_pa=A, kept=True))
    _, restored = model_after(*ON, given, Resume(), *kept, kernel="7.3")
    assert restored.result == "ok"
    assert "nested.control.next_rip" not in restored.seen


@pytest.mark.parametrize("loads_cpl", [False, True])
def test_a_cpl_given_to_vmrun_is_that_of_l2_where_the_cpu_takes_it(loads_cpl):
    _, inside = model_after(
        *(*ON, do("CLGI"), WriteVmcb("a", {"save.cpl": 3}), Smi(), vmrun()),
        kernel="6.12",
        loads_cpl=loads_cpl,
    )
    assert inside.seen["vmcb_a.save.cpl"] == (3 if loads_cpl else 0)
