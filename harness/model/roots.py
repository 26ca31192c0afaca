"""Whether vmcb01 still has the root of nested page tables by which L1 ran.

Without nested paging in L2 KVM serves L1, L2 and SMM by roots of one MMU, which differ by the
role's `guest_mode` and `smm`. Entering L2 loads another root (`nested_svm_load_cr3()`,
`kvm_mmu_new_pgd()`), into vmcb02; vmcb01 keeps that of what ran last outside of L2. #VMEXIT loads
L1's again; a forced leave (`svm_leave_nested()`) does not. Then L1 runs on what vmcb01 holds, while
KVM mends faults in the root that L2 had. L1 goes on where its root lives and maps what it needs
next; else its first fault is met again and again, for ever. A root of the TDP MMU lives until a
slot goes (`kvm_tdp_mmu_put_root()`, `kvm_mmu_zap_all_fast()`), whatever `kvm_mmu_reset_context()`
drops.
"""

from __future__ import annotations

from harness.model.state import State
from harness.svm.msrs import Efer
from harness.svm.vmcb import NestedCtl


def drop_roots(s: State) -> None:
    """Note that a slot went: all roots are new from now on."""
    s.l1_root = False


def note_entry(s: State) -> None:
    """Note that the guest is entered: in SMM vmcb01 has a root that maps its handler only."""
    if s.smm and not s.paging:
        s.l1_root = False


def note_execution(s: State) -> None:
    """Note that one of the layout's snippets is executed, and their page therefore mapped.

    In SMM too, if by KVM_SET_VCPU_EVENTS: what vmcb01 has by then maps the same memory.
    """
    if s.paging and not s.guest_mode:
        s.l1_root = True


def is_left_stale(s: State, efer: int) -> bool:
    """Tell whether L1 may fault for ever after L2 has written an EFER without SVME."""
    changed = Efer(efer ^ s.regs["efer"])
    if changed.LME or changed.NX:
        # set_efer(): KVM_MMU_EFER_ROLE_BITS. A root is loaded, and now for vmcb01.
        return False
    if not s.facts.npt_on_l0:
        # Roots of shadow paging do not live so long.
        return True
    # For L2 with nested paging KVM has another MMU, and L1's keeps its root.
    return not (s.l1_root or NestedCtl(s.control["nested_ctl"]).NP_ENABLE)
