"""The architecture's own answers to the questions that the knobs ask, where it has one.

A report of a difference can then say which of the two has left the manual. What a knob asks about
KVM's own interface (KVM_SET_NESTED_STATE, memory, migration) the manual cannot answer; where it
calls a thing undefined, or allows several, every value is within it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from harness.model.knobs import KNOBS, Knob, Knobs


@dataclass(frozen=True)
class Answer:
    """What the manual says where a knob decides."""

    values: tuple[Any, ...]
    """The values of the knob that are within the manual."""
    section: str
    says: str


def _is(value: object, section: str, says: str) -> Answer:
    return Answer((value,), section, says)


_VMRUN: Final = "APM vol. 2, 15.5.1 Basic Operation (Canonicalization and Consistency Checks)"
_VMEXIT: Final = "APM vol. 2, 15.6 #VMEXIT"
_GIF: Final = "APM vol. 2, 15.17 Global Interrupt Flag, STGI and CLGI Instructions"
_SMM: Final = "APM vol. 2, 15.22 Response to SMI"
_SMRAM: Final = "APM vol. 2, 10.2.3 SMRAM State-Save Area"
_HSAVE: Final = "APM vol. 2, 15.30 SVM Related MSRs (VM_HSAVE_PA)"

ANSWERS: Final[Mapping[str, Answer]] = {
    "gif_on_svme_clear": _is("kept", _GIF, "only STGI, CLGI, VMRUN and #VMEXIT change GIF"),
    "svme_clear_in_l2": Answer(
        ("back to L1", "shutdown"), "APM vol. 2, 15.4 Enabling SVM",
        "to turn off EFER.SVME while a guest runs is undefined",
    ),
    "stgi_without_svme": _is("#UD", _GIF, "STGI and CLGI need EFER.SVME"),
    "vmmcall_in_l2": _is(
        "#UD", "APM vol. 3, VMMCALL", "VMMCALL that is not intercepted raises #UD"
    ),
    "save_area": Answer(
        ("cached page", "checked fields", "all fields"), _VMRUN,
        "what is checked is what is loaded; in between the VMCB must not change",
    ),
    "clean_bits": Answer(
        ("ignored", "cache", "vmcb02"), "APM vol. 2, 15.15 VMCB State Caching",
        "a clean field may be loaded all the same",
    ),
    "lma_without_lme": _is("cleared", _VMRUN, "EFER.LMA means nothing while LME is 0"),
    "vmrun_needs_hsave": _is(True, _HSAVE, "VMRUN while VM_HSAVE_PA is 0 raises #GP"),
    "vmrun_checks_rax": _is(
        True, "APM vol. 3, VMRUN", "rAX that is not of a page, or too high, raises #GP"
    ),
    "vmrun_refused_gif": _is("cleared", _VMEXIT, "VMEXIT_INVALID is a #VMEXIT: it clears GIF"),
    "vmrun_refused_exit_code": _is(
        "64 bits", "APM vol. 2, appendix C SVM Intercept Exit Codes", "VMEXIT_INVALID is -1"
    ),
    "event_inj_after_exit": _is("cleared", _VMEXIT, "#VMEXIT clears EVENTINJ in the VMCB"),
    "tlb_ctl_after_exit": _is("kept", _VMEXIT, "TLB_CONTROL is not among what #VMEXIT writes"),
    "pause_filter_after_exit": _is(
        "kept", "APM vol. 2, 15.14.4 Pause Intercept Filtering",
        "VMRUN loads the count into the CPU; the VMCB keeps it",
    ),
    "triple_fault_in_l2": _is(
        "intercept", "APM vol. 2, 15.14.3 Shutdown Intercept",
        "a shutdown that is intercepted is #VMEXIT",
    ),
    "intercepted_smi_without_gif": _is(
        "held", _GIF, "with GIF=0 an SMI is held pending"
    ),
    "checks_cr0_high": _is(True, _VMRUN, "CR0[63:32] not 0 is refused"),
    "checks_cs_l_d": _is(True, _VMRUN, "CS.L and CS.D in long mode are refused"),
    "checks_efer_bits": _is(True, _VMRUN, "an MBZ bit of EFER is refused"),
    "checks_nested_cr3": _is(
        True, "APM vol. 2, 15.25.3 Enabling Nested Paging", "an MBZ bit of nCR3 is refused"
    ),
    "checks_bitmap_addresses": _is(True, _VMRUN, "maps beyond the physical memory are refused"),
    "checks_v_nmi": _is(
        True, "APM vol. 2, 15.21.10 NMI Virtualization",
        "V_NMI_ENABLE without the NMI intercept is refused",
    ),
    "checks_event_inj": _is(
        True, "APM vol. 2, 15.20 Event Injection", "a reserved type or vector is refused"
    ),
    "l1_state_in_smm": _is("VM_HSAVE_PA", _HSAVE, "the host's state stays in its save area"),
    "smi_in_l2_exit_code": _is("stale", _SMM, "an SMI that is not intercepted is no #VMEXIT"),
    "rsm_failure": _is("shutdown", _SMRAM, "an illegal state makes RSM shut the CPU down"),
    "rsm_failure_in_guest_mode": _is("leaves", _SMRAM, "the shutdown is not the guest's"),
    "rsm_checks": Answer(
        ("strict", "strict with DR"), _SMRAM, "RSM with reserved bits set shuts down"
    ),
}  # fmt: skip
"""By knob."""


@dataclass(frozen=True)
class Departure:
    """A behaviour in which a kernel is not as the manual has it."""

    knob: Knob
    value: object
    answer: Answer

    def __str__(self) -> str:
        does = self.knob.in_words(self.value)
        return f"{self.knob.what}: {does}; {self.answer.section}: {self.answer.says}"


def departures(knobs: Knobs) -> list[Departure]:
    """Return where a kernel leaves the manual, in the order of the knobs."""
    return [
        Departure(knob, getattr(knobs, name), ANSWERS[name])
        for name, knob in KNOBS.items()
        if name in ANSWERS and getattr(knobs, name) not in ANSWERS[name].values
    ]
