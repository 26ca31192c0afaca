"""The executable model: operations in, predicted outcomes out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import replace
from typing import Any, Final

from harness.model import layout, save_area
from harness.model.areas import SEG, SMRAM_32, SMRAM_64, VMCB
from harness.model.crs import can_execute, in_real_mode, is_legal_sregs, load_cr0
from harness.model.efer import store_efer, write_msr_efer
from harness.model.errors import BadOperation, CannotKnow
from harness.model.facts import GUEST_FEATURES, CpuFacts
from harness.model.instructions import in_handler, perform
from harness.model.knobs import Knobs
from harness.model.leave import leave_nested
from harness.model.memory import UNKNOWN
from harness.model.nested_state import get_nested_state, set_nested_state
from harness.model.operations import (
    Execute,
    GetNestedState,
    Init,
    Instruction,
    Operation,
    Outcome,
    Resume,
    SetCpuid,
    SetMsr,
    SetNestedState,
    SetSlot,
    SetSmm,
    SetSregs,
    Smi,
    StepRsm,
    Value,
    WriteHostSave,
    WriteSaveArea,
    WriteVmcb,
)
from harness.model.roots import drop_roots
from harness.model.rsm_registers import after_32, after_64
from harness.model.run import kvm_run, prepare_entry
from harness.model.seen import seen
from harness.model.state import State, fresh
from harness.svm.msrs import Msr
from harness.svm.smram import SMRAM_STATE_OFFSET

UNKNOWN_RESULT: Final = "unknown"
"""The result of an operation that the model cannot predict; the sequence ends there."""

OVER: Final = "over"
"""The result of running a vCPU that cannot be run any more (`Model.over`)."""

STEPPED: Final = "stepped"
"""The result of a `StepRsm` that was done, also of one that has failed."""

_SREGS: Final = ("efer", "cr0", "cr2", "cr3", "cr4", "cs.attrib")
_WITHOUT_EFFECT: Final = ("cr8", "apic_base")
_PAGE_MASK: Final = ~0xFFF


class Model:
    """One vCPU, its guest and its KVM; `apply` predicts, operation by operation."""

    def __init__(self, knobs: Knobs, facts: CpuFacts | None = None) -> None:
        """Make a vCPU as the layout has it at first.

        Args:
            knobs: what the kernel does.
            facts: the CPU; by default the emulated one.

        """
        self.state = fresh(knobs, facts or CpuFacts())
        self._cannot_know = ""

    @property
    def over(self) -> str:
        """Why the vCPU cannot be run any more; empty if it can."""
        return self._cannot_know or self.state.over

    def copy(self) -> Model:
        """Return an independent model in the same state."""
        other = copy(self)
        other.state = self.state.copy()
        return other

    def apply(self, operation: Operation) -> Outcome:
        """Do one operation; return its answer and all that is predicted to be seen after it.

        The answer is `unknown` where that depends on what the model does not hold; nothing is
        predicted from there on.

        Raises BadOperation: it names what does not exist.
        Raises ModelBug: the model has come to a state that cannot be.
        """
        extra: dict[str, Value] = {}
        if self._cannot_know:
            return Outcome(UNKNOWN_RESULT)
        try:
            result = self._do(operation, extra)
        except CannotKnow as e:
            self._cannot_know = f"unknown: {e}"
            return Outcome(UNKNOWN_RESULT)
        self.state.check()
        return Outcome(result, seen(self.state) | extra)

    def _do(self, operation: Operation, extra: dict[str, Value]) -> str:
        s = self.state
        if isinstance(operation, Execute | Resume | StepRsm) and s.over:
            return OVER
        if s.dead and not isinstance(operation, WriteVmcb | WriteSaveArea | WriteHostSave):
            return "EIO"
        return _DO[type(operation)](self, operation, extra)


# The guest runs


def _execute(m: Model, what: Execute, extra: dict[str, Value]) -> str:
    s = m.state
    takes_smi = s.smi_pending and s.gif and not s.smm
    real_mode = in_real_mode(s)
    s.regs |= {"rax": what.rax, "rcx": what.rcx, "rdx": what.rdx, "rflags": layout.RFLAGS_ON}
    s.regs["rsp"] = UNKNOWN if real_mode else layout.STACK_TOP
    if takes_smi:
        # It would interrupt the instruction half-way: it interrupts the idle loop instead.
        s.regs["rip"] = UNKNOWN if real_mode else layout.IDLE_L1
        return kvm_run(s)
    if what.trap:
        return _execute_trapped(s, what)
    if real_mode or what.user:
        return _execute_apart(s, what)
    s.regs["rip"] = layout.snippet_gpa(what.instruction)
    return kvm_run(s)


def _execute_apart(s: State, what: Execute) -> str:
    """Execute where RIP is not the layout's: in real mode, or at CPL 3."""
    s.regs["rip"] = UNKNOWN
    user = what.user and not in_real_mode(s)
    ended = prepare_entry(s)
    if ended:
        if user:
            s.over = "it has not come to CPL 3"
        return ended
    if not can_execute(s):
        raise CannotKnow("the guest runs with registers that the layout's code is not made for")
    if not user:
        return perform(s, what.instruction) or kvm_run(s)
    return _execute_user(s, what)


def _execute_trapped(s: State, what: Execute) -> str:
    """Execute with RFLAGS.TF, which KVM has a part in only if it emulates the instruction."""
    vmrun = what.instruction is Instruction.VMRUN and not (what.user or s.guest_mode)
    if not vmrun or in_real_mode(s):
        raise CannotKnow("RFLAGS.TF, and it is no VMRUN of L1")
    s.regs["rip"] = layout.snippet_gpa(what.instruction)
    ended = prepare_entry(s)
    if ended:
        return ended
    if not can_execute(s):
        raise CannotKnow("the guest runs with registers that the layout's code is not made for")
    s.regs["rflags"] |= layout.RFLAGS_TF
    return perform(s, what.instruction) or kvm_run(s)


def _execute_user(s: State, what: Execute) -> str:
    if not s.tr_serves:
        raise CannotKnow("an exception at CPL 3, and TR is not the layout's")
    # IRETQ loads CS and SS, and nulls what CPL 3 may not have.
    s.regs |= {name: UNKNOWN for name in (*SEG, "rsp")} | {"cpl": 3}
    was_l2 = s.guest_mode
    ended = perform(s, what.instruction)
    if was_l2 and not s.guest_mode:
        return ended or kvm_run(s)
    if ended is None:
        # It goes on with an INT to a handler, which reports.
        in_handler(s)
        ended = kvm_run(s)
        s.regs["rip"] = UNKNOWN
    return ended


def _resume(m: Model, what: Resume, extra: dict[str, Value]) -> str:
    if what.immediate:
        m.state.ran = True
        return "intr"
    return kvm_run(m.state)


def _step_rsm(m: Model, what: StepRsm, extra: dict[str, Value]) -> str:
    s = m.state
    if not (s.smm and in_real_mode(s)):
        raise CannotKnow("RSM is stepped where SMM was not entered by an SMI")
    s.regs |= {"rip": UNKNOWN, "rsp": UNKNOWN, "rflags": layout.RFLAGS_ON}
    image = save_area.read(s)
    ended = prepare_entry(s) or perform(s, Instruction.RSM)
    if ended:
        return ended
    if s.guest_mode:
        # Stepping may take the interrupt shadow that RSM has restored.
        s.control["int_state"] = UNKNOWN
    if not s.triple_fault:
        after = after_64 if s.facts.lm else after_32
        extra |= after(s, image)
    return STEPPED


# Ioctls


def _set_msr(m: Model, what: SetMsr, extra: dict[str, Value]) -> str:
    s = m.state
    if what.index == Msr.MSR_EFER:
        return "ok" if write_msr_efer(s, what.value, host=True) else "refused"
    if what.index == Msr.MSR_VM_HSAVE_PA:
        s.hsave_msr = what.value & _PAGE_MASK
        return "ok"
    raise CannotKnow(f"MSR {what.index:#x} is not modelled")


def _set_sregs(m: Model, what: SetSregs, extra: dict[str, Value]) -> str:
    s = m.state
    for name in what.changes:
        if name not in (*_SREGS, *_WITHOUT_EFFECT):
            raise BadOperation(f"kvm_sregs: no register {name!r} can be changed here")
    if any(name in _WITHOUT_EFFECT for name in what.changes):
        raise CannotKnow("CR8 and the APIC are not modelled")
    given = s.regs | dict(what.changes)
    if not is_legal_sregs(s, given):
        return "EINVAL"
    store_efer(s, given["efer"])
    # Segments are those that KVM_GET_SREGS gave, also where guest mode was left in between.
    load_cr0(s, given["cr0"])
    s.regs |= {name: given[name] for name in ("cr2", "cr3", "cr4", *SEG)}
    s.after_run = {}
    return "ok"


def _set_cpuid(m: Model, what: SetCpuid, extra: dict[str, Value]) -> str:
    s = m.state
    if what.feature not in GUEST_FEATURES:
        raise BadOperation(f"no CPUID feature {what.feature!r}: there are {GUEST_FEATURES}")
    if s.ran:
        raise CannotKnow("CPUID is changed after the first KVM_RUN")
    s.facts = s.facts.but(**{what.feature: what.on})
    s.recalc_pending = True
    return "ok"


def _get_nested_state(m: Model, what: GetNestedState, extra: dict[str, Value]) -> str:
    result, given = get_nested_state(m.state, what)
    extra |= given
    return result


def _set_nested_state(m: Model, what: SetNestedState, extra: dict[str, Value]) -> str:
    return set_nested_state(m.state, what)


def _set_smm(m: Model, what: SetSmm, extra: dict[str, Value]) -> str:
    s = m.state
    if what.on != s.smm:
        leave_nested(s)
        s.nested = replace(s.nested, smm=what.on)
    return "ok"


def _smi(m: Model, what: Smi, extra: dict[str, Value]) -> str:
    m.state.smi_pending = True
    return "ok"


def _init(m: Model, what: Init, extra: dict[str, Value]) -> str:
    m.state.init_pending = True
    return "ok"


# The guest's memory


def _write_vmcb(m: Model, what: WriteVmcb, extra: dict[str, Value]) -> str:
    if what.vmcb not in ("a", "b"):
        raise BadOperation(f"no vmcb {what.vmcb!r}: there are a and b")
    m.state.memory.write_slot_fields(f"vmcb_{what.vmcb}", VMCB, what.changes)
    return "ok"


def _write_save_area(m: Model, what: WriteSaveArea, extra: dict[str, Value]) -> str:
    if m.state.smram_is_64 == what.legacy:
        raise CannotKnow("the save area has one form, and the other one is written")
    area = SMRAM_32 if what.legacy else SMRAM_64
    m.state.memory.write_slot_fields("smram", area, what.changes, SMRAM_STATE_OFFSET)
    return "ok"


def _write_host_save(m: Model, what: WriteHostSave, extra: dict[str, Value]) -> str:
    m.state.memory.write_slot_fields("hsave", VMCB, what.changes)
    return "ok"


def _set_slot(m: Model, what: SetSlot, extra: dict[str, Value]) -> str:
    m.state.memory.set_present(what.what, what.present)
    if not what.present:
        drop_roots(m.state)
    return "ok"


_DO: Final[Mapping[type, Callable[[Model, Any, dict[str, Value]], str]]] = {
    Execute: _execute,
    Resume: _resume,
    SetMsr: _set_msr,
    SetSregs: _set_sregs,
    SetCpuid: _set_cpuid,
    GetNestedState: _get_nested_state,
    SetNestedState: _set_nested_state,
    SetSmm: _set_smm,
    Smi: _smi,
    Init: _init,
    WriteVmcb: _write_vmcb,
    WriteSaveArea: _write_save_area,
    WriteHostSave: _write_host_save,
    StepRsm: _step_rsm,
    SetSlot: _set_slot,
}
