"""EFER: every way to write it, and what EFER.SVME does to nested state."""

from __future__ import annotations

from harness.model.allocation import set_svme
from harness.model.leave import leave_nested
from harness.model.state import NO_GPA, State
from harness.svm.msrs import Efer


def store_efer(s: State, efer: int, *, running: bool = False) -> None:
    """Write EFER as KVM itself does; nothing is checked here.

    Args:
        s: the vCPU.
        efer: the new value.
        running: within KVM_RUN, not by an ioctl.

    Source: `svm_set_efer()`.

    """
    svme = bool(Efer(efer).SVME)
    if svme != s.svme:
        s.recalc_pending = True
        _switch_svme(s, svme, running)
    elif not svme and s.knobs.efer_unchanged == "leave":
        leave_nested(s)
        s.gif = True
    s.regs["efer"] = efer


def _switch_svme(s: State, svme: bool, running: bool) -> None:
    nested, _ = set_svme(s.nested, svme)
    if not svme:
        if s.guest_mode and running and s.knobs.svme_clear_in_l2 == "shutdown":
            s.triple_fault = True
        leave_nested(s)
        if s.knobs.gif_on_svme_clear == "set":
            s.gif = True
    s.nested = nested
    if not nested.allocated:
        s.anchor = NO_GPA
        s.vmcb02, s.l1, s.save_cache = {}, {}, {}


def write_msr_efer(s: State, efer: int, *, host: bool) -> bool:
    """Write MSR_EFER; return False if it is refused (#GP, or nothing of KVM_SET_MSRS done).

    Source: `set_efer()`. A host's write is not checked against the guest's CPUID.
    """
    if not s.facts.host_takes_efer(efer):
        return False
    if not host:
        if not s.facts.guest_may_have_efer(efer):
            return False
        if s.paging and Efer(efer).LME != Efer(s.regs["efer"]).LME:
            return False
    # LMA is the CPU's own.
    store_efer(s, Efer(efer).replace(LMA=Efer(s.regs["efer"]).LMA), running=not host)
    return True
