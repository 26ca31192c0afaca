"""Leaving guest mode by force: no #VMEXIT, vmcb12 is not written. Source: `svm_leave_nested()`."""

from __future__ import annotations

from harness.model.memory import UNKNOWN
from harness.model.roots import drop_roots
from harness.model.state import NO_GPA, State


def leave_nested(s: State) -> None:
    """Leave guest mode if the vCPU is in it; L1 goes on with what L2 had in its registers."""
    s.pages_pending = False
    if not s.guest_mode:
        return
    s.guest_mode = s.run_pending = False
    # Whoever works on the vCPU renews them, for L1 must not go on without its own.
    drop_roots(s)
    s.shadow_by_rsm = None
    if s.facts.vgif_on_l0:
        # V_GIF is the VMCB's, and that is L1's again.
        s.gif = s.l1_gif
    if s.knobs.l1_state == "vmcb01":
        s.vmcb12_gpa = NO_GPA
        _switch(s)
    if s.knobs.gif_on_svme_clear == "kept":
        # What clearing SVME no longer does, leaving does.
        s.gif = True


def _switch(s: State) -> None:
    """Go back to vmcb01: CR0 and CR3 there are L1's, KVM's own copies still L2's until it runs."""
    for name in ("cr0", "cr3"):
        if s.l1.get(name, s.regs[name]) != s.regs[name]:
            # Which of the two KVM_GET_SREGS gives depends on whether the MMU's root is loaded anew.
            s.after_run[name] = UNKNOWN
    s.switch_to_vmcb01()
