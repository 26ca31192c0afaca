"""What ends hosts or vCPUs whatever comes next, and how a bench keeps off.

The root (seen on 6.1 and 7.3). Entering guest mode makes KVM load the root of the nested page
tables anew (`nested_svm_load_cr3()`), for vmcb02. A #VMEXIT does the same for vmcb01; a forced
leave (`svm_leave_nested()`) does not. Then vmcb01 has a root that is the vCPU's no more: L1's first
page walk ends in #NPF with RSVD set, for which KVM finds nothing to mend, and that for ever. Taking
any memory slot away makes KVM load new roots.

The hsave page (5.10). While an SMI that interrupted L2 is handled, EFER.SVME set in SMM and cleared
by RSM frees it; RSM then takes a new one, which is zero. L0's own intercepts were in it
(`recalc_intercepts()`): L2 goes on without them, and takes the host's interrupts.

INIT in L2 (5.10). `kvm_vcpu_reset()` leaves the vCPU with the MMU of L2's nested paging, and frees
the hsave page. A page that L1's nested tables have not got is then a #VMEXIT (#NPF) from what is no
guest mode: `nested_svm_vmexit()` reads the page at address 0, and the host's kernel is gone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from harness.model import layout
from harness.model.operations import (
    Execute,
    Instruction,
    Operation,
    Outcome,
    Resume,
    StepRsm,
    Value,
)
from harness.svm.msrs import Cr0, Cr4, Efer, Msr
from harness.svm.vmcb import NestedCtl

STALE_ROOT: Final = "stale-root"
NOT_DONE: Final = "not-done"
HAZARDS: Final[Mapping[str, str]] = {
    STALE_ROOT: "forced leave of guest mode: roots renewed",
    NOT_DONE: "what would end the host (5.10: EFER.SVME in SMM above L2, then RSM; INIT in L2 with"
    " nested tables other than the layout's; EFER.LME in real mode; modes that no CPU has): not"
    " done",
}
"""What is kept off, and how."""


def drops_hsave(operation: Operation, seen: Mapping[str, Value]) -> bool:
    """Tell whether an operation would make 5.10 run L2 on an empty hsave page."""
    efer = seen.get("efer")
    return (
        isinstance(operation, Execute | StepRsm)
        and getattr(operation, "instruction", Instruction.RSM) is Instruction.RSM
        and bool(seen.get("smm"))
        and bool(seen.get("smram.svm_guest_flag"))
        and isinstance(efer, int)
        and bool(Efer(efer).SVME)
    )


def resets_under_l2(operation: Operation, seen: Mapping[str, Value]) -> bool:
    """Tell whether an operation would make 5.10 take INIT in L2, and miss the hsave page."""
    control = seen.get("nested.control.nested_ctl")
    return (
        isinstance(operation, Execute | Resume)
        and bool(seen.get("init_pending"))
        and isinstance(control, int)
        and bool(NestedCtl(control).NP_ENABLE)
        and seen.get("nested.control.nested_cr3") != layout.NESTED_PML4_GPA
    )


def is_odd_mode(seen: Mapping[str, Value]) -> bool:
    """Tell whether a vCPU is where only forged state leads: there the emulated silicon has hung."""
    cr0, cr4, efer = (seen.get(name) for name in ("cr0", "cr4", "efer"))
    if not (isinstance(cr0, int) and isinstance(cr4, int) and isinstance(efer, int)):
        return False
    paging, long_mode = Cr0(cr0).PG, Efer(efer).LME
    if not Cr0(cr0).PE:
        return bool(paging or long_mode) or not seen.get("smm")
    active = bool(paging and long_mode)
    return bool(Efer(efer).LMA) is not active or (active and not Cr4(cr4).PAE)


def sets_lme_in_real_mode(operation: Operation, seen: Mapping[str, Value]) -> bool:
    """Tell whether an operation has hung QEMU 7.2: a write of EFER.LME with CR0.PE=0, in SMM."""
    cr0 = seen.get("cr0")
    return (
        isinstance(cr0, int)
        and not Cr0(cr0).PE
        and isinstance(operation, Execute)
        and operation.instruction is Instruction.WRMSR
        and operation.rcx == Msr.MSR_EFER
        and bool(Efer(operation.rax).LME)
    )


class Roots:
    """Follows one vCPU: whether it left guest mode by force."""

    def __init__(self) -> None:
        self._guest_mode = False

    def is_stale_after(self, operation: Operation, outcome: Outcome) -> bool:
        """Take note of a step; tell whether vmcb01 has a root that is the vCPU's no more."""
        was, self._guest_mode = self._guest_mode, bool(outcome.seen.get("guest_mode"))
        if not was or self._guest_mode:
            return False
        # An instruction ends L2 by a #VMEXIT, unless it was WRMSR and took EFER.SVME away.
        efer = outcome.seen.get("efer")
        by_l2 = isinstance(efer, int) and not Efer(efer).SVME and not outcome.seen.get("smm")
        return by_l2 if isinstance(operation, Execute | Resume) else True
