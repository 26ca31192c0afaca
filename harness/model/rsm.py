"""RSM: back to what an SMI has interrupted, also to L2. APM vol. 2, 10.3 and 15.22.

Source: `emulator_leave_smm()`, `svm_leave_smm()`, `rsm_load_state_64()`, `rsm_load_state_32()`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from harness.model import save_area
from harness.model.areas import VMCB, VMRUN_STATE
from harness.model.checks import control_violations, pdptes_legal, save_violations
from harness.model.crs import is_legal_cr0, is_legal_cr3, is_legal_cr4
from harness.model.efer import write_msr_efer
from harness.model.errors import CannotKnow
from harness.model.leave import leave_nested
from harness.model.memory import UNKNOWN
from harness.model.state import State
from harness.model.vmrun import cached_control, enter_guest_mode, pdptes, read_save
from harness.svm.msrs import Cr0, Cr4, Efer
from harness.svm.vmcb import NestedCtl, SegAttrib

_LOW_HALF: Final = 0xFFFF_FFFF
_HIGH_HALF: Final = 0xFFFF_FFFF_0000_0000
_RFLAGS_FIXED: Final = 2
_DR6_FIXED: Final = 0xFFFF_0FF0
_DR6_VOLATILE: Final = 0xE00F
_CR0_KNOWN: Final = 0xE005_003F
"""All bits that there are; others are not loaded (CR0_RESERVED_BITS)."""
_RFLAGS_VM: Final = 1 << 17
_TABLE_LIMIT: Final = 0xFFFF
_PCID: Final = 0xFFF
_DR7_FIXED: Final = 0x400
_DR7_VOLATILE: Final = 0xFFFF_2BFF

INTERNAL_ERROR: Final = "internal error"
QUEUED_UD: Final = "queued #UD"
"""RSM has failed in guest mode and is an emulation that failed: L2 is to have #UD."""


def rsm(s: State) -> str | None:
    """Leave SMM; return how KVM_RUN ends, None if the guest goes on, or QUEUED_UD."""
    if not s.memory.is_present("smram"):
        raise CannotKnow("RSM, and the save area has no memory")
    if s.facts.lm != s.smram_is_64:
        raise CannotKnow("the save area in SMRAM has another form than RSM reads")
    image = save_area.read_64(s) if s.facts.lm else save_area.read_32(s)
    s.nested = replace(s.nested, smm=False)
    _go_to_real_mode(s)
    if not s.facts.lm:
        kept = _written_back(s)
        return _on(s, kept) if _load_32(s, image) else _fail(s, kept)
    if image["svm_guest_flag"] and not _back_to_l2(s, image):
        return _fail(s, _written_back(s))
    kept = _written_back(s)
    if not _load_64(s, image):
        if s.knobs.rsm_failure_in_guest_mode == "leaves":
            leave_nested(s)
        return _fail(s, kept)
    return _on(s, kept)


def _on(s: State, kept: dict[str, int]) -> str | None:
    """Go on where RSM has led, if the emulator finds a mode there."""
    if not (s.knobs.rsm_updates_mode and _is_no_mode(s)):
        return None
    if s.guest_mode:
        raise CannotKnow("the emulation of RSM has failed in L2")
    s.regs |= kept
    s.over = "the emulation of its RSM has failed"
    return INTERNAL_ERROR


def _written_back(s: State) -> dict[str, int]:
    """Return the registers that the emulator writes when it is through."""
    return {name: s.regs[name] for name in ("rax", "rbx", "rcx", "rdx", "rsp", "rip", "rflags")}


def _go_to_real_mode(s: State) -> None:
    cr0 = Cr0(s.regs["cr0"])
    s.regs["cr0"] = int(cr0.replace(PE=0, PG=0))
    s.regs["cr4"] &= ~(Cr4.PAE.mask | Cr4.PCIDE.mask)
    if s.facts.lm:
        s.regs["efer"] &= ~Efer.LMA.mask
        # Outside SMM again, so that this frees nested state if the handler has set SVME.
        write_msr_efer(s, 0, host=False)


def _back_to_l2(s: State, image: dict[str, int]) -> bool:
    """Go back into L2; return False if RSM fails. `svm_leave_smm()`."""
    if not _save_area_serves(s, image):
        return False
    gpa = image["svm_guest_vmcb_gpa"] & ~0xFFF
    if not s.memory.is_mapped(gpa):
        return False
    if s.knobs.l1_state_in_smm == "VM_HSAVE_PA" and not s.memory.is_mapped(s.hsave_msr):
        return False
    s.nested = replace(s.nested, allocated=True)
    _restore_l1(s)
    control = s.memory.read_fields(gpa, VMCB, "control.")
    save = read_save(s, image["svm_guest_vmcb_gpa"], control["clean"])
    if s.knobs.rsm_reads_control:
        s.control = cached_control(s, control)
        s.next_rip_given |= bool(s.control["next_rip"])
    if NestedCtl(s.control["nested_ctl"]).NP_ENABLE:
        _require_mode_of_l1(s)
    if s.knobs.smm_checks == "svme and vmcb12" and (
        save_violations(save, s.knobs, s.facts) or control_violations(control, s.knobs, s.facts)
    ):
        return False
    cr3 = s.regs["cr3"]
    entered = enter_guest_mode(s, image["svm_guest_vmcb_gpa"], save, control["clean"], vmrun=False)
    s.run_pending = entered and s.knobs.rsm_sets_run_pending
    if not entered:
        # CR3 is not loaded; RIP becomes the handler's where the emulator writes it back.
        rip = s.regs["rip"] if s.knobs.rsm_failure == "internal error" else UNKNOWN
        s.regs |= {"cr3": cr3, "rip": rip}
    return entered


def _require_mode_of_l1(s: State) -> None:
    """Nested tables are walked in L1's mode: there must be one (`kvm_calc_cpu_role()`).

    Raises CannotKnow: there is none.
    """
    if Efer(s.l1["efer"]).LMA and not Cr4(s.l1["cr4"]).PAE:
        raise CannotKnow("L1's state has EFER.LMA without CR4.PAE")


def _save_area_serves(s: State, image: dict[str, int]) -> bool:
    """Check what the save area says of L2, as strictly as the kernel does."""
    checks = s.knobs.smm_checks
    if checks == "lenient":
        return True
    if checks == "allocated":
        return s.allocated
    if not s.facts.svm:
        return False
    if checks == "nonzero efer":
        return bool(image["efer"])
    return bool(Efer(image["efer"]).SVME)


def _restore_l1(s: State) -> None:
    if s.knobs.l1_state_in_smm == "VM_HSAVE_PA":
        saved = s.memory.read_fields(s.hsave_msr & ~0xFFF, VMCB, "save.")
        s.l1 = {name: saved[name] for name in VMRUN_STATE}
        s.l1 |= {"rflags": saved["rflags"] | _RFLAGS_FIXED, "cpl": 0}
    elif not s.l1:
        raise CannotKnow("RSM into L2 when VMRUN never was: KVM's own controls are lost")


def _load_64(s: State, image: dict[str, int]) -> bool:
    """Load the registers; return False if RSM fails on the way. `rsm_load_state_64()`."""
    save_area.load_gprs_64(s, image)
    s.regs["rip"] = save_area.loaded_rip(image["rip"], s.knobs)
    s.regs["rflags"] = save_area.loaded_rflags(image["rflags"], s.knobs)
    if not _load_debug_registers(s, image["dr6"], image["dr7"]):
        return False
    s.smbase = image["smbase"]
    taken = write_msr_efer(s, image["efer"] & ~Efer.LMA.mask, host=False)
    if not taken and s.knobs.rsm_checks != "lenient":
        return False
    _load_tables(s, image)
    if not _load_control_registers(s, image["cr0"], image["cr3"], image["cr4"]):
        return False
    save_area.load_segments_64(s, image)
    if s.guest_mode and s.knobs.intr_shadow_in_smram:
        s.shadow_by_rsm = int(bool(image["int_shadow"]))
    elif s.knobs.intr_shadow_in_smram:
        s.l1_shadow = bool(image["int_shadow"])
    return True


def _load_debug_registers(s: State, dr6: int, dr7: int) -> bool:
    if s.knobs.rsm_checks == "strict with DR" and (dr6 | dr7) & _HIGH_HALF:
        return False
    dr6, dr7 = dr6 & _DR6_VOLATILE | _DR6_FIXED, dr7 & _DR7_VOLATILE | _DR7_FIXED
    s.regs |= {"dr6": dr6, "dr7": dr7, "arch_dr7": dr7}
    return True


def _load_control_registers(s: State, cr0: int, cr3: int, cr4: int) -> bool:
    """Load CR3, CR4 and CR0, in this order. `rsm_enter_protected_mode()`."""
    if s.knobs.rsm_cr_high == "ignored":
        # The current ones' high halves go on, as for MOV to CR (mk_cr_64()).
        cr0 = cr0 & _LOW_HALF | s.regs["cr0"] & _HIGH_HALF
        cr4 = cr4 & _LOW_HALF | s.regs["cr4"] & _HIGH_HALF
    pcide = Cr4(cr4).PCIDE
    if pcide and not s.facts.cr4_reserved & Cr4.PCIDE.mask:
        raise CannotKnow("RSM with CR4.PCIDE")
    if pcide:
        # It is set last, and refused then.
        cr3, cr4 = cr3 & ~_PCID, int(Cr4(cr4).replace(PCIDE=0))
    checked = s.knobs.rsm_cr3 == "checked" or s.long_mode
    if checked and cr3 != UNKNOWN and not is_legal_cr3(cr3, s.facts):
        return False
    s.regs["cr3"] = cr3
    if not _load_cr4(s, cr4) or not is_legal_cr0(cr0):
        return False
    return _load_cr0(s, cr0 & _CR0_KNOWN) and not pcide


def _load_cr4(s: State, cr4: int) -> bool:
    changed = Cr4(cr4 ^ s.regs["cr4"])
    if not is_legal_cr4(cr4, s.facts) or (s.long_mode and (not Cr4(cr4).PAE or changed.LA57)):
        return False
    s.regs["cr4"] = cr4
    return True


def _load_cr0(s: State, cr0: int) -> bool:
    """Load a legal CR0 (`kvm_set_cr0()`)."""
    efer, paging = Efer(s.regs["efer"]), Cr0(cr0).PG
    if paging and not s.paging:
        if efer.LME and not _may_enter_long_mode(s):
            return False
        if not efer.LME and Cr4(s.regs["cr4"]).PAE and not _pdptes_serve(s):
            return False
    if not paging and s.long_mode and _is_64_bit_code(s) and s.knobs.pg_in_64_bit_mode == "kept":
        return False
    s.regs["cr0"] = cr0 | Cr0.ET.mask
    s.regs["efer"] = int(efer.replace(LMA=int(bool(paging and efer.LME))))
    return True


def _load_tables(s: State, image: dict[str, int]) -> None:
    for name in ("gdtr", "idtr"):
        limit = image[f"{name}.limit"]
        s.regs[f"{name}.limit"] = limit if limit == UNKNOWN else limit & _TABLE_LIMIT
        s.regs[f"{name}.base"] = image[f"{name}.base"]


def _is_64_bit_code(s: State) -> bool:
    """Tell whether CS is that of 64-bit code; RSM puts a 32-bit one there outside guest mode."""
    return s.guest_mode and bool(SegAttrib(s.regs["cs.attrib"]).L)


def _may_enter_long_mode(s: State) -> bool:
    return bool(Cr4(s.regs["cr4"]).PAE) and not _is_64_bit_code(s)


def _pdptes_serve(s: State) -> bool:
    found = pdptes(s, s.regs["cr3"])
    if found is None:
        raise CannotKnow("PDPTEs where the model has no page tables")
    return pdptes_legal(found, s.facts)


def _is_no_mode(s: State) -> bool:
    """Tell whether the emulator finds no mode to go on in (`emulator_recalc_and_set_mode()`)."""
    if not Cr0(s.regs["cr0"]).PE:
        return s.long_mode
    if s.regs["rflags"] & _RFLAGS_VM:
        return s.long_mode
    return not SegAttrib(s.regs["cs.attrib"]).P


def _load_32(s: State, image: dict[str, int]) -> bool:
    """Load the registers; return False if RSM fails on the way. `rsm_load_state_32()`."""
    if Efer(s.regs["efer"]).LME:
        raise CannotKnow("RSM from a 32-bit save area, and the host has set EFER.LME")
    save_area.load_gprs_32(s, image)
    s.regs["rip"] = image["eip"]
    s.regs["rflags"] = image["eflags"] | _RFLAGS_FIXED
    _load_debug_registers(s, image["dr6"], image["dr7"])
    _load_tables(s, image)
    save_area.load_segments_32(s, image)
    s.smbase = image["smbase"]
    return _load_control_registers(s, image["cr0"], image["cr3"], image["cr4"])


def _fail(s: State, kept: dict[str, int]) -> str | None:
    """RSM has failed: SMM is left, little else is as it should be.

    `kept` is what an emulation that failed has not written back.
    """
    if s.knobs.rsm_failure == "internal error":
        s.regs |= kept
        if s.guest_mode:
            return QUEUED_UD
        s.regs |= kept
        s.over = "its RSM has failed"
        return INTERNAL_ERROR
    s.triple_fault = True
    return None
