"""Values at and beyond the edge of what is legal, one bit away from a state that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from harness.model import layout
from harness.svm.intercepts import Intercept
from harness.svm.msrs import Cr0, Cr4, Efer
from harness.svm.vmcb import Clean, EventInj, IntCtl, NestedCtl

Values = Mapping[str, Sequence[int]]
"""Values worth a try, by field."""

_LEGAL_EFER: Final = int(layout.EFER_ON.replace(SVME=1))
_HIGH: Final = 1 << 32
_BEYOND: Final = 1 << 52
"""Beyond every MAXPHYADDR."""

EFERS: Final = (
    int(layout.EFER_ON),
    _LEGAL_EFER,
    _LEGAL_EFER | Efer.of(NX=1),
    _LEGAL_EFER | Efer.of(SCE=1),
    _LEGAL_EFER | Efer.of(FFXSR=1),
    _LEGAL_EFER | Efer.of(LMSLE=1),
    _LEGAL_EFER | Efer.of(TCE=1),
    _LEGAL_EFER | 1 << 9,
    _LEGAL_EFER | 1 << 63,
)
"""For EFER itself: with SVME and without, and with what a guest may lack."""

_WITHOUT_VMRUN: Final = Intercept.INTERCEPT_VMMCALL.mask

CONTROL: Final[Values] = {
    "control.asid": (0, 1, 0xFFFF_FFFF),
    "control.intercepts.4": (_WITHOUT_VMRUN, 0),
    "control.intercepts.3": (
        Intercept.INTERCEPT_MSR_PROT.mask,
        Intercept.INTERCEPT_CPUID.mask,
        Intercept.INTERCEPT_HLT.mask,
        Intercept.INTERCEPT_SMI.mask,
        Intercept.INTERCEPT_SHUTDOWN.mask,
    ),
    "control.intercepts.2": (1 << 6, 1 << 13),
    "control.msrpm_base_pa": (layout.MSRPM_GPA | 0xFFF, layout.NO_MEMORY_GPA, _BEYOND, 1 << 40),
    "control.iopm_base_pa": (layout.IOPM_GPA | 0xFFF, layout.NO_MEMORY_GPA, _BEYOND, 1 << 40),
    "control.nested_ctl": (NestedCtl.of(NP_ENABLE=1),),
    "control.nested_cr3": (layout.NESTED_PML4_GPA, 1 << 40, _BEYOND),
    "control.int_ctl": (
        IntCtl.of(V_INTR_MASKING=1),
        IntCtl.of(V_NMI_ENABLE=1),
        IntCtl.of(V_TPR=5),
        IntCtl.of(V_GIF_ENABLE=1, V_GIF=1),
    ),
    "control.int_state": (1, 4),
    "control.int_vector": (0x30, 0x130),
    "control.tlb_ctl": (1, 2, 3, 7, 8),
    "control.event_inj": (
        EventInj.of(VALID=1, TYPE=1, VEC=32),
        EventInj.of(VALID=1, TYPE=5, VEC=32),
        EventInj.of(VALID=1, TYPE=3, VEC=6),
        EventInj.of(VALID=1, TYPE=3, VEC=2),
        EventInj.of(VALID=1, TYPE=3, VEC=31),
        EventInj.of(TYPE=3, VEC=6),
    ),
    "control.pause_filter_count": (100,),
    "control.pause_filter_thresh": (10,),
    "control.tsc_offset": (0x1_0000,),
    "control.exit_code": (0x77, _HIGH),
    "control.exit_info_1": (0x1234,),
    "control.next_rip": (0x1234,),
    "control.virt_ext": (1, 2),
}
"""Of the control area."""

SAVE: Final[Values] = {
    "save.efer": (int(layout.EFER_ON), *EFERS[2:], 0x1000, 0x1100),
    "save.cr0": (
        int(layout.CR0_ON | Cr0.of(NW=1)),
        int(layout.CR0_ON | Cr0.of(CD=1)),
        int(layout.CR0_ON | Cr0.of(CD=1, NW=1)),
        int(layout.CR0_ON) | _HIGH,
        int(layout.CR0_ON.replace(PE=0)),
    ),
    "save.cr3": (layout.PML4_GPA | _BEYOND, layout.PML4_GPA | 1 << 40),
    "save.cr4": (0, int(layout.CR4_ON) | 1 << 31, int(layout.CR4_ON) | _HIGH, 0x620),
    "save.dr6": (_HIGH | layout.DR6_RESET, layout.DR6_RESET | 1, 0),
    "save.dr7": (_HIGH | 0x400, 0, 0x401),
    "save.cs.attrib": (int(layout.CODE_ATTRIB.replace(DB=1)),),
    "save.rflags": (0, 0x202, 0x2_0002),
    "save.cpl": (3,),
    "save.rax": (0x1234_5678_9ABC,),
    "save.cr2": (0xDEAD_0000,),
    "save.gdtr.limit": (0x47,),
    "save.idtr.limit": (0xFFE,),
    "save.ds.limit": (0xFFFF_0000,),
    "save.g_pat": (0,),
}
"""Of the save area, L2's or L1's."""

_NP: Final = int(NestedCtl.of(NP_ENABLE=1))

COMBINED: Final[Sequence[Mapping[str, int]]] = (
    {"control.nested_ctl": _NP, "control.nested_cr3": 1 << 40},
    {"control.nested_ctl": _NP, "control.nested_cr3": _BEYOND | layout.NESTED_PML4_GPA},
    {"control.nested_ctl": _NP, "save.efer": 0x1400},
    {"save.efer": 0x1400, "save.cr4": 0},
    {"control.intercepts.3": Intercept.INTERCEPT_SHUTDOWN.mask, "save.idtr.limit": 0},
    {"control.asid": 0, "control.event_inj": int(EventInj.of(VALID=1, TYPE=3, VEC=6))},
    {"control.asid": 0, "control.tlb_ctl": 3, "control.pause_filter_count": 7},
    {"control.tlb_ctl": 3, "control.pause_filter_count": 7, "control.pause_filter_thresh": 5},
    {"control.intercepts.4": 1, "control.intercepts.3": Intercept.INTERCEPT_CPUID.mask},
    {
        "control.intercepts.3": Intercept.INTERCEPT_MSR_PROT.mask,
        "control.msrpm_base_pa": layout.NO_MEMORY_GPA,
    },
    {"control.exit_code": 1 << 32 | 0x77, "control.exit_info_1": 5, "control.asid": 0},
)
"""Values that matter together."""

BY_CLEAN_BIT: Final[Mapping[int, Values]] = {
    Clean.of(DT=1): {"save.gdtr.limit": (0x47, 0x57), "save.idtr.limit": (0xFFE,)},
    Clean.of(SEG=1): {"save.ds.limit": (0xFFFF_0000,), "save.es.selector": (0x18,)},
    Clean.of(DR=1): {"save.dr7": (0x401, 0x402), "save.dr6": (layout.DR6_RESET | 1,)},
    Clean.of(CR2=1): {"save.cr2": (0xDEAD_0000, 0x1000)},
    Clean.of(CR=1): {"save.cr4": (0x620,), "save.cr0": (int(layout.CR0_ON | Cr0.of(MP=1)),)},
    Clean.of(INTERCEPTS=1): {"control.intercepts.3": (Intercept.INTERCEPT_CPUID.mask,)},
    Clean.of(ASID=1): {"control.asid": (2, 0)},
    Clean.of(NPT=1): {"control.nested_cr3": (layout.NESTED_PML4_GPA,)},
}
"""What a clean bit speaks of (APM vol. 2, 15.15.3)."""

SAVE_AREA: Final[Values] = {
    "efer": (0, 0x500, 0x1000, 0x1500, 0x1501, 0x500 | 1 << 63, 0x1500 | 1 << 9),
    "svm_guest_flag": (0, 1),
    "svm_guest_vmcb_gpa": (
        layout.VMCB_A_GPA,
        layout.VMCB_B_GPA,
        layout.NO_MEMORY_GPA,
        layout.VMCB_A_GPA | 8,
    ),
    "dr6": (layout.DR6_RESET, layout.DR6_RESET | _HIGH),
    "dr7": (layout.DR7_RESET, layout.DR7_RESET | _HIGH),
    "cr0": (int(layout.CR0_ON | Cr0.of(NW=1)), int(layout.CR0_ON) | _HIGH),
    "cr3": (layout.PML4_GPA | _BEYOND,),
    "cr4": (int(layout.CR4_ON) | 1 << 31,),
    "smm_revison": (0, 0x2_0064),
    "int_shadow": (1,),
    "auto_hlt_restart": (1,),
}
"""Of the SMRAM state save area."""

SREGS: Final[Values] = {
    "efer": EFERS,
    "cr0": (int(layout.CR0_ON | Cr0.of(CD=1)), int(layout.CR0_ON | Cr0.of(CD=1, NW=1))),
    "cr4": (int(layout.CR4_ON | Cr4.of(PGE=1)), int(layout.CR4_ON) | 1 << 31),
}

ADDRESSES: Final = (
    layout.VMCB_A_GPA,
    layout.VMCB_B_GPA,
    layout.VMCB_A_GPA | 8,
    layout.VMCB_A_GPA | 0x800,
    layout.NO_MEMORY_GPA,
    0,
    1 << 40,
    _BEYOND,
    (1 << 64) - 4096,
)
"""Where a VMCB may be said to be."""

SIZES: Final = (0, 127, 128, 129, 4223, 4224, 4225)
"""Of a nested state."""

FLAGS: Final = (0, 0x100, 0x101, 1, 3, 0x103, 2, 4, 8, 0x102, 0x200, 0x109, 0xFFFF)
"""Of a nested state."""
