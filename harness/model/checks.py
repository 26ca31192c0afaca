"""What a vmcb12 must be to be entered: KVM's checks, the manual's, and QEMU's, as data.

An area of the VMCB is a mapping of numbers by the names of `harness.svm.vmcb` without its prefix:
`asid`, `intercepts.4`, `cs.attrib`; a field that is left out is 0. What illegal state is, by the
manual: APM vol. 2, 15.5.1 Basic Operation (Canonicalization and Consistency Checks), 15.20 Event
Injection, 15.21.10 NMI Virtualization, 15.25.3 Enabling Nested Paging.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from harness.model.facts import CR4_RESERVED, CpuFacts
from harness.model.knobs import Knobs
from harness.svm.intercepts import Intercept
from harness.svm.msrs import Cr0, Cr4, Efer
from harness.svm.vmcb import IOPM_SIZE, MSRPM_SIZE, EventInj, IntCtl, NestedCtl, SegAttrib

Fields = Mapping[str, int]
Violated = Callable[[Fields, CpuFacts], bool]

CONTROL: Final = "control"
SAVE: Final = "save"

_PAGE = 0x1000
_HIGH_HALF = 0xFFFF_FFFF_0000_0000
RFLAGS_VM: Final = 1 << 17


@dataclass(frozen=True)
class Check:
    """One condition that VMRUN refuses."""

    name: str
    what: str
    source: str
    """The kernel's function, or the manual's section."""
    area: str
    violated: Violated
    knob: str | None = None
    """The bool of `Knobs` that decides whether a kernel has it; None: all have."""

    def applies(self, knobs: Knobs) -> bool:
        """Tell whether a kernel has it."""
        return self.knob is None or bool(getattr(knobs, self.knob))

    def __str__(self) -> str:
        return self.name


# Conditions


def intercepted(control: Fields, intercept: Intercept) -> bool:
    """Tell whether a control area intercepts something."""
    return bool(control.get(f"intercepts.{int(intercept.word)}", 0) & intercept.mask)


def long_mode_wanted(save: Fields) -> bool:
    """Tell whether EFER.LME and CR0.PG are both set: what the checks mean by long mode."""
    return bool(Efer(save.get("efer", 0)).LME and Cr0(save.get("cr0", 0)).PG)


def _beyond(address: int, facts: CpuFacts) -> bool:
    return bool(address >> facts.maxphyaddr)


def _np_enabled(control: Fields) -> bool:
    return bool(NestedCtl(control.get("nested_ctl", 0)).NP_ENABLE)


def _bitmap_beyond(address: int, size_bytes: int, facts: CpuFacts) -> bool:
    return _beyond((address & -_PAGE) + size_bytes - 1, facts)


def _efer_reserved(save: Fields, facts: CpuFacts) -> bool:
    allowed = Efer.of(
        SCE=1,
        SVME=facts.svm,
        LME=facts.lm,
        LMA=facts.lm,
        NX=facts.nx,
        FFXSR=facts.ffxsr,
        AUTOIBRS=facts.autoibrs,
        LMSLE=facts.lmsle,
    )
    return bool(save.get("efer", 0) & ~int(allowed))


def _cs_l_and_d(save: Fields) -> bool:
    attrib = SegAttrib(save.get("cs.attrib", 0))
    return bool(attrib.L and attrib.DB)


_INJECTABLE_TYPES = (0, 2, 3, 4)
_TYPE_EXEPT = 3
#: #DE to #BR, #UD to #DF, #TS to #PF, #MF to #XM, #HV, #SX: nested_svm_event_inj_valid_exept().
_EXCEPTIONS = frozenset((0, 1, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 14, 16, 17, 18, 19, 28, 30))
_BR, _CP, _VC = 5, 21, 29


def _event_type_reserved(control: Fields, facts: CpuFacts) -> bool:
    event = EventInj(control.get("event_inj", 0))
    return bool(event.VALID) and event.TYPE not in _INJECTABLE_TYPES


def injected_exception(control: Fields) -> int | None:
    """Return the vector of the exception that EVENTINJ holds, if it holds one."""
    event = EventInj(control.get("event_inj", 0))
    return event.VEC if event.VALID and event.TYPE == _TYPE_EXEPT else None


def _no_exception(control: Fields, facts: CpuFacts) -> bool:
    vector = injected_exception(control)
    if vector is None:
        return False
    offered = {_CP: facts.shstk, _VC: facts.sev_es}
    return not offered.get(vector, vector in _EXCEPTIONS)


def _v_nmi_without_intercept(control: Fields, facts: CpuFacts) -> bool:
    enabled = IntCtl(control.get("int_ctl", 0)).V_NMI_ENABLE
    return bool(enabled) and not intercepted(control, Intercept.INTERCEPT_NMI)


def _nested_cr3_beyond(control: Fields, facts: CpuFacts) -> bool:
    return _np_enabled(control) and _beyond(control.get("nested_cr3", 0), facts)


def _cd_0_nw_1(save: Fields, facts: CpuFacts) -> bool:
    cr0 = Cr0(save.get("cr0", 0))
    return bool(cr0.NW and not cr0.CD)


def _no_vmrun_intercept(control: Fields, facts: CpuFacts) -> bool:
    return not intercepted(control, Intercept.INTERCEPT_VMRUN)


def _pae_clear(save: Fields, facts: CpuFacts) -> bool:
    return long_mode_wanted(save) and not Cr4(save.get("cr4", 0)).PAE


def _pe_clear(save: Fields, facts: CpuFacts) -> bool:
    return long_mode_wanted(save) and not Cr0(save.get("cr0", 0)).PE


def _cs_illegal(save: Fields, facts: CpuFacts) -> bool:
    return long_mode_wanted(save) and _cs_l_and_d(save)


def _high(name: str) -> Violated:
    return lambda save, facts: bool(save.get(name, 0) & _HIGH_HALF)


_VALID_PAT_TYPES = (0, 1, 4, 5, 6, 7)


def pat_valid(pat: int) -> bool:
    """Tell whether all eight memory types of a PAT are defined ones (APM vol. 2, 7.8.1)."""
    return all(byte in _VALID_PAT_TYPES for byte in pat.to_bytes(8, "little"))


# What KVM checks

_CONTROLS = "nested_vmcb_check_controls()"
_SAVE = "nested_vmcb_check_save()"

KVM_CHECKS: Final[Sequence[Check]] = (
    Check("VMRUN intercept", "the VMRUN intercept is clear", _CONTROLS, CONTROL,
          _no_vmrun_intercept),
    Check("ASID", "ASID is 0", _CONTROLS, CONTROL, lambda c, _: not c.get("asid", 0)),
    Check("NP_ENABLE", "NP_ENABLE while L0 has no nested paging", _CONTROLS, CONTROL,
          lambda c, facts: _np_enabled(c) and not facts.npt_on_l0),
    Check("nCR3", "nCR3 is beyond MAXPHYADDR, with NP_ENABLE", _CONTROLS, CONTROL,
          _nested_cr3_beyond, "checks_nested_cr3"),
    Check("MSRPM", "the MSR permission map reaches beyond MAXPHYADDR",
          "nested_svm_check_bitmap_pa()", CONTROL,
          lambda c, facts: _bitmap_beyond(c.get("msrpm_base_pa", 0), MSRPM_SIZE, facts),
          "checks_bitmap_addresses"),
    Check("IOPM", "the I/O permission map reaches beyond MAXPHYADDR",
          "nested_svm_check_bitmap_pa()", CONTROL,
          lambda c, facts: _bitmap_beyond(c.get("iopm_base_pa", 0), IOPM_SIZE, facts),
          "checks_bitmap_addresses"),
    Check("V_NMI", "V_NMI_ENABLE without the NMI intercept", _CONTROLS, CONTROL,
          _v_nmi_without_intercept, "checks_v_nmi"),
    Check("EVENTINJ.TYPE", "EVENTINJ is of a reserved type", "nested_svm_check_event_inj()",
          CONTROL, _event_type_reserved, "checks_event_inj"),
    Check("EVENTINJ.VEC", "EVENTINJ is an exception of no exception's vector",
          "nested_svm_event_inj_valid_exept()", CONTROL, _no_exception, "checks_event_inj"),
    Check("EFER.SVME", "EFER.SVME is clear", _SAVE, SAVE,
          lambda s, _: not Efer(s.get("efer", 0)).SVME),
    Check("CR0.CD, CR0.NW", "CR0.CD is clear and CR0.NW set", _SAVE, SAVE, _cd_0_nw_1),
    Check("CR0[63:32]", "CR0[63:32] are not 0", _SAVE, SAVE, _high("cr0"), "checks_cr0_high"),
    Check("DR6[63:32]", "DR6[63:32] are not 0", "kvm_dr6_valid()", SAVE, _high("dr6")),
    Check("DR7[63:32]", "DR7[63:32] are not 0", "kvm_dr7_valid()", SAVE, _high("dr7")),
    Check("CR4.PAE", "EFER.LME and CR0.PG, and CR4.PAE is clear", _SAVE, SAVE, _pae_clear),
    Check("CR0.PE", "EFER.LME and CR0.PG, and CR0.PE is clear", _SAVE, SAVE, _pe_clear),
    Check("CR3", "EFER.LME and CR0.PG, and CR3 is beyond MAXPHYADDR", "kvm_vcpu_is_legal_cr3()",
          SAVE, lambda s, facts: long_mode_wanted(s) and _beyond(s.get("cr3", 0), facts)),
    Check("CS.L, CS.D", "EFER.LME and CR0.PG, and CS.L and CS.D", _SAVE, SAVE, _cs_illegal,
          "checks_cs_l_d"),
    Check("CR4", "CR4 has a bit that L1's CPUID does not offer", "__kvm_is_valid_cr4()", SAVE,
          lambda s, facts: bool(s.get("cr4", 0) & facts.cr4_reserved)),
    Check("EFER", "EFER has a bit that L1's CPUID does not offer", "kvm_valid_efer()", SAVE,
          _efer_reserved, "checks_efer_bits"),
)  # fmt: skip
"""In the kernel's order, within an area."""

_STATE = "svm_set_nested_state()"

_SET_STATE_PG = Check("CR0.PG of L1", "CR0.PG is clear", _STATE, SAVE,
                      lambda s, _: not Cr0(s.get("cr0", 0)).PG)  # fmt: skip
_SET_STATE_BASIC: Final = (
    _SET_STATE_PG,
    Check("EFER.SVME of L1", "EFER.SVME is clear", _STATE, SAVE,
          lambda s, _: not Efer(s.get("efer", 0)).SVME),
)  # fmt: skip
_SET_STATE_AS_VMRUN: Final = (
    _SET_STATE_PG,
    Check("CR0.PE of L1", "CR0.PE is clear", _STATE, SAVE,
          lambda s, _: not Cr0(s.get("cr0", 0)).PE),
    Check("RFLAGS.VM of L1", "RFLAGS.VM is set", _STATE, SAVE,
          lambda s, _: bool(s.get("rflags", 0) & RFLAGS_VM)),
)  # fmt: skip
_SET_STATE_LMA: Final = Check(
    "EFER.LMA of L1", "EFER.LMA is set and EFER.LME clear", _STATE, SAVE,
    lambda s, _: bool(Efer(s.get("efer", 0)).LMA and not Efer(s.get("efer", 0)).LME),
)  # fmt: skip

_LOAD_CR3 = "nested_svm_load_cr3()"
_LATE_CR3 = Check("CR3 at load", "CR3 is beyond MAXPHYADDR", _LOAD_CR3, SAVE,
                  lambda s, facts: _beyond(s.get("cr3", 0), facts))  # fmt: skip
_LATE_PDPTRS = Check("PDPTRs", "a PDPTE of PAE paging is reserved or unreadable", "load_pdptrs()",
                     SAVE, lambda s, _: _pae_paging(s))  # fmt: skip
_LATE_MSRPM = Check("MSRPM unreadable", "the MSR permission map has no memory",
                    "nested_svm_merge_msrpm()", CONTROL,
                    lambda c, _: intercepted(c, Intercept.INTERCEPT_MSR_PROT))  # fmt: skip

_PDPTE_RESERVED = 0x1E6


def _pae_paging(save: Fields) -> bool:
    """Tell whether KVM takes this for PAE paging: it goes by EFER.LMA, whatever LME is."""
    return bool(
        Cr0(save.get("cr0", 0)).PG
        and Cr4(save.get("cr4", 0)).PAE
        and not Efer(save.get("efer", 0)).LMA
    )


def _violated(checks: Iterable[Check], area: Fields, facts: CpuFacts) -> list[Check]:
    return [check for check in checks if check.violated(area, facts)]


def _of_kvm(area: str, knobs: Knobs) -> list[Check]:
    return [check for check in KVM_CHECKS if check.area == area and check.applies(knobs)]


def as_cached(control: Fields, knobs: Knobs, facts: CpuFacts) -> Fields:
    """Return the control area as the checks see it: without NP_ENABLE, where that is cleared."""
    if knobs.np_without_cpuid == "cleared" and not facts.npt:
        cleared = NestedCtl(control.get("nested_ctl", 0)).replace(NP_ENABLE=0)
        return {**control, "nested_ctl": int(cleared)}
    return control


def control_violations(control: Fields, knobs: Knobs, facts: CpuFacts) -> list[Check]:
    """Return what KVM finds wrong with a control area; none: it passes.

    VMRUN (of vmcb12), KVM_SET_NESTED_STATE (of what it is given) and, where it checks, RSM.
    """
    return _violated(_of_kvm(CONTROL, knobs), as_cached(control, knobs, facts), facts)


def save_violations(save: Fields, knobs: Knobs, facts: CpuFacts) -> list[Check]:
    """Return what KVM finds wrong with a save area before it touches anything; none: it passes."""
    return _violated(_of_kvm(SAVE, knobs), save, facts)


def set_state_violations(
    control: Fields, save: Fields, knobs: Knobs, facts: CpuFacts
) -> list[Check]:
    """Return what KVM_SET_NESTED_STATE finds wrong with a control area and L1's save area."""
    found = control_violations(control, knobs, facts)
    if knobs.set_state_checks_save == "cr0.PG and efer.SVME":
        return found + _violated(_SET_STATE_BASIC, save, facts)
    found += _violated(_SET_STATE_AS_VMRUN, save, facts) + save_violations(save, knobs, facts)
    if knobs.set_state_checks_save == "as VMRUN and LMA":
        found += _violated([_SET_STATE_LMA], save, facts)
    return found


def late_violations(
    save: Fields,
    control: Fields,
    knobs: Knobs,
    facts: CpuFacts,
    *,
    pdptes: Sequence[int] | None = None,
    msrpm_readable: bool = True,
) -> list[Check]:
    """Return what makes KVM leave L2 again that it has just entered; none: L2 runs.

    Args:
        save: the save area, which passes `save_violations`.
        control: the control area, which passes `control_violations`.
        knobs: of the kernel.
        facts: of L1's CPU.
        pdptes: the four entries where CR3 points, () if there is no memory; None: not looked at.
        msrpm_readable: there is memory for the whole MSR permission map.

    """
    if knobs.lma_without_lme == "cleared" and not Efer(save.get("efer", 0)).LME:
        save = {**save, "efer": int(Efer(save.get("efer", 0)).replace(LMA=0))}
    found = _violated([_LATE_CR3], save, facts)
    np = _np_enabled(as_cached(control, knobs, facts))
    if pdptes is not None and not np and not pdptes_legal(pdptes, facts):
        found += _violated([_LATE_PDPTRS], save, facts)
    if not msrpm_readable:
        found += _violated([_LATE_MSRPM], control, facts)
    return found


def pdptes_legal(pdptes: Sequence[int], facts: CpuFacts) -> bool:
    """Tell whether four entries can be PDPTEs of PAE paging (APM vol. 2, 5.2.3)."""
    return len(pdptes) == 4 and not any(
        entry & 1 and (entry & _PDPTE_RESERVED or _beyond(entry, facts)) for entry in pdptes
    )


# What the manual says, and what a CPU does with vmcb02

_15_5_1 = "APM vol. 2, 15.5.1"
_15_20 = "APM vol. 2, 15.20"
_15_25_3 = "APM vol. 2, 15.25.3"

#: CR3[63:52] and what is beyond MAXPHYADDR (APM vol. 2, 5.3.2); without long mode CR3 has 32 bits,
#: and what VMRUN does with the others the manual leaves open: they are counted as MBZ.
APM_CHECKS: Final[Sequence[Check]] = (
    Check("VMRUN intercept", "the VMRUN intercept is clear", _15_5_1, CONTROL,
          _no_vmrun_intercept),
    Check("ASID", "ASID is 0", _15_5_1, CONTROL, lambda c, _: not c.get("asid", 0)),
    Check("MSRPM", "the MSR permission map reaches beyond MAXPHYADDR", _15_5_1, CONTROL,
          lambda c, facts: _bitmap_beyond(c.get("msrpm_base_pa", 0), MSRPM_SIZE, facts)),
    Check("IOPM", "the I/O permission map reaches beyond MAXPHYADDR", _15_5_1, CONTROL,
          lambda c, facts: _bitmap_beyond(c.get("iopm_base_pa", 0), IOPM_SIZE, facts)),
    Check("NP_ENABLE", "NP_ENABLE on a CPU without nested paging", _15_25_3, CONTROL,
          lambda c, facts: _np_enabled(c) and not facts.npt),
    Check("nCR3", "nCR3 has MBZ bits, with NP_ENABLE", _15_25_3, CONTROL, _nested_cr3_beyond),
    Check("V_NMI", "V_NMI_ENABLE without the NMI intercept", "APM vol. 2, 15.21.10", CONTROL,
          _v_nmi_without_intercept),
    Check("EVENTINJ.TYPE", "EVENTINJ is of a reserved type", _15_20, CONTROL,
          _event_type_reserved),
    Check("EVENTINJ.VEC", "EVENTINJ is an exception of no exception's vector", _15_20, CONTROL,
          _no_exception),
    Check("EFER.SVME", "EFER.SVME is clear", _15_5_1, SAVE,
          lambda s, _: not Efer(s.get("efer", 0)).SVME),
    Check("CR0.CD, CR0.NW", "CR0.CD is clear and CR0.NW set", _15_5_1, SAVE, _cd_0_nw_1),
    Check("CR0[63:32]", "CR0[63:32] are not 0", _15_5_1, SAVE, _high("cr0")),
    Check("CR3", "CR3 has MBZ bits", _15_5_1, SAVE,
          lambda s, facts: _beyond(s.get("cr3", 0), facts)),
    Check("CR4", "CR4 has MBZ bits", _15_5_1, SAVE,
          lambda s, facts: bool(s.get("cr4", 0) & facts.cr4_reserved)),
    Check("DR6[63:32]", "DR6[63:32] are not 0", _15_5_1, SAVE, _high("dr6")),
    Check("DR7[63:32]", "DR7[63:32] are not 0", _15_5_1, SAVE, _high("dr7")),
    Check("EFER", "EFER has MBZ bits", _15_5_1, SAVE, _efer_reserved),
    Check("CR4.PAE", "EFER.LME and CR0.PG, and CR4.PAE is clear", _15_5_1, SAVE, _pae_clear),
    Check("CR0.PE", "EFER.LME and CR0.PG, and CR0.PE is clear", _15_5_1, SAVE, _pe_clear),
    Check("CS.L, CS.D", "EFER.LME, CR0.PG, CR4.PAE, CS.L and CS.D", _15_5_1, SAVE, _cs_illegal),
)  # fmt: skip
"""What a CPU as L1's CPUID describes it must refuse, each by itself."""

_BR_IN_64_BIT_MODE = Check(
    "EVENTINJ #BR", "EVENTINJ is #BR, which 64-bit mode does not have", _15_20, CONTROL,
    lambda c, _: injected_exception(c) == _BR,
)  # fmt: skip
_G_PAT = Check("G_PAT", "G_PAT has a reserved memory type, with NP_ENABLE", _15_25_3, SAVE,
               lambda s, _: not pat_valid(s.get("g_pat", 0)))  # fmt: skip


def apm_violations(control: Fields, save: Fields, facts: CpuFacts) -> list[Check]:
    """Return why a CPU, as the manual has it, refuses VMRUN of these areas."""
    found = _violated((c for c in APM_CHECKS if c.area == CONTROL), control, facts)
    found += _violated((c for c in APM_CHECKS if c.area == SAVE), save, facts)
    if long_mode_wanted(save) and SegAttrib(save.get("cs.attrib", 0)).L:
        found += _violated([_BR_IN_64_BIT_MODE], control, facts)
    if _np_enabled(control):
        found += _violated([_G_PAT], save, facts)
    return found


QEMU_7_2: Final = "QEMU 7.2"
SILICON: Final = "silicon"

_QEMU_EFER = Efer.of(SCE=1, LME=1, LMA=1, NX=1, SVME=1, FFXSR=1)
_QEMU_LAST_EXCEPTION = 30

#: helper_vmrun() and is_efer_invalid_state() in target/i386/tcg/sysemu/svm_helper.c.
QEMU_CHECKS: Final[Sequence[Check]] = (
    Check("EVENTINJ.TYPE", "EVENTINJ is of a reserved type", "helper_vmrun()", CONTROL,
          _event_type_reserved),
    Check("EVENTINJ.VEC", "EVENTINJ is exception 2, or 31 and up", "helper_vmrun()", CONTROL,
          lambda c, _: (vector := injected_exception(c)) is not None
          and (vector == 2 or vector > _QEMU_LAST_EXCEPTION)),
    Check("CR0[63:32]", "CR0[63:32] are not 0", "helper_vmrun()", SAVE, _high("cr0")),
    Check("CS.L, CS.D", "EFER.LME, CR0.PG, CR4.PAE, CS.L and CS.D", "is_efer_invalid_state()",
          SAVE, _cs_illegal),
    Check("EFER", "EFER has a bit that QEMU does not know", "MSR_EFER_RESERVED", SAVE,
          lambda s, _: bool(s.get("efer", 0) & ~int(_QEMU_EFER))),
)  # fmt: skip
"""What the emulated CPU refuses of a vmcb02 and KVM may have let through.

Of vmcb12 only EVENTINJ and the registers reach vmcb02, and of these KVM itself checks the others in
every version; ASID, intercepts, maps and nCR3 of vmcb02 are KVM's own. QEMU does not check G_PAT,
V_NMI or S_CET; of EFER it takes LMSLE for reserved.
"""

_REACH_VMCB02 = frozenset(
    ("EVENTINJ.TYPE", "EVENTINJ.VEC", "EFER", "CR0[63:32]", "CS.L, CS.D")
)  # fmt: skip


def cpu_violations(control: Fields, save: Fields, facts: CpuFacts, cpu: str) -> list[Check]:
    """Return why the CPU refuses the vmcb02 that KVM makes of a vmcb12 which KVM takes.

    KVM reflects that as #VMEXIT with VMEXIT_INVALID. `cpu` is QEMU_7_2 or SILICON; silicon is
    taken to be a CPU that has no more than L1's CPUID says.
    """
    if cpu == QEMU_7_2:
        checks: Iterable[Check] = QEMU_CHECKS
    else:
        checks = (check for check in APM_CHECKS if check.name in _REACH_VMCB02)
    return [c for c in checks if c.violated(control if c.area == CONTROL else save, facts)]


CR4_FEATURES: Final[Mapping[str, int]] = {
    "xsave": Cr4.OSXSAVE.mask,
    "smep": Cr4.SMEP.mask,
    "smap": Cr4.SMAP.mask,
    "fsgsbase": Cr4.FSGSBASE.mask,
    "pku": Cr4.PKE.mask,
    "la57": Cr4.LA57.mask,
    "umip": Cr4.UMIP.mask,
    "pcid": Cr4.PCIDE.mask,
    "shstk": Cr4.CET.mask,
}
"""Bits of CR4 by the CPUID feature that offers them: __cr4_reserved_bits()."""


def cr4_reserved(features: Iterable[str]) -> int:
    """Return the bits of CR4 that a guest with these features must not set."""
    reserved = CR4_RESERVED
    for feature in features:
        reserved &= ~CR4_FEATURES.get(feature, 0)
    return reserved
