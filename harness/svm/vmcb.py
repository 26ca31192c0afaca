"""The virtual machine control block (APM vol. 2, appendix B; kernel: asm/svm.h)."""

from __future__ import annotations

import ctypes

from harness.svm.bits import Bits, bits
from harness.svm.intercepts import Intercept, InterceptWord
from kvm_ioctl.cstruct import CStruct, u8, u16, u32, u64

VMCB_SIZE = 4096
"""Bytes of a VMCB; it is aligned to as many."""

VMCB_SAVE_OFFSET = 0x400
"""Where the state save area starts within the VMCB."""

MSRPM_SIZE = 8192
"""Bytes of the MSR permission map (APM vol. 2, 15.11 MSR Intercepts)."""

IOPM_SIZE = 12288
"""Bytes of the I/O permission map (APM vol. 2, 15.10 IOIO Intercepts)."""


class vmcb_control_area(CStruct):
    """Control area of the VMCB (APM vol. 2, appendix B, table B-1).

    `exit_code` is the manual's 64 bits; kernels up to 7.2 split it into exit_code and exit_code_hi.
    """

    header = "asm/svm.h"
    _fields_ = (
        ("intercepts", u32 * len(InterceptWord)),
        ("reserved_0x018", u8 * 36),
        ("pause_filter_thresh", u16),
        ("pause_filter_count", u16),
        ("iopm_base_pa", u64),
        ("msrpm_base_pa", u64),
        ("tsc_offset", u64),
        ("asid", u32),
        ("tlb_ctl", u8),
        ("reserved_0x05d", u8 * 3),
        ("int_ctl", u32),
        ("int_vector", u32),
        ("int_state", u32),
        ("reserved_0x06c", u8 * 4),
        ("exit_code", u64),
        ("exit_info_1", u64),
        ("exit_info_2", u64),
        ("exit_int_info", u32),
        ("exit_int_info_err", u32),
        ("nested_ctl", u64),
        ("avic_vapic_bar", u64),
        ("ghcb_gpa", u64),
        ("event_inj", u32),
        ("event_inj_err", u32),
        ("nested_cr3", u64),
        ("virt_ext", u64),
        ("clean", u32),
        ("reserved_0x0c4", u8 * 4),
        ("next_rip", u64),
        ("insn_len", u8),
        ("insn_bytes", u8 * 15),
        ("avic_backing_page", u64),
        ("reserved_0x0e8", u8 * 8),
        ("avic_logical_id", u64),
        ("avic_physical_id", u64),
        ("reserved_0x100", u8 * 8),
        ("vmsa_pa", u64),
        ("reserved_0x110", u8 * 16),
        ("bus_lock_counter", u16),
        ("reserved_0x122", u8 * 22),
        ("allowed_sev_features", u64),
        ("guest_sev_features", u64),
        ("reserved_0x148", u8 * 664),
        ("reserved_sw", u8 * 32),
    )

    def set_intercept(self, intercept: Intercept, on: bool = True) -> None:
        """Set or clear one intercept bit."""
        word = self.intercepts[intercept.word]
        self.intercepts[intercept.word] = word | intercept.mask if on else word & ~intercept.mask

    def has_intercept(self, intercept: Intercept) -> bool:
        """Tell whether an intercept bit is set."""
        return bool(self.intercepts[intercept.word] & intercept.mask)


class vmcb_seg(CStruct):
    """A segment register in the state save area."""

    header = "asm/svm.h"
    _fields_ = (
        ("selector", u16),
        ("attrib", u16),
        ("limit", u32),
        ("base", u64),
    )


class vmcb_save_area(CStruct):
    """State save area of the VMCB (APM vol. 2, appendix B, table B-2)."""

    header = "asm/svm.h"
    _fields_ = (
        ("es", vmcb_seg),
        ("cs", vmcb_seg),
        ("ss", vmcb_seg),
        ("ds", vmcb_seg),
        ("fs", vmcb_seg),
        ("gs", vmcb_seg),
        ("gdtr", vmcb_seg),
        ("ldtr", vmcb_seg),
        ("idtr", vmcb_seg),
        ("tr", vmcb_seg),
        ("reserved_0x0a0", u8 * 42),
        ("vmpl", u8),
        ("cpl", u8),
        ("reserved_0x0cc", u8 * 4),
        ("efer", u64),
        ("reserved_0x0d8", u8 * 112),
        ("cr4", u64),
        ("cr3", u64),
        ("cr0", u64),
        ("dr7", u64),
        ("dr6", u64),
        ("rflags", u64),
        ("rip", u64),
        ("reserved_0x180", u8 * 88),
        ("rsp", u64),
        ("s_cet", u64),
        ("ssp", u64),
        ("isst_addr", u64),
        ("rax", u64),
        ("star", u64),
        ("lstar", u64),
        ("cstar", u64),
        ("sfmask", u64),
        ("kernel_gs_base", u64),
        ("sysenter_cs", u64),
        ("sysenter_esp", u64),
        ("sysenter_eip", u64),
        ("cr2", u64),
        ("reserved_0x248", u8 * 32),
        ("g_pat", u64),
        ("dbgctl", u64),
        ("br_from", u64),
        ("br_to", u64),
        ("last_excp_from", u64),
        ("last_excp_to", u64),
        ("reserved_0x298", u8 * 72),
        ("spec_ctrl", u64),
    )


class vmcb(CStruct):
    """A whole VMCB, one page."""

    header = "asm/svm.h"
    _fields_ = (
        ("control", vmcb_control_area),
        ("save", vmcb_save_area),
        (
            "reserved_tail",
            u8 * (VMCB_SIZE - ctypes.sizeof(vmcb_control_area) - ctypes.sizeof(vmcb_save_area)),
        ),
    )


class IntCtl(Bits):
    """VMCB offset 060h, virtual interrupt control (int_ctl)."""

    AVIC_ENABLE = bits(31)
    X2AVIC_ENABLE = bits(30)
    V_NMI_ENABLE = bits(26)
    V_GIF_ENABLE = bits(25)
    V_INTR_MASKING = bits(24)
    V_IGN_TPR = bits(20)
    V_INTR_PRIO = bits(19, 16)
    V_NMI_MASK = bits(12)
    V_NMI = bits(11)
    V_GIF = bits(9)
    V_IRQ = bits(8)
    V_TPR = bits(7, 0)


class IntState(Bits):
    """VMCB offset 068h, interrupt shadow (int_state)."""

    GUEST_INTERRUPT_MASK = bits(1)
    INTERRUPT_SHADOW = bits(0)


class NestedCtl(Bits):
    """VMCB offset 090h, nested paging and encryption (nested_ctl, later misc_ctl)."""

    INVLPGB_TLBSYNC = bits(7)
    ROGPT = bits(6)
    VTE = bits(5)
    SSS_CHECK = bits(4)
    GMET = bits(3)
    SEV_ES_ENABLE = bits(2)
    SEV_ENABLE = bits(1)
    NP_ENABLE = bits(0)


class VirtExt(Bits):
    """VMCB offset 0B8h, LBR and VMLOAD/VMSAVE virtualization (virt_ext, later misc_ctl2)."""

    IBS_ENABLE = bits(2)
    VIRTUAL_VMLOAD_VMSAVE_ENABLE = bits(1)
    LBR_CTL_ENABLE = bits(0)


class EventInj(Bits):
    """VMCB offsets 0A8h (event_inj) and 088h (exit_int_info)."""

    VALID = bits(31)
    VALID_ERR = bits(11)
    TYPE = bits(10, 8)
    VEC = bits(7, 0)


class Clean(Bits):
    """VMCB offset 0C0h, clean bits (APM vol. 2, 15.15 VMCB State Caching); set means clean."""

    SW = bits(31)
    CET = bits(12)
    AVIC = bits(11)
    LBR = bits(10)
    CR2 = bits(9)
    SEG = bits(8)
    DT = bits(7)
    DR = bits(6)
    CR = bits(5)
    NPT = bits(4)
    INTR = bits(3)
    ASID = bits(2)
    PERM_MAP = bits(1)
    INTERCEPTS = bits(0)


class SegAttrib(Bits):
    """Segment attributes as the VMCB packs them: descriptor bits 55:52 and 47:40."""

    G = bits(11)
    DB = bits(10)
    L = bits(9)
    AVL = bits(8)
    P = bits(7)
    DPL = bits(6, 5)
    S = bits(4)
    TYPE = bits(3, 0)
