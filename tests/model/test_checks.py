"""The checks of vmcb12, without a kernel."""

import pytest

from harness.model.checks import (
    APM_CHECKS,
    KVM_CHECKS,
    QEMU_7_2,
    QEMU_CHECKS,
    SILICON,
    apm_violations,
    control_violations,
    cpu_violations,
    cr4_reserved,
    late_violations,
    pat_valid,
    save_violations,
    set_state_violations,
)
from harness.model.facts import CpuFacts
from harness.model.knobs import KNOBS, SETTINGS
from harness.svm.intercepts import Intercept
from harness.svm.msrs import Cr0, Cr4, Efer
from harness.svm.vmcb import IOPM_SIZE, MSRPM_SIZE, EventInj, IntCtl, NestedCtl, SegAttrib

FACTS = CpuFacts(maxphyaddr=36)
LIMIT = 1 << 36
KERNELS = ("5.10", "6.1", "6.12", "7.3")
NEWEST = SETTINGS["7.3"]
VMRUN_WORD = f"intercepts.{int(Intercept.INTERCEPT_VMRUN.word)}"
NMI_WORD = f"intercepts.{int(Intercept.INTERCEPT_NMI.word)}"

CONTROL = {
    VMRUN_WORD: Intercept.INTERCEPT_VMRUN.mask,
    "asid": 1,
    "nested_ctl": int(NestedCtl.of(NP_ENABLE=1)),
    "nested_cr3": 0x1000,
}
LONG = Efer.of(SVME=1, LME=1, LMA=1)
PAGED = Cr0.of(PG=1, PE=1, ET=1)
SAVE = {
    "efer": int(LONG),
    "cr0": int(PAGED),
    "cr4": int(Cr4.of(PAE=1)),
    "cr3": 0x1000,
    "cs.attrib": int(SegAttrib.of(P=1, L=1)),
    "rflags": 2,
    "g_pat": 0x0007_0406_0007_0406,
}
LEGACY = {"efer": int(LONG.replace(LME=0, LMA=0)), "cs.attrib": int(SegAttrib.of(P=1, DB=1))}


def event(type_, vector):
    return {"event_inj": int(EventInj.of(VALID=1, TYPE=type_, VEC=vector))}


#: What is wrong, changes, and the kernels whose KVM refuses it early.
CONTROLS = [
    ("VMRUN intercept", {VMRUN_WORD: 0}, KERNELS),
    ("ASID", {"asid": 0}, KERNELS),
    ("nCR3", {"nested_cr3": LIMIT}, KERNELS[1:]),
    ("MSRPM", {"msrpm_base_pa": LIMIT - MSRPM_SIZE + 0x1000}, KERNELS[1:]),
    ("IOPM", {"iopm_base_pa": LIMIT - IOPM_SIZE + 0x1000}, KERNELS[1:]),
    ("V_NMI", {"int_ctl": int(IntCtl.of(V_NMI_ENABLE=1))}, KERNELS[2:]),
    ("EVENTINJ.TYPE", event(1, 0x40), KERNELS[3:]),
    ("EVENTINJ.TYPE", event(7, 0x40), KERNELS[3:]),
    ("EVENTINJ.VEC", event(3, 2), KERNELS[3:]),
    ("EVENTINJ.VEC", event(3, 9), KERNELS[3:]),
    ("EVENTINJ.VEC", event(3, 21), KERNELS[3:]),
    ("EVENTINJ.VEC", event(3, 32), KERNELS[3:]),
]
SAVES = [
    ("EFER.SVME", {"efer": int(LONG.replace(SVME=0))}, KERNELS),
    ("CR0.CD, CR0.NW", {"cr0": int(PAGED.replace(NW=1))}, KERNELS),
    ("CR0[63:32]", {"cr0": PAGED | 1 << 32}, KERNELS[1:]),
    ("DR6[63:32]", {"dr6": 1 << 32}, KERNELS),
    ("DR7[63:32]", {"dr7": 1 << 63}, KERNELS),
    ("CR4.PAE", {"cr4": 0}, KERNELS),
    ("CR0.PE", {"cr0": int(PAGED.replace(PE=0))}, KERNELS),
    ("CR3", {"cr3": LIMIT}, KERNELS),
    ("CS.L, CS.D", {"cs.attrib": int(SegAttrib.of(L=1, DB=1))}, KERNELS[1:]),
    ("CR4", {"cr4": Cr4.of(PAE=1) | 1 << 15}, KERNELS),
    ("EFER", {"efer": LONG | 1 << 9}, KERNELS[1:]),
]
LEGAL_CONTROL = [
    {"msrpm_base_pa": LIMIT - MSRPM_SIZE + 0xFFF},
    {"iopm_base_pa": LIMIT - IOPM_SIZE},
    {"nested_cr3": LIMIT, "nested_ctl": 0},
    {"nested_cr3": LIMIT - 1},
    {
        "int_ctl": int(IntCtl.of(V_NMI_ENABLE=1)),
        NMI_WORD: Intercept.INTERCEPT_NMI.mask,
    },
    {"event_inj": int(EventInj.of(TYPE=7, VEC=0xFF))},
    {"event_inj": int(EventInj.of(TYPE=3, VEC=2))},
    event(0, 0xFF),
    event(2, 0),
    event(3, 14),
    event(4, 0x80),
]
LEGAL_SAVE = [
    {"cr0": int(PAGED.replace(CD=1, NW=1))},
    {"dr6": 0xFFFF_FFFF},
    {"cr3": LIMIT - 1},
    LEGACY | {"cr3": LIMIT},
    LEGACY | {"cr0": int(PAGED.replace(PE=0))},
    LEGACY | {"cs.attrib": int(SegAttrib.of(L=1, DB=1))},
    {"efer": int(LONG.replace(NX=1, FFXSR=1, LMSLE=1))},
]


def names(checks):
    return [check.name for check in checks]


@pytest.mark.parametrize("kernel", SETTINGS)
def test_the_legal_template_passes_everywhere(kernel):
    knobs = SETTINGS[kernel]
    assert control_violations(CONTROL, knobs, FACTS) == []
    assert save_violations(SAVE, knobs, FACTS) == []
    assert set_state_violations(CONTROL, SAVE, knobs, FACTS) == []
    assert late_violations(SAVE, CONTROL, knobs, FACTS, pdptes=()) == []
    assert apm_violations(CONTROL, SAVE, FACTS) == []


@pytest.mark.parametrize("cpu", [QEMU_7_2, SILICON])
def test_no_cpu_refuses_the_template(cpu):
    assert cpu_violations(CONTROL, SAVE, FACTS, cpu) == []


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("name", "changes", "refusing"), CONTROLS)
def test_a_control_area_is_refused_by_the_kernels_that_check_it(kernel, name, changes, refusing):
    found = names(control_violations(CONTROL | changes, SETTINGS[kernel], FACTS))
    assert found == ([name] if kernel in refusing else [])
    assert name in names(apm_violations(CONTROL | changes, SAVE, FACTS))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("name", "changes", "refusing"), SAVES)
def test_a_save_area_is_refused_by_the_kernels_that_check_it(kernel, name, changes, refusing):
    found = names(save_violations(SAVE | changes, SETTINGS[kernel], FACTS))
    assert found == ([name] if kernel in refusing else [])
    assert name in names(apm_violations(CONTROL, SAVE | changes, FACTS))


@pytest.mark.parametrize("changes", LEGAL_CONTROL)
def test_a_legal_control_area_passes(changes):
    assert control_violations(CONTROL | changes, NEWEST, FACTS) == []


@pytest.mark.parametrize("changes", LEGAL_SAVE)
def test_a_legal_save_area_passes(changes):
    assert save_violations(SAVE | changes, NEWEST, FACTS) == []


def test_every_check_is_reached_by_a_case_here():
    tried = {name for name, *_ in (*CONTROLS, *SAVES)}
    assert {check.name for check in KVM_CHECKS} - tried == {"NP_ENABLE"}
    assert {check.name for check in APM_CHECKS} - tried == {"NP_ENABLE"}
    assert {check.name for check in QEMU_CHECKS} <= tried


def test_np_enable_needs_nested_paging_below():
    without = FACTS.but(npt_on_l0=False)
    assert names(control_violations(CONTROL, NEWEST, without)) == ["NP_ENABLE"]


def test_np_enable_without_cpuid_is_cleared_or_honoured():
    control, without = CONTROL | {"nested_cr3": LIMIT}, FACTS.but(npt=False)
    assert names(control_violations(control, SETTINGS["6.12"], without)) == ["nCR3"]
    assert control_violations(control, NEWEST, without) == []
    assert names(apm_violations(CONTROL, SAVE, without)) == ["NP_ENABLE"]


def test_every_knob_of_a_check_is_one():
    assert {check.knob for check in KVM_CHECKS} - {None} <= KNOBS.keys()


def test_missing_fields_are_0():
    assert names(control_violations({}, NEWEST, FACTS)) == ["VMRUN intercept", "ASID"]
    assert names(save_violations({}, NEWEST, FACTS)) == ["EFER.SVME"]


@pytest.mark.parametrize(("vector", "offered"), [(21, {"shstk": True}), (29, {"sev_es": True})])
def test_some_exceptions_need_a_feature(vector, offered):
    control = CONTROL | event(3, vector)
    assert names(control_violations(control, NEWEST, FACTS)) == ["EVENTINJ.VEC"]
    assert control_violations(control, NEWEST, FACTS.but(**offered)) == []


@pytest.mark.parametrize(
    ("feature", "bit"),
    [("svm", Efer.SVME), ("lm", Efer.LME), ("nx", Efer.NX), ("ffxsr", Efer.FFXSR)],
)
def test_efer_bits_need_their_feature(feature, bit):
    save = SAVE | {"efer": LONG | bit.mask}
    assert save_violations(save, NEWEST, FACTS) == []
    assert "EFER" in names(save_violations(save, NEWEST, FACTS.but(**{feature: False})))


# KVM_SET_NESTED_STATE


@pytest.mark.parametrize(
    ("changes", "refusing"),
    [
        ({"cr0": int(PAGED.replace(PG=0))}, KERNELS),
        ({"efer": int(LONG.replace(SVME=0))}, KERNELS),
        (LEGACY | {"cr0": int(PAGED.replace(PE=0))}, KERNELS[1:]),
        ({"rflags": 1 << 17}, KERNELS[1:]),
        ({"dr6": 1 << 32}, KERNELS[1:]),
        ({"efer": int(LONG.replace(LME=0))}, KERNELS[3:]),
    ],
)
@pytest.mark.parametrize("kernel", KERNELS)
def test_l1s_state_is_refused_by_the_kernels_that_check_it(kernel, changes, refusing):
    found = set_state_violations(CONTROL, SAVE | changes, SETTINGS[kernel], FACTS)
    assert bool(found) == (kernel in refusing)


def test_the_control_area_counts_for_a_restored_state_too():
    assert names(set_state_violations(CONTROL | {"asid": 0}, SAVE, NEWEST, FACTS)) == ["ASID"]


# Late


@pytest.mark.parametrize("kernel", KERNELS)
def test_cr3_is_checked_at_load_when_not_before(kernel):
    save = SAVE | LEGACY | {"cr3": LIMIT}
    assert save_violations(save, SETTINGS[kernel], FACTS) == []
    assert names(late_violations(save, CONTROL, SETTINGS[kernel], FACTS)) == ["CR3 at load"]


SHADOW = CONTROL | {"nested_ctl": 0}


@pytest.mark.parametrize(
    ("pdptes", "legal"),
    [
        ((0, 0, 0, 0), True),
        ((0x1001, 0x2001, 0, 0), True),
        ((0x1E6, 0, 0, 0), True),
        ((0x1021, 0, 0, 0), False),
        ((0, 0, 0, 1 | LIMIT), False),
        ((), False),
    ],
)
def test_pdptes_are_checked_of_pae_paging(pdptes, legal):
    found = late_violations(SAVE | LEGACY, SHADOW, NEWEST, FACTS, pdptes=pdptes)
    assert names(found) == ([] if legal else ["PDPTRs"])
    assert late_violations(SAVE, SHADOW, NEWEST, FACTS, pdptes=pdptes) == []
    assert late_violations(SAVE | LEGACY, CONTROL, NEWEST, FACTS, pdptes=pdptes) == []


@pytest.mark.parametrize(("kernel", "refused"), [("6.1", False), ("6.12", True), ("7.3", True)])
def test_lma_without_lme_hides_pae_paging_or_not(kernel, refused):
    save = SAVE | {"efer": int(LONG.replace(LME=0))}
    found = late_violations(save, SHADOW, SETTINGS[kernel], FACTS, pdptes=())
    assert bool(found) == refused


def test_the_msrpm_matters_only_if_msrs_are_intercepted():
    word = f"intercepts.{int(Intercept.INTERCEPT_MSR_PROT.word)}"
    assert late_violations(SAVE, CONTROL, NEWEST, FACTS, msrpm_readable=False) == []
    control = CONTROL | {word: Intercept.INTERCEPT_MSR_PROT.mask}
    found = late_violations(SAVE, control, NEWEST, FACTS, msrpm_readable=False)
    assert names(found) == ["MSRPM unreadable"]


# The CPU, and the manual


def test_qemu_and_silicon_differ_where_it_is_known():
    lmsle = SAVE | {"efer": int(LONG.replace(LMSLE=1))}
    assert names(cpu_violations(CONTROL, lmsle, FACTS, QEMU_7_2)) == ["EFER"]
    assert cpu_violations(CONTROL, lmsle, FACTS, SILICON) == []
    event_9 = CONTROL | event(3, 9)
    assert cpu_violations(event_9, SAVE, FACTS, QEMU_7_2) == []
    assert names(cpu_violations(event_9, SAVE, FACTS, SILICON)) == ["EVENTINJ.VEC"]


def test_what_does_not_reach_vmcb02_is_not_the_cpus():
    control = CONTROL | {"asid": 0, "msrpm_base_pa": LIMIT}
    for cpu in (QEMU_7_2, SILICON):
        assert cpu_violations(control, SAVE, FACTS, cpu) == []


def test_the_manual_refuses_br_in_64_bit_mode_only():
    control = CONTROL | event(3, 5)
    assert names(apm_violations(control, SAVE, FACTS)) == ["EVENTINJ #BR"]
    assert apm_violations(control, SAVE | LEGACY, FACTS) == []


def test_the_manual_checks_g_pat_with_nested_paging_only():
    save = SAVE | {"g_pat": 2}
    assert names(apm_violations(CONTROL, save, FACTS)) == ["G_PAT"]
    assert apm_violations(SHADOW, save, FACTS) == []


@pytest.mark.parametrize(("pat", "valid"), [(0, True), (0x0706_0504_0100_0000, True), (8, False)])
def test_memory_types(pat, valid):
    assert pat_valid(pat) == valid


def test_cr4_bits_are_offered_by_features():
    assert cr4_reserved(()) >> 10 & 1 == 0
    assert cr4_reserved(()) & Cr4.SMEP.mask
    assert not cr4_reserved(("smep",)) & Cr4.SMEP.mask
    assert cr4_reserved(("smep", "svm")) & Cr4.CET.mask
