"""SMM: what an SMI does, also in L2. APM vol. 2, 10.3 and 15.22; RSM is in `rsm`.

Source: `enter_smm()`, `svm_enter_smm()`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from harness.model import save_area
from harness.model.areas import SEGMENTS, VMCB, VMRUN_STATE
from harness.model.efer import store_efer
from harness.model.errors import CannotKnow
from harness.model.memory import UNKNOWN
from harness.model.state import State
from harness.model.vmexit import vmexit
from harness.svm.exit_codes import ExitCode
from harness.svm.msrs import Cr0, Cr4, Efer
from harness.svm.smram import DEFAULT_SMBASE, SMM_ENTRY_OFFSET
from harness.svm.vmcb import SegAttrib

_RFLAGS_FIXED: Final = 2
_DR7_FIXED: Final = 0x400
_SEGMENT: Final = SegAttrib.of(G=1, P=1, S=1, TYPE=3)
_CS_SELECTOR: Final = DEFAULT_SMBASE >> 4

QUEUED_UD: Final = "queued #UD"
"""RSM has failed in guest mode and is an emulation that failed: L2 is to have #UD."""


def enter_smm(s: State) -> None:
    """Take an SMI; afterwards the VM may be dead (`State.dead`)."""
    if s.smbase != DEFAULT_SMBASE:
        raise CannotKnow("SMBASE is moved")
    s.smi_pending = False
    was_l2 = s.guest_mode
    image = save_area.save_64(s) if s.facts.lm else save_area.save_32(s)
    if was_l2 and not _leave_l2(s, image):
        s.dead = True
        return
    s.nested = replace(s.nested, smm=True)
    if s.memory.is_present("smram"):
        save_area.write(s, image)
    elif s.knobs.enter_smm_failure == "vm dead":
        s.dead = True
        return
    _enter_real_mode(s)
    if s.facts.lm:
        store_efer(s, 0, running=True)
        if was_l2:
            s.gif = s.knobs.smi_in_l2_gif == "set"


def _leave_l2(s: State, image: dict[str, int]) -> bool:
    """End L2 by a #VMEXIT and keep L1's state; return False if that kills the VM."""
    strict = s.knobs.enter_smm_failure == "vm dead"
    if s.facts.lm:
        image |= {"svm_guest_flag": 1, "svm_guest_vmcb_gpa": s.vmcb12_gpa}
    elif strict:
        return False
    else:
        raise CannotKnow("an SMI in L2 with a 32-bit save area, which cannot tell of L2")
    if not vmexit(s, *_exit(s)):
        if strict:
            return False
        raise CannotKnow("vmcb12 has no memory, and SMM is entered in guest mode")
    return _save_l1(s) or not strict


def _exit(s: State) -> tuple[int, int, int]:
    if s.knobs.smi_in_l2_exit_code == "stale":
        return s.l2_exit_code, UNKNOWN, UNKNOWN
    return ExitCode.SVM_EXIT_SW, 0, 0


def _save_l1(s: State) -> bool:
    """Keep L1's state where SMM does not overwrite it; return False if that has no memory."""
    if s.knobs.l1_state_in_smm == "kernel":
        return True
    if not s.memory.is_mapped(s.hsave_msr):
        return False
    state = {f"save.{name}": s.l1[name] for name in VMRUN_STATE}
    state |= {"save.rflags": s.l1["rflags"] | _RFLAGS_FIXED, "save.cpl": 0}
    state["save.cr0"] = s.regs["cr0"] & ~(Cr0.CD.mask | Cr0.NW.mask)
    # What goes there is the hardware's CR4, and KVM lets no guest run without the host's MCE.
    state["save.cr4"] |= Cr4.MCE.mask if s.facts.mce_on_host else 0
    s.memory.write_fields(s.hsave_msr, VMCB, state)
    return True


def _enter_real_mode(s: State) -> None:
    regs = s.regs
    regs["cr0"] &= ~int(Cr0.of(PE=1, EM=1, TS=1, PG=1))
    regs |= {"cr4": 0, "rflags": _RFLAGS_FIXED, "rip": SMM_ENTRY_OFFSET, "cpl": 0}
    regs |= {"dr7": _DR7_FIXED, "arch_dr7": _DR7_FIXED}
    # The handler loads an IDT of its own.
    regs |= {"idtr.base": UNKNOWN, "idtr.limit": UNKNOWN}
    for name in SEGMENTS:
        regs |= {
            f"{name}.selector": _CS_SELECTOR if name == "cs" else 0,
            f"{name}.base": DEFAULT_SMBASE if name == "cs" else 0,
            f"{name}.limit": 0xFFFF_FFFF,
            f"{name}.attrib": int(_SEGMENT),
        }
    if not s.facts.lm:
        # Without paging there is no long mode (svm_set_cr0()).
        regs["efer"] &= ~Efer.LMA.mask
