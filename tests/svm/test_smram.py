import ctypes

import pytest

from harness.svm.smram import (
    SMRAM_GPRS,
    SMRAM_STATE_OFFSET,
    kvm_smram_state_32,
    kvm_smram_state_64,
)

# From SMBASE, as the manual's table prints them.
OFFSETS = {
    "es": 0xFE00,
    "cs": 0xFE10,
    "gs": 0xFE50,
    "gdtr": 0xFE60,
    "ldtr": 0xFE70,
    "idtr": 0xFE80,
    "tr": 0xFE90,
    "io_restart_rip": 0xFEA0,
    "io_restart_dword": 0xFEC0,
    "io_inst_restart": 0xFEC8,
    "auto_hlt_restart": 0xFEC9,
    "amd_nmi_mask": 0xFECA,
    "int_shadow": 0xFECB,
    "efer": 0xFED0,
    "svm_guest_flag": 0xFED8,
    "svm_guest_vmcb_gpa": 0xFEE0,
    "smm_revison": 0xFEFC,
    "smbase": 0xFF00,
    "ssp": 0xFF18,
    "svm_guest_pat": 0xFF20,
    "svm_host_cr0": 0xFF40,
    "cr4": 0xFF48,
    "cr3": 0xFF50,
    "cr0": 0xFF58,
    "dr7": 0xFF60,
    "dr6": 0xFF68,
    "rflags": 0xFF70,
    "rip": 0xFF78,
    "gprs": 0xFF80,
}


@pytest.mark.parametrize(("name", "offset"), OFFSETS.items())
def test_field_is_where_the_manual_says(name, offset):
    assert SMRAM_STATE_OFFSET + getattr(kvm_smram_state_64, name).offset == offset


def test_the_save_area_ends_with_rax():
    assert ctypes.sizeof(kvm_smram_state_64) == 512
    assert len(SMRAM_GPRS) == 16
    assert SMRAM_GPRS[0] == "r15"
    assert SMRAM_GPRS[11] == "rsp"
    assert SMRAM_GPRS[-1] == "rax"


def test_reserved_fields_are_named_by_their_offset():
    for name, *_ in kvm_smram_state_64._fields_:
        if name.startswith("reserved_"):
            offset = SMRAM_STATE_OFFSET + getattr(kvm_smram_state_64, name).offset
            assert name == f"reserved_{offset:#x}"


LEGACY_OFFSETS = {
    "smbase": 0xFEF8,
    "smm_revision": 0xFEFC,
    "io_restart_rip": 0xFF10,
    "cr4": 0xFF14,
    "int_shadow": 0xFF1A,
    "tr": 0xFF5C,
    "gdtr": 0xFF6C,
    "es_sel": 0xFFA8,
    "dr7": 0xFFC8,
    "dr6": 0xFFCC,
    "gprs": 0xFFD0,
    "eip": 0xFFF0,
    "eflags": 0xFFF4,
    "cr3": 0xFFF8,
    "cr0": 0xFFFC,
}


@pytest.mark.parametrize(("field", "offset"), LEGACY_OFFSETS.items())
def test_legacy_field_lies_where_the_kernel_has_it(field, offset):
    assert SMRAM_STATE_OFFSET + getattr(kvm_smram_state_32, field).offset == offset


def test_legacy_save_area_has_512_bytes():
    assert ctypes.sizeof(kvm_smram_state_32) == 512
