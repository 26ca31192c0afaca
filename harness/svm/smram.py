"""The state save area that an SMI writes into SMRAM.

APM vol. 2, 10.2.3 SMRAM State-Save Area; kernel: arch/x86/kvm/smm.h. Offsets count from SMBASE.
"""

from __future__ import annotations

from typing import Final

from kvm_ioctl.cstruct import CStruct, u8, u16, u32, u64

DEFAULT_SMBASE: Final = 0x3_0000
SMM_ENTRY_OFFSET: Final = 0x8000
"""Where the handler starts."""

SMRAM_STATE_OFFSET: Final = 0xFE00
"""Where the save area starts."""

SMM_REVISION_64: Final = 0x0002_0064
SMM_REVISION_32: Final = 0x0002_0000


class kvm_smm_seg_state_64(CStruct):
    """A segment or descriptor-table register in the save area."""

    header = "arch/x86/kvm/smm.h"
    _fields_ = (
        ("selector", u16),
        ("attributes", u16),
        ("limit", u32),
        ("base", u64),
    )


class kvm_smram_state_64(CStruct):
    """The save area of a guest with long mode (APM vol. 2, table 10-1)."""

    header = "arch/x86/kvm/smm.h"
    _fields_ = (
        ("es", kvm_smm_seg_state_64),
        ("cs", kvm_smm_seg_state_64),
        ("ss", kvm_smm_seg_state_64),
        ("ds", kvm_smm_seg_state_64),
        ("fs", kvm_smm_seg_state_64),
        ("gs", kvm_smm_seg_state_64),
        ("gdtr", kvm_smm_seg_state_64),
        ("ldtr", kvm_smm_seg_state_64),
        ("idtr", kvm_smm_seg_state_64),
        ("tr", kvm_smm_seg_state_64),
        ("io_restart_rip", u64),
        ("io_restart_rcx", u64),
        ("io_restart_rsi", u64),
        ("io_restart_rdi", u64),
        ("io_restart_dword", u32),
        ("reserved_0xfec4", u32),
        ("io_inst_restart", u8),
        ("auto_hlt_restart", u8),
        ("amd_nmi_mask", u8),
        ("int_shadow", u8),
        ("reserved_0xfecc", u32),
        ("efer", u64),
        ("svm_guest_flag", u64),
        ("svm_guest_vmcb_gpa", u64),
        ("svm_guest_virtual_int", u64),
        ("reserved_0xfef0", u32 * 3),
        ("smm_revison", u32),
        ("smbase", u32),
        ("reserved_0xff04", u32 * 5),
        ("ssp", u64),
        ("svm_guest_pat", u64),
        ("svm_host_efer", u64),
        ("svm_host_cr4", u64),
        ("svm_host_cr3", u64),
        ("svm_host_cr0", u64),
        ("cr4", u64),
        ("cr3", u64),
        ("cr0", u64),
        ("dr7", u64),
        ("dr6", u64),
        ("rflags", u64),
        ("rip", u64),
        ("gprs", u64 * 16),
    )


SMRAM_GPRS: Final = (
    *(f"r{n}" for n in range(15, 7, -1)),
    *("rdi", "rsi", "rbp", "rsp", "rbx", "rdx", "rcx", "rax"),
)
"""The registers in `kvm_smram_state_64.gprs`, by index."""


class kvm_smm_seg_state_32(CStruct):
    """A segment register in the legacy save area; the selector lies elsewhere."""

    header = "arch/x86/kvm/smm.h"
    _fields_ = (
        ("flags", u32),
        ("limit", u32),
        ("base", u32),
    )


class kvm_smram_state_32(CStruct):
    """The save area of a guest without long mode."""

    header = "arch/x86/kvm/smm.h"
    _fields_ = (
        ("reserved_0xfe00", u32 * 62),
        ("smbase", u32),
        ("smm_revision", u32),
        ("io_inst_restart", u16),
        ("auto_hlt_restart", u16),
        ("io_restart_rdi", u32),
        ("io_restart_rcx", u32),
        ("io_restart_rsi", u32),
        ("io_restart_rip", u32),
        ("cr4", u32),
        ("reserved_0xff18", u16),
        ("int_shadow", u8),
        ("reserved_0xff1b", u8 * 17),
        ("ds", kvm_smm_seg_state_32),
        ("fs", kvm_smm_seg_state_32),
        ("gs", kvm_smm_seg_state_32),
        ("idtr", kvm_smm_seg_state_32),
        ("tr", kvm_smm_seg_state_32),
        ("reserved_0xff68", u32),
        ("gdtr", kvm_smm_seg_state_32),
        ("ldtr", kvm_smm_seg_state_32),
        ("es", kvm_smm_seg_state_32),
        ("cs", kvm_smm_seg_state_32),
        ("ss", kvm_smm_seg_state_32),
        ("es_sel", u32),
        ("cs_sel", u32),
        ("ss_sel", u32),
        ("ds_sel", u32),
        ("fs_sel", u32),
        ("gs_sel", u32),
        ("ldtr_sel", u32),
        ("tr_sel", u32),
        ("dr7", u32),
        ("dr6", u32),
        ("gprs", u32 * 8),
        ("eip", u32),
        ("eflags", u32),
        ("cr3", u32),
        ("cr0", u32),
    )
