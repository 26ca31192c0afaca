import ctypes

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.svm.exit_codes import ExitCode, describe
from harness.svm.intercepts import Intercept, InterceptWord
from harness.svm.vmcb import (
    VMCB_SAVE_OFFSET,
    VMCB_SIZE,
    vmcb,
    vmcb_control_area,
    vmcb_save_area,
)

# APM vol. 2, appendix B, as listed once more and independently of the declarations.
CONTROL = {
    "intercepts": 0x00,
    "pause_filter_thresh": 0x3C,
    "pause_filter_count": 0x3E,
    "iopm_base_pa": 0x40,
    "msrpm_base_pa": 0x48,
    "tsc_offset": 0x50,
    "asid": 0x58,
    "tlb_ctl": 0x5C,
    "int_ctl": 0x60,
    "int_vector": 0x64,
    "int_state": 0x68,
    "exit_code": 0x70,
    "exit_info_1": 0x78,
    "exit_info_2": 0x80,
    "exit_int_info": 0x88,
    "exit_int_info_err": 0x8C,
    "nested_ctl": 0x90,
    "avic_vapic_bar": 0x98,
    "ghcb_gpa": 0xA0,
    "event_inj": 0xA8,
    "event_inj_err": 0xAC,
    "nested_cr3": 0xB0,
    "virt_ext": 0xB8,
    "clean": 0xC0,
    "next_rip": 0xC8,
    "insn_len": 0xD0,
    "avic_backing_page": 0xE0,
    "avic_logical_id": 0xF0,
    "avic_physical_id": 0xF8,
    "vmsa_pa": 0x108,
    "bus_lock_counter": 0x120,
    "allowed_sev_features": 0x138,
    "guest_sev_features": 0x140,
    "reserved_sw": 0x3E0,
}
SAVE = {
    "es": 0x00,
    "cs": 0x10,
    "ss": 0x20,
    "ds": 0x30,
    "fs": 0x40,
    "gs": 0x50,
    "gdtr": 0x60,
    "ldtr": 0x70,
    "idtr": 0x80,
    "tr": 0x90,
    "vmpl": 0xCA,
    "cpl": 0xCB,
    "efer": 0xD0,
    "cr4": 0x148,
    "cr3": 0x150,
    "cr0": 0x158,
    "dr7": 0x160,
    "dr6": 0x168,
    "rflags": 0x170,
    "rip": 0x178,
    "rsp": 0x1D8,
    "s_cet": 0x1E0,
    "ssp": 0x1E8,
    "isst_addr": 0x1F0,
    "rax": 0x1F8,
    "star": 0x200,
    "lstar": 0x208,
    "cstar": 0x210,
    "sfmask": 0x218,
    "kernel_gs_base": 0x220,
    "sysenter_cs": 0x228,
    "sysenter_esp": 0x230,
    "sysenter_eip": 0x238,
    "cr2": 0x240,
    "g_pat": 0x268,
    "dbgctl": 0x270,
    "br_from": 0x278,
    "br_to": 0x280,
    "last_excp_from": 0x288,
    "last_excp_to": 0x290,
    "spec_ctrl": 0x2E0,
}


def named_fields(struct):
    return [f[0] for f in struct._fields_ if not f[0].startswith("reserved_0x")]


@pytest.mark.parametrize(("name", "offset"), CONTROL.items())
def test_control_field_is_where_the_manual_says(name, offset):
    assert getattr(vmcb_control_area, name).offset == offset


@pytest.mark.parametrize(("name", "offset"), SAVE.items())
def test_save_field_is_where_the_manual_says(name, offset):
    assert getattr(vmcb_save_area, name).offset == offset


def test_the_lists_above_leave_no_field_out():
    assert set(named_fields(vmcb_control_area)) == {*CONTROL, "insn_bytes"}
    assert set(named_fields(vmcb_save_area)) == set(SAVE)


@pytest.mark.parametrize("struct", [vmcb_control_area, vmcb_save_area])
def test_reserved_fields_are_named_by_their_offset(struct):
    for name, *_ in struct._fields_:
        if name.startswith("reserved_0x"):
            assert getattr(struct, name).offset == int(name.removeprefix("reserved_"), 16)


def test_whole_vmcb_is_a_page():
    assert ctypes.sizeof(vmcb) == VMCB_SIZE == 4096
    assert vmcb.save.offset == VMCB_SAVE_OFFSET == ctypes.sizeof(vmcb_control_area) == 0x400
    assert ctypes.sizeof(vmcb_save_area) == 744


# Bytes and bits of the control area that hold an intercept, from the manual's table.
@pytest.mark.parametrize(
    ("intercept", "byte", "bit"),
    [
        (Intercept.INTERCEPT_CR0_READ, 0x00, 0),
        (Intercept.INTERCEPT_CR0_WRITE, 0x02, 0),
        (Intercept.INTERCEPT_DR0_READ, 0x04, 0),
        (Intercept.INTERCEPT_DR7_WRITE, 0x06, 7),
        (Intercept.INTERCEPT_INTR, 0x0C, 0),
        (Intercept.INTERCEPT_NMI, 0x0C, 1),
        (Intercept.INTERCEPT_SMI, 0x0C, 2),
        (Intercept.INTERCEPT_INIT, 0x0C, 3),
        (Intercept.INTERCEPT_VINTR, 0x0C, 4),
        (Intercept.INTERCEPT_IOIO_PROT, 0x0F, 3),
        (Intercept.INTERCEPT_MSR_PROT, 0x0F, 4),
        (Intercept.INTERCEPT_SHUTDOWN, 0x0F, 7),
        (Intercept.INTERCEPT_VMRUN, 0x10, 0),
        (Intercept.INTERCEPT_VMMCALL, 0x10, 1),
        (Intercept.INTERCEPT_RDPRU, 0x11, 6),
        (Intercept.INTERCEPT_INVLPGB, 0x14, 0),
        (Intercept.INTERCEPT_INVPCID, 0x14, 2),
    ],
)
def test_intercept_sets_the_manuals_bit(intercept, byte, bit):
    control = vmcb_control_area()
    control.set_intercept(intercept)
    raw = control.as_bytes()
    assert raw[byte] == 1 << bit
    assert sum(raw) == raw[byte]


@given(st.sets(st.sampled_from(Intercept)), st.sampled_from(Intercept))
def test_intercepts_are_independent(chosen, cleared):
    control = vmcb_control_area()
    for intercept in chosen:
        control.set_intercept(intercept)
    control.set_intercept(cleared, on=False)
    assert {i for i in Intercept if control.has_intercept(i)} == chosen - {cleared}


def test_intercept_words_cover_all_bits():
    assert {i.word for i in Intercept} == set(InterceptWord)


# Intercepts of words 3 and 4 and exit codes count up together from INTR / VMRUN (appendix C).
@pytest.mark.parametrize(
    ("name", "first_bit", "first_code"),
    [(i.name, 96, 0x60) for i in Intercept if 96 <= i < 128]
    + [(i.name, 128, 0x80) for i in Intercept if 128 <= i < 143],
)
def test_exit_code_follows_its_intercept(name, first_bit, first_code):
    code = ExitCode(Intercept[name] - first_bit + first_code)
    same = {
        "SVM_EXIT_CR0_SEL_WRITE": "SELECTIVE_CR0",
        "SVM_EXIT_SWINT": "INTn",
        "SVM_EXIT_IOIO": "IOIO_PROT",
        "SVM_EXIT_MSR": "MSR_PROT",
    }
    short = same.get(code.name, code.name.removeprefix("SVM_EXIT_"))
    register, _, access = short.partition("_")
    wanted = {"READ": "STORE", "WRITE": "LOAD"}
    if register in ("IDTR", "GDTR", "LDTR", "TR"):
        short = f"{wanted[access]}_{register}"
    assert name == f"INTERCEPT_{short}"


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (0x81, "SVM_EXIT_VMMCALL"),
        (0x40 + 14, "SVM_EXIT_EXCP_BASE+14"),
        (2**64 - 1, "VMEXIT_INVALID"),
        (0xF000_0000, "SVM_EXIT_SW"),
        (0x1234, "exit code 0x1234"),
    ],
)
def test_exit_codes_are_described(code, text):
    assert describe(code) == text
