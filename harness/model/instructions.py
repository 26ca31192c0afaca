"""What instructions do: those of SVM as KVM emulates them, the others as the CPU does them.

RIP is at the instruction; where one is executed it moves behind it, and a report follows. A
function returns how KVM_RUN ended (`#GP`: the handler has reported that), None if it goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from harness.model import layout
from harness.model.areas import SAVE, VMCB
from harness.model.checks import cpu_violations
from harness.model.crs import can_execute, can_take_exceptions, in_real_mode
from harness.model.efer import write_msr_efer
from harness.model.errors import CannotKnow
from harness.model.memory import UNKNOWN
from harness.model.operations import Instruction
from harness.model.roots import is_left_stale, note_execution
from harness.model.rsm import QUEUED_UD, rsm
from harness.model.state import State
from harness.model.vmexit import vmexit
from harness.model.vmrun import vmrun
from harness.svm.exit_codes import ExitCode
from harness.svm.intercepts import Intercept
from harness.svm.msrs import Msr

UD: Final = 6
GP: Final = 13
_NAMES: Final = {UD: "#UD", GP: "#GP"}

_LOW: Final = 0xFFFF_FFFF
_KVM_ENOSYS: Final = -1000
_KVM_EPERM: Final = -1
_LAST_HYPERCALL: Final = 12

_EXITS: Final[Mapping[Instruction, tuple[Intercept, int]]] = {
    Instruction.CPUID: (Intercept.INTERCEPT_CPUID, ExitCode.SVM_EXIT_CPUID),
    Instruction.HLT: (Intercept.INTERCEPT_HLT, ExitCode.SVM_EXIT_HLT),
    Instruction.RSM: (Intercept.INTERCEPT_RSM, ExitCode.SVM_EXIT_RSM),
    Instruction.VMRUN: (Intercept.INTERCEPT_VMRUN, ExitCode.SVM_EXIT_VMRUN),
    Instruction.VMMCALL: (Intercept.INTERCEPT_VMMCALL, ExitCode.SVM_EXIT_VMMCALL),
    Instruction.VMLOAD: (Intercept.INTERCEPT_VMLOAD, ExitCode.SVM_EXIT_VMLOAD),
    Instruction.VMSAVE: (Intercept.INTERCEPT_VMSAVE, ExitCode.SVM_EXIT_VMSAVE),
    Instruction.STGI: (Intercept.INTERCEPT_STGI, ExitCode.SVM_EXIT_STGI),
    Instruction.CLGI: (Intercept.INTERCEPT_CLGI, ExitCode.SVM_EXIT_CLGI),
}
_MSR_ACCESS: Final = (Instruction.RDMSR, Instruction.WRMSR)
_PRIVILEGED: Final = frozenset(Instruction) - {
    *(Instruction.NOP, Instruction.CPUID, Instruction.VMMCALL, Instruction.RSM, Instruction.UD2)
}
_TAKES_RAX: Final = (Instruction.VMRUN, Instruction.VMLOAD, Instruction.VMSAVE)


def perform(s: State, instruction: Instruction) -> str | None:
    """Execute an instruction in the current context."""
    note_execution(s)
    if instruction is Instruction.UD2:
        return exception(s, UD)
    if instruction in _PRIVILEGED and s.regs["cpl"]:
        return exception(s, GP)
    if instruction in _TAKES_RAX and not in_real_mode(s) and _cpu_refuses_rax(s):
        return exception(s, GP)
    if s.guest_mode and _l1_intercepts(s, instruction):
        return _exit(s, instruction)
    return _DO[instruction](s)


def _cpu_refuses_rax(s: State) -> bool:
    """Ask the CPU itself, which looks before the intercept."""
    return s.facts.cpu_checks_rax and not s.facts.is_page_address(s.regs["rax"])


def exception(s: State, vector: int) -> str | None:
    """Raise an exception: L1's if it intercepts that of L2, else the current context's."""
    if s.guest_mode and s.l1_intercepts_exception(vector):
        if vmexit(s, ExitCode.SVM_EXIT_EXCP_BASE + vector, UNKNOWN, UNKNOWN):
            return None
        # Staying in L2 means #GP; if L1 intercepts that as well it goes on for ever.
        return "hang" if s.l1_intercepts_exception(GP) else _deliver(s, GP)
    return _deliver(s, vector)


def _deliver(s: State, vector: int) -> str:
    if not can_take_exceptions(s):
        raise CannotKnow("an exception, and the descriptor tables are not the layout's")
    in_handler(s)
    return _NAMES[vector]


def in_handler(s: State) -> None:
    """Put the vCPU into a handler: kernel segments, RIP and RSP that only the handler knows."""
    s.regs |= {"rip": UNKNOWN, "rsp": UNKNOWN, "rflags": layout.RFLAGS_ON}
    if not in_real_mode(s):
        segments = layout.segments()
        s.regs |= {name: segments[name] for name in segments if "dtr" not in name} | {"cpl": 0}


def _l1_intercepts(s: State, instruction: Instruction) -> bool:
    if instruction in _MSR_ACCESS:
        return _l1_intercepts_msr(s, write=instruction is Instruction.WRMSR)
    found = _EXITS.get(instruction)
    return found is not None and s.l1_intercepts(found[0])


_MSR_RANGES: Final = (0, 0xC000_0000, 0xC001_0000)
_RANGE_MSRS: Final = 0x2000
_RANGE_BYTES: Final = 0x800


def _l1_intercepts_msr(s: State, *, write: bool) -> bool:
    """Ask L1's MSR permission map (APM vol. 2, 15.11; `nested_svm_exit_handled_msr()`)."""
    if not s.l1_intercepts(Intercept.INTERCEPT_MSR_PROT):
        return False
    msr = s.regs["rcx"] & _LOW
    for index, first in enumerate(_MSR_RANGES):
        if first <= msr < first + _RANGE_MSRS:
            bit = 2 * (msr - first) + write
            at = s.control["msrpm_base_pa"] + index * _RANGE_BYTES + bit // 8
            # A map that cannot be read intercepts everything.
            return not s.memory.is_mapped(at) or bool(s.memory.read(at, 1)[0] >> bit % 8 & 1)
    return True


def _exit(s: State, instruction: Instruction) -> str | None:
    if instruction in _MSR_ACCESS:
        code, info = int(ExitCode.SVM_EXIT_MSR), int(instruction is Instruction.WRMSR)
    else:
        code, info = int(_EXITS[instruction][1]), 0
    if vmexit(s, code, info):
        return None
    if s.l1_intercepts_exception(GP):
        s.over = "it hangs"
        return "hang"
    return _deliver(s, GP)


def _advance(s: State, instruction: Instruction) -> None:
    rip = s.regs["rip"]
    s.regs["rip"] = UNKNOWN if rip == UNKNOWN else rip + layout.INSTRUCTION_BYTES[instruction]


def _nop(s: State) -> str | None:
    _advance(s, Instruction.NOP)
    return None


def _cpuid(s: State) -> str | None:
    s.regs |= dict.fromkeys(("rax", "rbx", "rcx", "rdx"), UNKNOWN)
    _advance(s, Instruction.CPUID)
    return None


def _hlt(s: State) -> str | None:
    _advance(s, Instruction.HLT)
    return "hlt"


_PLAIN_MSRS: Final = frozenset({Msr.MSR_STAR, Msr.MSR_IA32_SYSENTER_CS, Msr.MSR_SYSCALL_MASK})
"""MSRs that take any value and do nothing here; what they hold is not modelled."""


def _rdmsr(s: State) -> str | None:
    msr = s.regs["rcx"] & _LOW
    if msr == Msr.MSR_EFER:
        value = s.regs["efer"]
    elif msr == Msr.MSR_VM_HSAVE_PA:
        value = s.hsave_msr
    elif msr in _PLAIN_MSRS:
        value = UNKNOWN
    else:
        raise CannotKnow(f"MSR {msr:#x} is not modelled")
    halves = (UNKNOWN, UNKNOWN) if value == UNKNOWN else (value & _LOW, value >> 32)
    s.regs |= {"rax": halves[0], "rdx": halves[1]}
    _advance(s, Instruction.RDMSR)
    return None


def _wrmsr(s: State) -> str | None:
    if UNKNOWN in (s.regs["rax"], s.regs["rdx"], s.regs["rcx"]):
        raise CannotKnow("WRMSR with registers that are not known")
    msr, was_l2 = s.regs["rcx"] & _LOW, s.guest_mode
    value = (s.regs["rdx"] & _LOW) << 32 | s.regs["rax"] & _LOW
    stale = was_l2 and is_left_stale(s, value)
    if msr == Msr.MSR_EFER:
        taken = write_msr_efer(s, value, host=False)
    elif msr == Msr.MSR_VM_HSAVE_PA:
        taken = s.facts.is_page_address(value)
        s.hsave_msr = value if taken else s.hsave_msr
    elif msr in _PLAIN_MSRS:
        taken = True
    else:
        raise CannotKnow(f"MSR {msr:#x} is not modelled")
    if not taken:
        return exception(s, GP)
    _advance(s, Instruction.WRMSR)
    if was_l2 and not s.guest_mode and not s.triple_fault:
        if s.knobs.l1_state == "hsave page":
            raise CannotKnow("L1 goes on with L2's page tables, and may hang at once")
        s.stale_root = stale
        if stale:
            s.over = "it went on as L1, with a root of page tables that is none of KVM's any more"
    return None


def _permitted(s: State) -> bool:
    """Tell whether SVM's instructions are there (`nested_svm_check_permissions()`)."""
    return s.svme and s.paging


def _vmrun(s: State) -> str | None:
    if not _permitted(s):
        return exception(s, UD)
    if s.guest_mode:
        raise CannotKnow("VMRUN in L2 that L1 does not intercept")
    if s.knobs.vmrun_needs_hsave and not s.hsave_msr:
        return exception(s, GP)
    if s.smm:
        return exception(s, UD)
    if s.knobs.vmrun_checks_rax and not s.facts.is_page_address(s.regs["rax"]):
        return exception(s, GP)
    page = s.regs["rax"] & ~0xFFF
    if not s.memory.is_mapped(page):
        return _no_memory(s)
    s.memory.read(page, 1)
    _advance(s, Instruction.VMRUN)
    trap = s.regs["rflags"] & layout.RFLAGS_TF
    if not vmrun(s, s.regs["rax"]) and trap:
        raise CannotKnow("a single step of a VMRUN that is refused")
    # The #DB of TF is lost, however: see the knob vmrun_drops_l1_events.
    return None


def _no_memory(s: State) -> str | None:
    return exception(s, GP) if s.knobs.vmrun_unmappable == "gp" else "internal error"


_VMLOAD_STATE: Final = (
    *(name for name in SAVE if name.partition(".")[0] in ("fs", "gs", "ldtr", "tr")),
    *("star", "lstar", "cstar", "sfmask", "kernel_gs_base"),
    *("sysenter_cs", "sysenter_esp", "sysenter_eip"),
)
"""What VMLOAD and VMSAVE move; the model holds none of it."""


def _vmload_vmsave(s: State, *, load: bool) -> str | None:
    if not _permitted(s):
        return exception(s, UD)
    if s.guest_mode:
        raise CannotKnow("VMLOAD or VMSAVE in L2 that L1 does not intercept")
    if s.knobs.vmrun_checks_rax and not s.facts.is_page_address(s.regs["rax"]):
        return exception(s, GP)
    gpa = s.regs["rax"] & ~0xFFF
    if not s.memory.is_mapped(gpa):
        return _no_memory(s)
    if load:
        base = s.memory.read_fields(gpa, VMCB, "save.")["tr.base"]
        s.tr_serves = base in (UNKNOWN, layout.TSS_GPA)
    else:
        s.memory.write_fields(gpa, VMCB, {f"save.{name}": UNKNOWN for name in _VMLOAD_STATE})
    _advance(s, Instruction.VMLOAD)
    return None


def _set_gif(s: State, gif: bool) -> str | None:
    if s.guest_mode:
        raise CannotKnow("STGI or CLGI in L2 that L1 does not intercept")
    if in_real_mode(s):
        return exception(s, UD)
    if not s.svme and not _free_of_svme(s, gif):
        return exception(s, UD)
    if s.init_pending and gif and not s.gif:
        raise CannotKnow("STGI lets INIT in, at the next entry of the guest, and not before")
    s.gif = gif
    _advance(s, Instruction.STGI)
    return None


def _free_of_svme(s: State, gif: bool) -> bool:
    """Tell whether the CPU does STGI or CLGI by itself, for it has EFER.SVME whatever L1 has."""
    if not s.facts.vgif_on_l0 or s.knobs.stgi_without_svme == "#UD":
        return False
    if s.knobs.stgi_without_svme == "#UD once":
        return gif and s.stgi_open
    # An SMI that waits for GIF makes KVM intercept STGI.
    return not (gif and s.smi_pending and not s.gif)


def _vmmcall(s: State) -> str | None:
    if s.guest_mode and s.knobs.vmmcall_in_l2 == "#UD":
        return exception(s, UD)
    if s.guest_mode:
        # KVM takes the #UD, patches VMMCALL with VMMCALL, and has it executed again.
        s.over = "it hangs"
        return "hang"
    number = s.regs["rax"]
    if s.regs["cpl"]:
        s.regs["rax"] = _KVM_EPERM & 0xFFFF_FFFF_FFFF_FFFF
    elif in_real_mode(s) or (number and number <= _LAST_HYPERCALL):
        s.regs["rax"] = UNKNOWN
    else:
        s.regs["rax"] = _KVM_ENOSYS & 0xFFFF_FFFF_FFFF_FFFF
    _advance(s, Instruction.VMMCALL)
    return None


def _rsm(s: State) -> str | None:
    if not s.smm:
        return exception(s, UD)
    if s.init_pending:
        raise CannotKnow("INIT waits for the end of SMM")
    ended = rsm(s)
    if ended != QUEUED_UD:
        return ended
    if s.smi_pending and s.gif:
        raise CannotKnow("an SMI comes before the handler of #UD has reported")
    if cpu_violations(s.control, s.regs, s.facts, s.facts.silicon) or not can_execute(s):
        raise CannotKnow("RSM has failed in L2, which cannot run")
    return exception(s, UD)


_DO: Final[Mapping[Instruction, Callable[[State], str | None]]] = {
    Instruction.NOP: _nop,
    Instruction.CPUID: _cpuid,
    Instruction.RDMSR: _rdmsr,
    Instruction.WRMSR: _wrmsr,
    Instruction.VMRUN: _vmrun,
    Instruction.VMMCALL: _vmmcall,
    Instruction.VMLOAD: lambda s: _vmload_vmsave(s, load=True),
    Instruction.VMSAVE: lambda s: _vmload_vmsave(s, load=False),
    Instruction.STGI: lambda s: _set_gif(s, True),
    Instruction.CLGI: lambda s: _set_gif(s, False),
    Instruction.HLT: _hlt,
    Instruction.RSM: _rsm,
}
