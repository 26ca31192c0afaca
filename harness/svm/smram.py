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
