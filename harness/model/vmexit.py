"""#VMEXIT to L1: what is written back to vmcb12, and how L1 goes on. APM vol. 2, 15.6 #VMEXIT.

Source: `nested_svm_vmexit()`, `nested_svm_vmexit_update_vmcb12()`.
"""

from __future__ import annotations

from typing import Final

from harness.model.areas import CR, DR, DT, SEG, VMCB, VMRUN_STATE
from harness.model.crs import is_legal_cr3, load_cr0
from harness.model.errors import CannotKnow
from harness.model.memory import UNKNOWN
from harness.model.state import State
from harness.svm.exit_codes import VMEXIT_INVALID
from harness.svm.msrs import Cr0, Cr4, Efer
from harness.svm.vmcb import NestedCtl

_WRITTEN: Final = (*SEG, *DT, *CR, *DR, "cr2", "rflags", "rip", "rsp", "rax")
_DR7_FIXED_1: Final = 0x400
_EXIT_CODE_LOW: Final = 0xFFFF_FFFF


def vmexit(s: State, exit_code: int, info_1: int = 0, info_2: int = 0) -> bool:
    """End L2; return False if vmcb12 has no memory and the kernel therefore stays in L2."""
    page = s.vmcb12_gpa & ~0xFFF
    mapped = s.memory.is_mapped(page)
    if not mapped and s.knobs.vmexit_unmappable == "stays in L2":
        return False
    if mapped:
        _write_back(s, page, exit_code, info_1, info_2)
    else:
        s.triple_fault = True
    _restore_l1(s)
    return True


def _write_back(s: State, page: int, exit_code: int, info_1: int, info_2: int) -> None:
    if NestedCtl(s.control["nested_ctl"]).NP_ENABLE:
        # What an exit does not define is that of the #NPF that KVM last served.
        info_1 = info_2 = UNKNOWN
    written = {f"save.{name}": s.regs[name] for name in _WRITTEN}
    written |= {
        "control.exit_code": exit_code,
        "control.exit_info_1": info_1,
        "control.exit_info_2": info_2,
        "control.int_state": s.l2_int_state,
        "control.int_ctl": s.control["int_ctl"],
    }
    if exit_code not in (VMEXIT_INVALID, _EXIT_CODE_LOW):
        # Nothing is ever in the middle of being injected here.
        written["control.exit_int_info"] = 0
    s.memory.write_fields(page, VMCB, written | _by_knobs(s))
    if s.knobs.clean_bits == "cache":
        s.save_cache = s.memory.read_fields(page, VMCB, "save.")


def _by_knobs(s: State) -> dict[str, int]:
    knobs, written = s.knobs, {}
    if s.facts.nrips:
        written["control.next_rip"] = s.control["next_rip"]
    for name in ("event_inj", "event_inj_err"):
        cleared = knobs.event_inj_after_exit == "cleared"
        written[f"control.{name}"] = 0 if cleared else s.control[name]
    if knobs.tlb_ctl_after_exit == "written":
        written["control.tlb_ctl"] = s.control["tlb_ctl"]
    if knobs.pause_filter_after_exit == "written":
        for name in ("pause_filter_count", "pause_filter_thresh"):
            written[f"control.{name}"] = s.control[name]
    return written


def _restore_l1(s: State) -> None:
    if not Efer(s.l1["efer"]).SVME:
        raise CannotKnow("L1's state has EFER.SVME clear: nested state goes under KVM's feet")
    if Efer(s.l1["efer"]).LMA and not Cr4(s.l1["cr4"]).PAE:
        raise CannotKnow("L1's state has EFER.LMA without CR4.PAE: KVM's MMU has no such mode")
    cr3 = s.l1["cr3"]
    if cr3 != UNKNOWN and not is_legal_cr3(cr3, s.facts):
        if s.knobs.l1_state != "vmcb01":
            raise CannotKnow("L1's state has an illegal CR3")
        # nested_svm_load_cr3() loads nothing: L2's stays until the shutdown comes.
        cr3, s.triple_fault = s.regs["cr3"], True
    s.keep_vmcb02()
    s.guest_mode = s.run_pending = s.pages_pending = False
    s.shadow_by_rsm = None
    s.vmcb12_gpa = 0
    s.gif = False
    s.control["nested_cr3"] = 0
    s.regs |= {name: s.l1[name] for name in VMRUN_STATE if name != "cr0"}
    s.regs["cr3"] = cr3
    load_cr0(s, s.l1["cr0"] | Cr0.PE.mask)
    # The hsave page's design clears the one VMCB's, and not what KVM remembers of it.
    s.regs["dr7"] = 0
    if s.knobs.l1_state == "vmcb01":
        s.regs |= {"dr7": _DR7_FIXED_1, "arch_dr7": _DR7_FIXED_1}
    s.regs["cpl"] = 0
