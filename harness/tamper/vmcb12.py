"""What is changed in vmcb12 while its L2 waits for RSM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from harness.model import layout
from harness.svm.intercepts import Intercept
from harness.svm.msrs import Cr0, Efer
from harness.svm.vmcb import Clean, EventInj, IntCtl, NestedCtl, SegAttrib

Changes = Mapping[str, int]

_TEMPLATE: Final = layout.template_vmcb12()
_VMRUN_WORD: Final = f"control.intercepts.{int(Intercept.INTERCEPT_VMRUN.word)}"
_BEYOND: Final = 1 << 51
_EFER: Final = int(layout.EFER_ON.replace(SVME=1))
_NPT: Final = int(NestedCtl.of(NP_ENABLE=1))


def _intercepting(intercept: Intercept) -> Changes:
    name = f"control.intercepts.{int(intercept.word)}"
    return {name: _TEMPLATE.get(name, 0) | intercept.mask}


CHECKED: Final[Mapping[str, Changes]] = {
    "VMRUN intercept": {_VMRUN_WORD: _TEMPLATE[_VMRUN_WORD] & ~Intercept.INTERCEPT_VMRUN.mask},
    "ASID": {"control.asid": 0},
    "nCR3": {"control.nested_ctl": _NPT, "control.nested_cr3": _BEYOND},
    "MSRPM": {"control.msrpm_base_pa": _BEYOND},
    "IOPM": {"control.iopm_base_pa": _BEYOND},
    "V_NMI": {"control.int_ctl": int(IntCtl.of(V_NMI_ENABLE=1))},
    "EVENTINJ.TYPE": {"control.event_inj": int(EventInj.of(VALID=1, TYPE=1))},
    "EVENTINJ.VEC": {"control.event_inj": int(EventInj.of(VALID=1, TYPE=3, VEC=2))},
    "EFER.SVME": {"save.efer": int(layout.EFER_ON)},
    "CR0.CD, CR0.NW": {"save.cr0": layout.CR0_ON | Cr0.NW.mask},
    "CR0[63:32]": {"save.cr0": layout.CR0_ON | 1 << 40},
    "DR6[63:32]": {"save.dr6": layout.DR6_RESET | 1 << 40},
    "DR7[63:32]": {"save.dr7": layout.DR7_RESET | 1 << 40},
    "CR4.PAE": {"save.cr4": 0},
    "CR0.PE": {"save.cr0": layout.CR0_ON & ~Cr0.PE.mask},
    "CR3": {"save.cr3": layout.PML4_GPA | _BEYOND},
    "CS.L, CS.D": {"save.cs.attrib": layout.CODE_ATTRIB | SegAttrib.DB.mask},
    "CR4": {"save.cr4": layout.CR4_ON | 1 << 30},
    "EFER": {"save.efer": _EFER | 1 << 2},
}
"""One change for each check of VMRUN, by the name it has in `harness.model.checks.KVM_CHECKS`.

NP_ENABLE is missing: that check depends on the host's own nested paging alone.
"""

OTHERS: Final[Mapping[str, Changes]] = {
    "rip": {"save.rip": layout.IDLE_L1},
    "rip not canonical": {"save.rip": 1 << 63},
    "rsp": {"save.rsp": 1 << 63},
    "rax": {"save.rax": 0x1234},
    "rflags": {"save.rflags": 1 << 17},
    "cr3 no memory": {"save.cr3": layout.NO_MEMORY_GPA},
    "cr0 no paging": {"save.cr0": layout.CR0_ON & ~Cr0.PG.mask},
    "efer no LME": {"save.efer": int(Efer.SVME.mask)},
    "efer LMA, no LME": {"save.efer": _EFER & ~Efer.LME.mask},
    "cs 32-bit": {"save.cs.attrib": int(SegAttrib.of(G=1, DB=1, P=1, S=1, TYPE=11))},
    "cpl 3": {"save.cpl": 3},
    "gdtr, idtr": {"save.gdtr.base": 1 << 63, "save.idtr.limit": 0},
    "clean bits": {"control.clean": int(Clean.of(SEG=1, DT=1, DR=1, CR=1)), "save.cs.limit": 1},
    "nested paging on": {"control.nested_ctl": _NPT},
    "nested paging off": {"control.nested_ctl": 0},
    "nested_cr3 no memory": {"control.nested_ctl": _NPT,
                             "control.nested_cr3": layout.NO_MEMORY_GPA},
    "nested_cr3 0": {"control.nested_ctl": _NPT, "control.nested_cr3": 0},
    "SHUTDOWN intercept": _intercepting(Intercept.INTERCEPT_SHUTDOWN),
    "IOIO intercept, map taken": {
        **_intercepting(Intercept.INTERCEPT_IOIO_PROT),
        "control.iopm_base_pa": layout.NO_MEMORY_GPA,
    },
    "MSR intercept, no map": {
        **_intercepting(Intercept.INTERCEPT_MSR_PROT),
        "control.msrpm_base_pa": layout.NO_MEMORY_GPA,
    },
    "SMI intercept": _intercepting(Intercept.INTERCEPT_SMI),
    "EVENTINJ #UD": {"control.event_inj": int(EventInj.of(VALID=1, TYPE=3, VEC=6))},
    "V_INTR_MASKING": {"control.int_ctl": int(IntCtl.of(V_INTR_MASKING=1))},
    "interrupt shadow": {"control.int_state": 1},
    "tsc_offset": {"control.tsc_offset": 1 << 40},
    "exit code": {"control.exit_code": 0x400},
}  # fmt: skip
"""What VMRUN takes: it must not matter, or not more than the save area lets it."""
