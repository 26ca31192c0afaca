"""VMRUN: what KVM reads of vmcb12, checks and loads. APM vol. 2, 15.5 VMRUN Instruction.

Source: `nested_svm_vmrun()`, `enter_svm_guest_mode()`, `nested_vmcb02_prepare_save()`,
`__nested_copy_vmcb_control_to_cache()`.
"""

from __future__ import annotations

from typing import Final

from harness.model import layout
from harness.model.areas import CONTROL, CR, DR, DT, SEG, VMCB, VMRUN_STATE
from harness.model.checks import control_violations, late_violations, save_violations
from harness.model.crs import load_cr0
from harness.model.efer import store_efer
from harness.model.errors import CannotKnow
from harness.model.memory import UNKNOWN
from harness.model.state import State
from harness.model.vmexit import vmexit
from harness.svm.exit_codes import VMEXIT_INVALID
from harness.svm.intercepts import Intercept
from harness.svm.msrs import Efer
from harness.svm.vmcb import MSRPM_SIZE, Clean, EventInj, NestedCtl

_PAGE_MASK: Final = ~0xFFF
_RFLAGS_FIXED: Final = 0x2
_DR6_ACTIVE_LOW: Final = 0xFFFF_0FF0
_DR7_FIXED_1: Final = 0x400
_PDPT_MASK: Final = 0xFFFF_FFE0
_PRESENT_WRITE_USER: Final = 0x7
_EXIT_CODE_LOW: Final = 0xFFFF_FFFF
_EVENT_TYPES: Final = EventInj.VALID.mask | EventInj.VALID_ERR.mask | EventInj.TYPE.mask
_EVENT_KNOWN: Final = _EVENT_TYPES | EventInj.VEC.mask
_TLB_CONTROL: Final = 0x7
_SHADOW: Final = 0x1
_VECTOR: Final = 0xFF

NOT_CACHED: Final = frozenset(
    {
        *("avic_vapic_bar", "ghcb_gpa", "clean", "insn_len", "avic_backing_page"),
        *("avic_logical_id", "avic_physical_id", "vmsa_pa", "bus_lock_counter"),
        *("allowed_sev_features", "guest_sev_features"),
    }
)
"""Fields of vmcb12's control area that KVM does not take over; its copy has 0 there."""

_OFFERED: Final = (
    ("xsave", Intercept.INTERCEPT_XSETBV),
    ("invpcid", Intercept.INTERCEPT_INVPCID),
    ("rdtscp", Intercept.INTERCEPT_RDTSCP),
    ("skinit", Intercept.INTERCEPT_SKINIT),
    ("rdpru", Intercept.INTERCEPT_RDPRU),
)
"""Intercepts that are dropped where L1's CPUID lacks the instruction (`control_sanitised`)."""

_GROUPS: Final = ((SEG, Clean.SEG), (DT, Clean.DT), (DR, Clean.DR))
_CACHE_GROUPS: Final = (*_GROUPS, (CR, Clean.CR), (("cr2",), Clean.CR2))
_ALWAYS: Final = ("rflags", "rax", "rsp", "rip")


def cached_control(s: State, control: dict[str, int]) -> dict[str, int]:
    """Return what KVM's cache holds of a control area."""
    cached = {name: 0 if name in NOT_CACHED else control.get(name, 0) for name in CONTROL}
    if not s.knobs.next_rip_cached:
        cached["next_rip"] = 0
    cached["msrpm_base_pa"] &= _PAGE_MASK
    cached["iopm_base_pa"] &= _PAGE_MASK
    if s.knobs.np_without_cpuid == "cleared" and not s.facts.npt:
        cached["nested_ctl"] &= ~NestedCtl.NP_ENABLE.mask
    if s.knobs.control_sanitised:
        _sanitise(s, cached)
    return cached


def _sanitise(s: State, cached: dict[str, int]) -> None:
    cached["int_vector"] &= _VECTOR
    cached["int_state"] &= _SHADOW
    cached["event_inj"] &= _EVENT_KNOWN
    cached["tlb_ctl"] &= _TLB_CONTROL
    cached["nested_ctl"] &= ~NestedCtl.GMET.mask
    for feature, intercept in _OFFERED:
        if not getattr(s.facts, feature):
            cached[f"intercepts.{int(intercept.word)}"] &= ~intercept.mask


def msrpm_readable(s: State) -> bool:
    """Tell whether KVM can merge L1's MSR permission map; without MSR_PROT there is none."""
    if not s.l1_intercepts(Intercept.INTERCEPT_MSR_PROT):
        return True
    return s.memory.is_mapped(s.control["msrpm_base_pa"], MSRPM_SIZE)


def vmrun(s: State, gpa: int) -> bool:
    """Do VMRUN of a vmcb12 that is mapped; return whether L2 is what runs next.

    Its address may be that of no page: KVM maps the page, and remembers the address. RIP is behind
    VMRUN already.
    """
    page = gpa & _PAGE_MASK
    control = s.memory.read_fields(page, VMCB, "control.")
    save = read_save(s, gpa, control["clean"])
    if UNKNOWN in [save[name] for name in (*CR, *DR, "cs.attrib")]:
        raise CannotKnow("VMRUN of a vmcb12 that the CPU has left half-written")
    s.control = cached_control(s, control)
    if save_violations(save, s.knobs, s.facts) or control_violations(control, s.knobs, s.facts):
        _refuse(s, page)
        return False
    l1 = {name: s.regs[name] for name in VMRUN_STATE}
    s.l1 = s.l1 | l1 if s.knobs.l1_state == "hsave page" else l1 | {"cpl": 0}
    s.run_pending = True
    return enter_guest_mode(s, gpa, save, control["clean"])


def read_save(s: State, gpa: int, clean: int) -> dict[str, int]:
    """Return the save area that VMRUN goes by: vmcb12's, or series v1's cache of it."""
    save = s.memory.read_fields(gpa & _PAGE_MASK, VMCB, "save.")
    if s.knobs.clean_bits != "cache":
        return save
    loaded = dict(s.save_cache)
    for names, bit in _CACHE_GROUPS:
        if gpa != s.anchor or not clean & bit.mask:
            loaded |= {name: save[name] for name in names}
    s.save_cache = {**save, **loaded, **{name: save[name] for name in _ALWAYS}}
    return dict(s.save_cache)


def _refuse(s: State, page: int) -> None:
    """VMEXIT_INVALID at once: only the exit code and its information are written."""
    knobs = s.knobs
    wide = knobs.vmrun_refused_exit_code == "64 bits"
    written = {
        "control.exit_code": VMEXIT_INVALID if wide else _EXIT_CODE_LOW,
        "control.exit_info_1": 0,
        "control.exit_info_2": 0,
    }
    if knobs.event_inj_after_exit == "cleared":
        written |= {"control.event_inj": 0, "control.event_inj_err": 0}
    s.memory.write_fields(page, VMCB, written)
    if knobs.vmrun_refused_gif == "cleared":
        s.gif = False


def enter_guest_mode(
    s: State, gpa: int, save: dict[str, int], clean: int, *, vmrun: bool = True
) -> bool:
    """Enter L2 with a save area; return False if that fails late (CR3, MSR permission map).

    A VMRUN then ends with #VMEXIT; of an RSM the caller makes what it will.
    Source: `enter_svm_guest_mode()`.
    """
    if vmrun or s.knobs.l1_state == "vmcb01":
        s.l1_gif = s.gif
    s.vmcb12_gpa = gpa
    s.guest_mode = True
    s.l2_exit_code = UNKNOWN
    _load(s, gpa, save, clean)
    # After an RSM they are loaded with the MSR permission map, where that is put off.
    put_off = not vmrun and s.knobs.rsm_sets_run_pending
    found = None if put_off else pdptes(s, save["cr3"])
    failed = bool(late_violations(save, s.control, s.knobs, s.facts, pdptes=found))
    if not failed:
        s.gif = True
        s.pages_pending = not vmrun and s.knobs.rsm_sets_run_pending
    if vmrun and (failed or not msrpm_readable(s)):
        s.run_pending = False
        wide = s.knobs.vmrun_refused_exit_code == "64 bits"
        vmexit(s, VMEXIT_INVALID if wide else _EXIT_CODE_LOW)
        return False
    return not failed


def pdptes(s: State, cr3: int) -> tuple[int, ...] | None:
    """Return what KVM finds where CR3 points if L2 wants PAE paging; None: the model cannot say."""
    gpa = cr3 & _PDPT_MASK
    if not s.memory.is_mapped(gpa):
        return ()
    # The layout's tables are for four levels: the first entry has bits that are reserved here.
    return (layout.PDPT_GPA | _PRESENT_WRITE_USER, 0, 0, 0) if gpa == layout.PML4_GPA else None


def _load(s: State, gpa: int, save: dict[str, int], clean: int) -> None:
    fixed = s.knobs.vmrun_forces_fixed_bits
    # The hsave page's design has one VMCB, and leaves in it what clean groups would leave.
    kept = {**{name: s.regs[name] for name in (*SEG, *DT, *DR)}, **s.vmcb02}
    for names, bit in _GROUPS:
        if s.knobs.clean_bits != "vmcb02" or gpa != s.anchor or not clean & bit.mask:
            kept |= {name: save[name] for name in names}
            if fixed and bit is Clean.DR:
                kept["dr6"] |= _DR6_ACTIVE_LOW
                kept["dr7"] |= _DR7_FIXED_1
    if s.knobs.clean_bits != "ignored":
        s.anchor = gpa
    # Since EFER.SVME was checked to be set, loading EFER allocates and frees nothing.
    efer = Efer(save["efer"] | (Efer.SVME.mask if s.knobs.save_area == "uncached" else 0))
    if s.knobs.lma_without_lme == "cleared" and not efer.LME:
        efer = efer.replace(LMA=0)
    s.regs |= {name: kept[name] for name in (*SEG, *DT, *DR)}
    s.regs |= {name: save[name] for name in (*_ALWAYS, "cr3", "cr4", "cr2")}
    s.regs["rflags"] |= _RFLAGS_FIXED if fixed else 0
    store_efer(s, int(efer))
    load_cr0(s, save["cr0"])
