"""SMM: what an SMI does, also in L2, and RSM with its checks. APM vol. 2, 10.3 and 15.22.

Source: `enter_smm()`, `svm_enter_smm()`, `emulator_leave_smm()`, `svm_leave_smm()`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from harness.model import save_area
from harness.model.areas import SEGMENTS, VMCB, VMRUN_STATE
from harness.model.checks import control_violations, save_violations
from harness.model.crs import is_legal_cr0, is_legal_cr3, is_legal_cr4
from harness.model.efer import store_efer, write_msr_efer
from harness.model.errors import CannotKnow
from harness.model.leave import leave_nested
from harness.model.memory import UNKNOWN
from harness.model.state import State
from harness.model.vmexit import vmexit
from harness.model.vmrun import cached_control, enter_guest_mode, read_save
from harness.svm.exit_codes import ExitCode
from harness.svm.msrs import Cr0, Cr4, Efer
from harness.svm.smram import DEFAULT_SMBASE, SMM_ENTRY_OFFSET
from harness.svm.vmcb import SegAttrib

_LOW_HALF: Final = 0xFFFF_FFFF
_HIGH_HALF: Final = 0xFFFF_FFFF_0000_0000
_RFLAGS_FIXED: Final = 2
_DR6_FIXED: Final = 0xFFFF_0FF0
_DR6_VOLATILE: Final = 0xE00F
_PCID: Final = 0xFFF
_DR7_FIXED: Final = 0x400
_DR7_VOLATILE: Final = 0xFFFF_2BFF
_SEGMENT: Final = SegAttrib.of(G=1, P=1, S=1, TYPE=3)
_CS_SELECTOR: Final = DEFAULT_SMBASE >> 4

INTERNAL_ERROR: Final = "internal error"


# Entry


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


# RSM


def rsm(s: State) -> str | None:
    """Leave SMM; return how KVM_RUN ends, None if the guest goes on."""
    if not s.memory.is_present("smram"):
        raise CannotKnow("RSM, and the save area has no memory")
    if s.facts.lm != s.smram_is_64:
        raise CannotKnow("the save area in SMRAM has another form than RSM reads")
    image = save_area.read_64(s) if s.facts.lm else save_area.read_32(s)
    s.nested = replace(s.nested, smm=False)
    _go_to_real_mode(s)
    if not s.facts.lm:
        return None if _load_32(s, image) else _fail(s)
    if image["svm_guest_flag"] and not _back_to_l2(s, image):
        return _fail(s)
    if not _load_64(s, image):
        if s.knobs.rsm_failure_in_guest_mode == "leaves":
            leave_nested(s)
        return _fail(s)
    return None


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
    if s.knobs.smm_checks == "svme and vmcb12" and (
        save_violations(save, s.knobs, s.facts) or control_violations(control, s.knobs, s.facts)
    ):
        return False
    entered = enter_guest_mode(s, image["svm_guest_vmcb_gpa"], save, control["clean"], vmrun=False)
    s.run_pending = entered and s.knobs.rsm_sets_run_pending
    return entered


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
    s.regs["rip"] = image["rip"]
    s.regs["rflags"] = save_area.loaded_rflags(image["rflags"], s.knobs)
    if not _load_debug_registers(s, image["dr6"], image["dr7"]):
        return False
    s.smbase = image["smbase"]
    taken = write_msr_efer(s, image["efer"] & ~Efer.LMA.mask, host=False)
    if not taken and s.knobs.rsm_checks != "lenient":
        return False
    for name in ("gdtr", "idtr"):
        s.regs |= {f"{name}.{part}": image[f"{name}.{part}"] for part in ("base", "limit")}
    if not _load_control_registers(s, image["cr0"], image["cr3"], image["cr4"]):
        return False
    save_area.load_segments_64(s, image)
    if s.guest_mode and not s.knobs.intr_shadow_in_smram:
        return True
    if s.guest_mode:
        s.control["int_state"] = int(bool(image["int_shadow"]))
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
        cr0, cr4 = cr0 & _LOW_HALF, cr4 & _LOW_HALF
    pcide = Cr4(cr4).PCIDE
    if pcide and not s.facts.cr4_reserved & Cr4.PCIDE.mask:
        raise CannotKnow("RSM with CR4.PCIDE")
    if pcide:
        # It is set last, and refused then.
        cr3, cr4 = cr3 & ~_PCID, int(Cr4(cr4).replace(PCIDE=0))
    if UNKNOWN not in (cr3,) and not is_legal_cr3(cr3, s.facts):
        return False
    s.regs["cr3"] = cr3
    if not is_legal_cr4(cr4, s.facts) or (s.long_mode and not Cr4(cr4).PAE):
        return False
    s.regs["cr4"] = cr4
    if not is_legal_cr0(cr0):
        return False
    efer, paging = Efer(s.regs["efer"]), Cr0(cr0).PG
    if paging and efer.LME and not Cr4(cr4).PAE:
        return False
    s.regs["cr0"] = cr0 | Cr0.ET.mask
    s.regs["efer"] = int(efer.replace(LMA=int(bool(paging and efer.LME))))
    return not pcide


def _load_32(s: State, image: dict[str, int]) -> bool:
    """Load the registers; return False if RSM fails on the way. `rsm_load_state_32()`."""
    if Efer(s.regs["efer"]).LME:
        raise CannotKnow("RSM from a 32-bit save area, and the host has set EFER.LME")
    save_area.load_gprs_32(s, image)
    s.regs["rip"] = image["eip"]
    s.regs["rflags"] = image["eflags"] | _RFLAGS_FIXED
    _load_debug_registers(s, image["dr6"], image["dr7"])
    for name in ("gdtr", "idtr"):
        s.regs |= {f"{name}.{part}": image[f"{name}.{part}"] for part in ("base", "limit")}
    save_area.load_segments_32(s, image)
    s.smbase = image["smbase"]
    return _load_control_registers(s, image["cr0"], image["cr3"], image["cr4"])


def _fail(s: State) -> str | None:
    """RSM has failed: SMM is left, little else is as it should be."""
    if s.knobs.rsm_failure == "internal error":
        if s.guest_mode:
            raise CannotKnow("RSM failed in guest mode and queued a #UD for L2")
        s.over = "its RSM has failed"
        return INTERNAL_ERROR
    s.triple_fault = True
    return None
