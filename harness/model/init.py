"""INIT: the vCPU starts anew, also from L2. APM vol. 2, 14.1.3 Processor Initialization State.

Source: `kvm_apic_accept_events()`, `kvm_vcpu_reset()`.
"""

from __future__ import annotations

from typing import Final

from harness.model import layout
from harness.model.efer import store_efer
from harness.model.errors import CannotKnow
from harness.model.leave import leave_nested
from harness.model.memory import UNKNOWN
from harness.model.state import State
from harness.svm.intercepts import Intercept
from harness.svm.vmcb import NestedCtl

_RESET_RIP: Final = 0xFFF0
_CLEARED: Final = ("rax", "rbx", "rcx", "rsp", "cr2", "cr4", "cpl")


def takes_init(s: State) -> bool:
    """Tell whether a pending INIT is taken before the guest is entered.

    Raises CannotKnow: that depends on what the model does not hold.
    """
    if not s.init_pending or not s.gif or s.smm:
        return False
    if s.smi_pending or s.run_pending:
        raise CannotKnow("INIT, and something else that waits for the entry")
    if s.guest_mode and s.l1_intercepts(Intercept.INTERCEPT_INIT):
        raise CannotKnow("L1 intercepts INIT in L2")
    return True


def take_init(s: State) -> str:
    """Reset the vCPU and run it; return how KVM_RUN ends."""
    nested_paging = s.guest_mode and NestedCtl(s.control["nested_ctl"]).NP_ENABLE
    by_l2 = bool(nested_paging) and not s.knobs.reset_leaves_nested
    if s.knobs.reset_leaves_nested:
        leave_nested(s)
    # What KVM otherwise forgets with the flag (`hflags`) is that it was in guest mode.
    s.guest_mode = s.run_pending = s.pages_pending = s.init_pending = False
    store_efer(s, 0)
    s.gif = True
    s.after_run = {}
    s.regs |= dict.fromkeys(_CLEARED, 0) | {"rip": _RESET_RIP, "rdx": UNKNOWN}
    # 5.10 sets CR0.CD and CR0.NW and leaves CR3; later ones have it as the manual has.
    s.regs |= dict.fromkeys(("cr0", "cr3"), UNKNOWN)
    s.over = "INIT has reset it"
    if not by_l2:
        return "internal error"
    # Only by L1's nested page tables, which were L2's, is there memory at the reset vector.
    s.regs["rip"] += layout.REPORT_BYTES
    return "report"
