"""KVM_RUN: what is done before the guest is entered, and what the guest then does.

Source: `vcpu_enter_guest()`, `svm_check_nested_events()`, `svm_vcpu_run()`.
"""

from __future__ import annotations

from typing import Final

from harness.model import layout
from harness.model.areas import DT, SEG
from harness.model.checks import SILICON, cpu_violations
from harness.model.crs import can_execute, in_real_mode, is_legal_cr3
from harness.model.errors import CannotKnow
from harness.model.init import take_init, takes_init
from harness.model.instructions import perform
from harness.model.memory import UNKNOWN
from harness.model.operations import Instruction
from harness.model.roots import note_entry
from harness.model.smm import enter_smm
from harness.model.state import IOIO_EXIT, State
from harness.model.vmexit import vmexit
from harness.model.vmrun import msrpm_readable
from harness.svm.exit_codes import VMEXIT_INVALID, ExitCode
from harness.svm.intercepts import Intercept
from harness.svm.msrs import Cr4
from harness.svm.vmcb import EventInj, IntCtl, NestedCtl, SegAttrib

_LEFT_HALF_DONE: Final = (*SEG, *DT, "cr0", "cr2", "cr3", "dr7", "rflags", "rip", "rsp", "rax")

_RFLAGS_FIXED: Final = 0x2

_MOST_ROUNDS: Final = 8
"""KVM_RUN does not end where it takes more."""

REPORT: Final = "report"
INTERNAL_ERROR: Final = "internal error"

_BASES: Final = tuple(f"{name}.base" for name in ("es", "cs", "ss", "ds", "gdtr", "idtr"))
_ONES: Final = 0xFFFF_FFFF_FFFF_FFFF


def kvm_run(s: State) -> str:
    """Run the vCPU from where it stands; return how KVM_RUN ends.

    Raises CannotKnow: that depends on what the model does not hold.
    """
    s.ran = True
    for _ in range(_MOST_ROUNDS):
        ended = _before_entry(s) or _enter(s)
        if ended:
            return ended
    s.over = "it hangs"
    return "hang"


def prepare_entry(s: State) -> str | None:
    """Do what KVM_RUN does up to the guest's first instruction; return how it ends if it does.

    For an instruction that is not at RIP.
    """
    s.ran = True
    return _before_entry(s) or (None if _enter_hardware(s) else kvm_run(s))


def _before_entry(s: State) -> str | None:
    """Do what is pending; return how KVM_RUN ends, if it ends here."""
    if s.dead:
        return "run: EIO"
    _choose_stgi_intercept(s)
    if s.pages_pending and not _get_pages(s):
        return INTERNAL_ERROR
    if s.triple_fault:
        ended = _triple_fault(s)
        if ended:
            return ended
    if takes_init(s):
        return take_init(s)
    if s.smi_pending and s.gif and not s.smm:
        _deliver_smi(s)
        if s.dead:
            s.over = "the VM is dead"
            return "run: EIO"
        if s.triple_fault:
            return _triple_fault(s)
    if _waits_for_an_smi_for_ever(s):
        s.over = "it hangs"
        return "hang"
    if not s.guest_mode and _cpu_refuses_l1(s):
        # KVM_SET_SREGS or RSM has taken what the CPU does not.
        return "fail entry"
    return None


def _cpu_refuses_l1(s: State) -> bool:
    # Of CR3 only L1's comes to the CPU unchecked.
    cr3 = s.regs["cr3"]
    illegal = cr3 != UNKNOWN and not is_legal_cr3(cr3, s.facts)
    return illegal or bool(cpu_violations({}, s.regs, s.facts, s.facts.silicon))


def _waits_for_an_smi_for_ever(s: State) -> bool:
    return (
        s.knobs.intercepted_smi_without_gif == "endless"
        and s.guest_mode
        and s.smi_pending
        and not s.gif
        and s.l1_intercepts(Intercept.INTERCEPT_SMI)
    )


def _choose_stgi_intercept(s: State) -> None:
    """Intercept STGI again where KVM asks what to intercept, or waits for GIF with an SMI.

    Source: `svm_recalc_instruction_intercepts()`, `svm_enable_smi_window()`.
    """
    if s.recalc_pending or (s.smi_pending and not s.gif):
        s.stgi_open = False
    s.recalc_pending = False


def _get_pages(s: State) -> bool:
    """Merge the MSR permission map after KVM_SET_NESTED_STATE (KVM_REQ_GET_NESTED_STATE_PAGES)."""
    if s.pae_paging and not NestedCtl(s.control["nested_ctl"]).NP_ENABLE:
        raise CannotKnow("KVM loads PDPTEs, and ends KVM_RUN without an exit reason if it cannot")
    readable = msrpm_readable(s)
    if readable or s.knobs.pages_request == "once":
        s.pages_pending = False
    return readable


def _triple_fault(s: State) -> str | None:
    s.triple_fault = False
    asked = s.guest_mode and s.knobs.triple_fault_in_l2 == "intercept"
    if asked and s.l1_intercepts(Intercept.INTERCEPT_SHUTDOWN):
        _exit_l2(s, ExitCode.SVM_EXIT_SHUTDOWN)
        return None
    s.over = "it has shut down"
    return "shutdown"


def _deliver_smi(s: State) -> None:
    if s.guest_mode and s.run_pending:
        # L2 is entered and left again at once, for the SMI must not come in the middle of VMRUN.
        _enter_hardware(s)
    if s.guest_mode and s.l1_intercepts(Intercept.INTERCEPT_SMI):
        _exit_l2(s, ExitCode.SVM_EXIT_SMI)
    elif s.gif:
        enter_smm(s)


def _exit_l2(s: State, exit_code: int) -> None:
    s.run_pending = False
    if not vmexit(s, exit_code):
        raise CannotKnow("vmcb12 has no memory, and KVM stays in L2 with a #GP for it")


def _enter_hardware(s: State) -> bool:
    """Enter the guest; return False if the CPU refuses L2's VMCB, which L1 sees as #VMEXIT."""
    s.run_pending = s.l1_shadow = False
    s.regs |= s.after_run
    s.after_run = {}
    if not s.guest_mode:
        note_entry(s)
        return True
    if NestedCtl(s.control["nested_ctl"]).NP_ENABLE and not s.memory.is_mapped(
        s.control["nested_cr3"] & ~0xFFF
    ):
        raise CannotKnow("KVM cannot load the root of L1's nested page tables")
    if s.regs["cr0"] == UNKNOWN:
        raise CannotKnow("CR0 of L2 is L1's or L2's, and the CPU checks it")
    if cpu_violations(s.control, s.regs, s.facts, s.facts.silicon):
        # What the CPU wrote into vmcb02 is reflected; QEMU's exit codes have 32 bits.
        wide = s.facts.silicon == SILICON
        if not wide:
            # Its VMRUN is half done by then: what it writes into vmcb02 is of no guest.
            s.regs |= dict.fromkeys(_LEFT_HALF_DONE, UNKNOWN)
            s.control |= {"event_inj": 0, "int_state": 0}
        _exit_l2(s, VMEXIT_INVALID if wide else VMEXIT_INVALID & 0xFFFF_FFFF)
        return False
    if not s.facts.loads_shadow:
        # Its #VMEXIT writes back that there is none, also where L2 has executed nothing.
        s.control["int_state"], s.shadow_by_rsm = 0, None
    if not s.facts.loads_cpl and UNKNOWN not in (s.regs["cpl"], s.regs["ss.attrib"]):
        s.regs["cpl"] = SegAttrib(s.regs["ss.attrib"]).DPL
    if s.regs["rflags"] != UNKNOWN:
        s.regs["rflags"] |= _RFLAGS_FIXED
    _canonicalize(s)
    if EventInj(s.control["event_inj"]).VALID:
        raise CannotKnow("an event is injected into L2")
    # The CPU clears what it has taken; KVM keeps V_TPR in step with CR8 unless L1 virtualizes it.
    s.control |= {"event_inj": 0, "next_rip": _next_rip(s)}
    if not IntCtl(s.control["int_ctl"]).V_INTR_MASKING:
        s.control["int_ctl"] &= ~IntCtl.V_TPR.mask
    return True


def _canonicalize(s: State) -> None:
    """Make bases canonical, as VMRUN does (APM vol. 2, 15.5.1)."""
    width = 48 if s.facts.cr4_reserved & Cr4.LA57.mask else 57
    low, sign = (1 << width) - 1, 1 << width - 1
    for name in _BASES:
        base = s.regs[name]
        if base != UNKNOWN:
            s.regs[name] = ((base & low ^ sign) - sign) & _ONES


def _next_rip(s: State) -> int:
    """Return what KVM takes over from vmcb02 after L2 has run (`svm_vcpu_run()`)."""
    if not s.knobs.next_rip_cached:
        return 0
    # A CPU that saves it writes what belongs to its last exit. On others vmcb02 holds 0, unless
    # something else than VMRUN has put a value there, which some kernels do.
    return UNKNOWN if s.facts.nrips or s.next_rip_given else 0


def _enter(s: State) -> str | None:
    """Enter the guest and let it go on at RIP; None: there was a #VMEXIT to L1."""
    if not _enter_hardware(s):
        return None
    if s.guest_mode:
        s.control["int_state"] = 0
        s.shadow_by_rsm = None
    if not can_execute(s):
        raise CannotKnow("the guest runs with registers that the layout's code is not made for")
    instruction = _instruction_at(s)
    if instruction is not None:
        return perform(s, instruction)
    return report(s)


def report(s: State) -> str | None:
    """Let the guest report to the host, as all of its code does sooner or later."""
    if s.guest_mode and _l1_takes_report(s):
        _exit_l2_or_stay(s)
        return None
    if s.guest_mode:
        s.l2_exit_code = IOIO_EXIT
    s.regs["rip"] = _behind_report(s)
    return REPORT


def _l1_takes_report(s: State) -> bool:
    if not s.l1_intercepts(Intercept.INTERCEPT_IOIO_PROT):
        return False
    base = s.control["iopm_base_pa"]
    if not s.memory.is_mapped(base):
        return True
    if base != layout.IOPM_GPA:
        raise CannotKnow("the I/O permission map lies elsewhere")
    return False


def _exit_l2_or_stay(s: State) -> None:
    # The OUT is not executed: RIP stays at it.
    behind = _behind_report(s)
    s.regs["rip"] = behind if behind == UNKNOWN else behind - layout.REPORT_BYTES
    if not vmexit(s, IOIO_EXIT, UNKNOWN, UNKNOWN):
        raise CannotKnow("vmcb12 has no memory, and KVM stays in L2 with a #GP for it")


def _starts() -> dict[int, Instruction]:
    return {layout.snippet_gpa(instruction): instruction for instruction in Instruction}


_STARTS: Final = _starts()


def _reports() -> dict[int, int]:
    """Return where RIP is after the report of each place that leads to one."""
    ends: dict[int, int] = {}
    starts = [layout.IDLE_L1, layout.IDLE_L2]
    starts += [gpa + layout.INSTRUCTION_BYTES[i] for gpa, i in _STARTS.items()]
    for start in starts:
        end = start + layout.REPORT_BYTES
        ends |= {start: end, end: end}
    return ends


_REPORTS: Final = _reports()


def _instruction_at(s: State) -> Instruction | None:
    return None if in_real_mode(s) else _STARTS.get(s.regs["rip"])


def _behind_report(s: State) -> int:
    rip = s.regs["rip"]
    if in_real_mode(s):
        return UNKNOWN
    if rip == UNKNOWN:
        # In a handler, or behind one: they go on to L1's idle loop.
        return layout.IDLE_L1 + layout.REPORT_BYTES
    if rip not in _REPORTS:
        raise CannotKnow(f"RIP is {rip:#x}, where the layout has no code")
    return _REPORTS[rip]
