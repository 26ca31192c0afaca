"""What was measured on running kernels is what the model predicts for them.

One row a behaviour: operations, what is looked at, and what 5.10, 6.1, 6.12 and 7.3 gave.
"""

import pytest
from witnesses import (
    AGAIN,
    BEYOND,
    EFER_OFF,
    EFER_ON,
    GIF,
    GM,
    MSR_PROT,
    OFF,
    ON,
    RUN_PENDING,
    SMI_IN_L2,
    SVME,
    A,
    do,
    l2,
    vmrun,
    wrmsr,
)

from harness.model import layout
from harness.model.facts import CpuFacts
from harness.model.knobs import SETTINGS
from harness.model.model import Model
from harness.model.operations import (
    GetNestedState,
    Resume,
    SetCpuid,
    SetMsr,
    SetNestedState,
    SetSlot,
    SetSmm,
    SetSregs,
    Smi,
    WriteSaveArea,
    WriteVmcb,
)
from harness.svm.msrs import Cr4, Msr
from harness.svm.vmcb import Clean, IntCtl, NestedCtl

KERNELS = ("5.10", "6.1", "6.12", "7.3")
RESULT = "result"
SET_A = SetNestedState(GM | GIF, vmcb_pa=A)
ERR_32, ERR_64 = 0xFFFF_FFFF, 0xFFFF_FFFF_FFFF_FFFF


def refused(**changes):
    named = {name.replace("__", "."): value for name, value in changes.items()}
    return (*ON, SetNestedState(GM | GIF, vmcb_pa=A, changes=named))


ROWS = {
    "1 SVME set": ((EFER_ON,), "nested_bytes", (12288,) * 4),
    "1 SVME cleared": ((EFER_ON, EFER_OFF), "nested_bytes", (0,) * 4),
    "2 SREGS EFER.SVME without CPUID SVM": (
        (SetCpuid("svm", False), SetSregs({"efer": SVME})), RESULT, ("ok", "ok", "EINVAL", "EINVAL")
    ),
    "2 SET_MSRS does not look at CPUID": ((SetCpuid("svm", False), EFER_ON), RESULT, ("ok",) * 4),
    "2 WRMSR does": ((SetCpuid("svm", False), wrmsr(SVME)), RESULT, ("#GP",) * 4),
    "3 GIF after SET_NESTED(0), SVME=0": (
        (EFER_ON, SetNestedState(0), SetSregs({"efer": OFF})), "gif", (True, True, True, False)
    ),
    "4 SET_NESTED flags=0, SVME=0": (
        (SetNestedState(0),), RESULT, ("EINVAL", "EINVAL", "EINVAL", "ok")
    ),
    "5 RUN_PENDING": (
        (*ON, SetNestedState(GM | RUN_PENDING | GIF, vmcb_pa=A)), "run_pending",
        (False, True, True, True),
    ),
    "6 GIF=0 in guest mode": (
        (*ON, SetNestedState(GM, vmcb_pa=A)), "gif", (True, False, False, False)
    ),
    "7 L1's CR0.PE=0": (
        refused(save__cr0=int(layout.CR0_ON.replace(PE=0))), RESULT,
        ("ok", "EINVAL", "EINVAL", "EINVAL"),
    ),
    "7 L1's CR4 is garbage": (
        refused(save__cr4=1 << 40), RESULT, ("ok", "EINVAL", "EINVAL", "EINVAL")
    ),
    "8 nCR3 is illegal": (
        refused(control__nested_ctl=NestedCtl.NP_ENABLE.mask, control__nested_cr3=BEYOND), RESULT,
        ("ok", "EINVAL", "EINVAL", "EINVAL"),
    ),
    "8 MSRPM is illegal": (
        refused(control__msrpm_base_pa=BEYOND), RESULT, ("ok", "EINVAL", "EINVAL", "EINVAL")
    ),
    "9 V_NMI without NMI intercept": (
        refused(control__int_ctl=IntCtl.V_NMI_ENABLE.mask), RESULT, ("ok", "ok", "EINVAL", "EINVAL")
    ),
    "10 EVENTINJ of type 1": (
        refused(control__event_inj=1 << 31 | 1 << 8), RESULT, ("ok", "ok", "ok", "EINVAL")
    ),
    "11 GET with a small buffer": ((*l2(), GetNestedState(128)), RESULT, ("E2BIG",) * 4),
    "11 and its size": ((*l2(), GetNestedState(128)), "get.size", (4224,) * 4),
    "12 retained by the SMM flag": (
        (EFER_ON, SetSmm(True), SetSregs({"efer": OFF}), SetSmm(False)), "nested_bytes",
        (12288,) * 4,
    ),
    "13 MSRPM cannot be read, once": (
        (*ON, SetSlot("msrpm", False), SetNestedState(GM | GIF, vmcb_pa=A, changes=MSR_PROT),
         Resume()), RESULT, ("internal error",) * 4,
    ),
    "13 and again": (
        (*ON, SetSlot("msrpm", False), SetNestedState(GM | GIF, vmcb_pa=A, changes=MSR_PROT),
         Resume(), Resume()), RESULT, ("report", "report", "internal error", "internal error"),
    ),
    "14 refused VMRUN": (l2(control__asid=0), "vmcb_a.control.exit_code", (ERR_64,) * 4),
    "14 late failure": (
        (*ON, SetSlot("msrpm", False), WriteVmcb("a", MSR_PROT), vmrun()),
        "vmcb_a.control.exit_code", (ERR_64,) * 4,
    ),
    "14 and GIF": (
        (*ON, SetSlot("msrpm", False), WriteVmcb("a", MSR_PROT), vmrun()), "gif", (False,) * 4
    ),
    "15 VM_HSAVE_PA=0": ((EFER_ON, vmrun()), RESULT, ("report", "#GP", "#GP", "#GP")),
    "16 no memory": (
        (*ON, vmrun(layout.NO_MEMORY_GPA)), RESULT, ("#GP", "#GP", "#GP", "internal error")
    ),
    "16 unaligned": ((*ON, vmrun(A + 8)), RESULT, ("#GP",) * 4),
    "17 clean DT": (
        (*l2(), do("VMMCALL"),
         WriteVmcb("a", {"save.gdtr.limit": 0x7F, "control.clean": Clean.DT.mask}), *AGAIN,
         do("VMMCALL")), "vmcb_a.save.gdtr.limit", (0x7F, 0x3F, 0x3F, 0x3F),
    ),
    "17 after SVME 1, 0, 1": (
        (*l2(), do("VMMCALL"), EFER_OFF, EFER_ON,
         WriteVmcb("a", {"save.gdtr.limit": 0x7F, "control.clean": Clean.DT.mask}), *AGAIN,
         do("VMMCALL")), "vmcb_a.save.gdtr.limit", (0x7F,) * 4,
    ),
    "19 SMI in L2": (
        (*l2(), *SMI_IN_L2), "vmcb_a.control.exit_code", (0x7B, *(0xF000_0000,) * 3)
    ),
    "20 the host save page": (
        (*l2(), *SMI_IN_L2), "hsave.save.rip",
        (0, *(layout.snippet_gpa(vmrun().instruction) + 3,) * 3),
    ),
    "21 GIF in SMM": ((*l2(), *SMI_IN_L2), "gif", (True, True, True, False)),
    "23 forged SMRAM": (
        (*l2(), *SMI_IN_L2, WriteSaveArea({"efer": OFF}), do("RSM")), RESULT,
        ("internal error", "shutdown", "shutdown", "shutdown"),
    ),
    "24 vmcb12 made invalid in SMM": (
        (*l2(), *SMI_IN_L2, WriteVmcb("a", {"control.asid": 0}), do("RSM")), RESULT,
        ("report", "report", "shutdown", "shutdown"),
    ),
    "25 SMRAM is not there": (
        (SetSlot("smram", False), Smi(), Resume()), RESULT,
        ("unknown", "unknown", "run: EIO", "run: EIO"),
    ),
    "25 and then": (
        (SetSlot("smram", False), Smi(), Resume(), GetNestedState()), RESULT,
        ("unknown", "unknown", "EIO", "EIO"),
    ),
    "27 DR6 in SMRAM": (
        (*SMI_IN_L2, WriteSaveArea({"dr6": 1 << 40}), do("RSM")), RESULT,
        ("report", "shutdown", "shutdown", "shutdown"),
    ),
    "28 L2 clears SVME": (
        (*l2(), wrmsr(OFF)), "nested_bytes", (None, 0, 0, 0)
    ),
    "29 vmcb12 deleted": (
        (*l2(), SetSlot("vmcb_a", False), do("VMMCALL")), RESULT, ("#GP", "#GP", "#GP", "shutdown")
    ),
    "29 guest mode": (
        (*l2(), SetSlot("vmcb_a", False), do("VMMCALL")), "guest_mode", (True, True, True, False)
    ),
    "7.5 back in L2, EFER is SMRAM's": ((*l2(), *SMI_IN_L2, do("RSM")), "efer", (SVME,) * 4),
    "7.5 and L1 returns": (
        (*l2(), *SMI_IN_L2, do("RSM"), do("VMMCALL")), "guest_mode", (False,) * 4
    ),
    "7.3 CR4.MCE comes from the host": (
        (*l2(), *SMI_IN_L2, do("RSM"), do("VMMCALL")), "cr4",
        (layout.CR4_ON, *(layout.CR4_ON | Cr4.MCE.mask,) * 3),
    ),
    "2.2 VM_HSAVE_PA": (
        (SetMsr(Msr.MSR_VM_HSAVE_PA, A + 5), do("RDMSR", rcx=Msr.MSR_VM_HSAVE_PA)), "rax", (A,) * 4
    ),
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_the_model_predicts_what_was_measured(row):
    operations, name, wanted = ROWS[row]
    got = []
    for kernel in KERNELS:
        model = Model(SETTINGS[kernel], CpuFacts())
        outcome = [model.apply(each) for each in operations][-1]
        got.append(outcome.result if name == RESULT else outcome.seen.get(name))
    assert dict(zip(KERNELS, got, strict=True)) == dict(zip(KERNELS, wanted, strict=True))
