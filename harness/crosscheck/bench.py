"""The bare bench: a VM without a program, on which operations are done one at a time.

Its vCPU is brought into 64-bit mode by ioctls, with the memory of `harness.model.layout` and the
snippets of `code`. Before an `Execute` the host points RIP at the snippet, in whatever context is
current: L1, L2, or SMM. `harness.model.operations` says what the operations are.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Final, Self

from harness.crosscheck import code
from harness.crosscheck.bench_memory import BenchMemory
from harness.crosscheck.checker import NOT_DONE
from harness.crosscheck.fields import SMRAM, SMRAM_LEGACY, VMCB
from harness.crosscheck.first_state import FEATURES, enter_long_mode, set_attributes, without
from harness.crosscheck.hazards import (
    Roots,
    drops_hsave,
    is_odd_mode,
    resets_under_l2,
    sets_lme_in_real_mode,
)
from harness.crosscheck.observe import Observer, registers_after
from harness.errors import HarnessError
from harness.machine.console import PortBus
from harness.machine.cpuid import CpuidPolicy
from harness.machine.hang import VcpuTimeout
from harness.machine.memory import GuestMemory
from harness.machine.vcpu import Kicked, MachineVcpu
from harness.machine.watchdog import WATCHDOG
from harness.model import layout
from harness.model.model import STEPPED
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
    WriteHostSave,
    WriteSaveArea,
    WriteVmcb,
)
from harness.proxy.program import vector_name
from harness.svm.smram import SMRAM_STATE_OFFSET
from harness.svm.vmcb import VMCB_SIZE
from kvm_ioctl.asm_kvm import kvm_cpuid_entry2, kvm_nested_state
from kvm_ioctl.exits import (
    DebugExit,
    Exit,
    FailEntryExit,
    HltExit,
    InternalErrorExit,
    Interrupted,
    IoExit,
    ShutdownExit,
)
from kvm_ioctl.handles import Kvm, Vcpu
from kvm_ioctl.linux_kvm import GuestDebug
from kvm_ioctl.request import KvmError

RUN_TIMEOUT_S: Final = 2.0
"""Of one KVM_RUN; a snippet takes milliseconds, even emulated."""

_MOST_PIECES: Final = 4

_NESTED_BYTES: Final = 4224
_HEADER_BYTES: Final = 128


@dataclass
class Clock:
    """Where the time of a bench went, in seconds."""

    kernel_s: float = 0.0


class BareBench:
    """One vCPU, its memory, and the operations; use it in a `with`."""

    def __init__(
        self,
        kvm: Kvm,
        *,
        memory_probe: Callable[[], int] | None = None,
        cure: bool = True,
        hsave_page: bool = False,
        plain: bool = False,
        lapic: bool = False,
    ) -> None:
        """Build the VM.

        Args:
            kvm: an open /dev/kvm.
            memory_probe: gives the bytes of nested state that this process holds, for what is seen
                as `nested_bytes`; without it that is not seen.
            cure: keep the vCPU off what ends hosts, see `hazards`.
            hsave_page: the kernel keeps L1's state in one (the knob `l1_state`).
            plain: take a KVM that offers guests no SVM, too.
            lapic: have the interrupt controllers in the kernel, for `Init`.

        Raises Unsupported: KVM offers guests no SVM.
        Raises KvmError: KVM refused something.

        """
        self._policy = CpuidPolicy(svm=None if plain else True)
        self.clock = Clock()
        self.cured = 0
        """How often roots of page tables were renewed, see `hazards`."""
        self._probe = memory_probe
        self._cure, self._hsave_page = cure, hsave_page
        self._roots = Roots()
        self._seen: dict[str, Any] = {}
        self._kept = bytes(_NESTED_BYTES - _HEADER_BYTES)
        self._supported = kvm.supported_cpuid()
        self._hidden: set[str] = set()
        with ExitStack() as stack:
            WATCHDOG.install()
            stack.callback(WATCHDOG.uninstall)
            self._memory = BenchMemory(stack)
            self._vm = stack.enter_context(kvm.create_vm())
            self._memory.show_all(self._vm)
            if lapic:
                self._vm.create_irqchip()
            self.vcpu: Vcpu = self._vm.create_vcpu(0)
            self.vcpu.set_cpuid2(self.cpuid())
            enter_long_mode(self.vcpu)
            self._runner = MachineVcpu(0, self.vcpu, self._vm, GuestMemory(self._vm), PortBus())
            self._observer = Observer(self.vcpu, self._memory.ram, self._memory.smram)
            self._stack = stack.pop_all()

    def close(self) -> None:
        """Destroy the VM; a second call does nothing."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def apply(self, operation: Operation) -> Outcome:
        """Do one operation; return its answer, and all that can be seen afterwards.

        `not done` is the answer to what has ended hosts, see `hazards`.
        """
        if self._cure and self._is_too_dangerous(operation):
            return Outcome(NOT_DONE)
        extra: dict[str, Any] = {}
        started = perf_counter()
        try:
            result = _DO[type(operation)](self, operation, extra)
        except KvmError as e:
            result = errno_name(e.errno or 0)
        self.clock.kernel_s += perf_counter() - started
        self._seen = self.observe()
        outcome = Outcome(result, {**self._seen, **extra})
        if self._roots.is_stale_after(operation, outcome) and self._cure:
            self.cured += 1
            self._memory.renew_roots()
        return outcome

    def smram_bytes(self, offset: int, size_bytes: int) -> bytes:
        """Return bytes of SMRAM; the offset counts from SMBASE."""
        return self._memory.smram[offset : offset + size_bytes]

    def observe(self) -> dict[str, Any]:
        """Return what can be seen now, by the names of `Outcome.seen`; little of a dead VM."""
        started = perf_counter()
        seen = self._observer.seen()
        self.clock.kernel_s += perf_counter() - started
        if self._probe is not None:
            seen["nested_bytes"] = self._probe()
        return seen

    def _is_too_dangerous(self, operation: Operation) -> bool:
        if self._hsave_page and drops_hsave(operation, self._seen):
            return True
        if self._hsave_page and resets_under_l2(operation, self._seen):
            return True
        if sets_lme_in_real_mode(operation, self._seen):
            return True
        return isinstance(operation, Execute | Resume) and is_odd_mode(self._seen)

    # Instructions

    def _execute(self, what: Execute, extra: dict[str, Any]) -> str:
        regs = self.vcpu.get_regs()
        regs.rax, regs.rcx, regs.rdx, regs.rflags = what.rax, what.rcx, what.rdx, layout.RFLAGS_ON
        regs.rip, regs.rsp = self._place(what)
        if what.trap and not self._observer.takes_smi():
            regs.rflags |= layout.RFLAGS_TF
        self.vcpu.set_regs(regs)
        return self._run()

    def _place(self, what: Execute) -> tuple[int, int]:
        """Return RIP and RSP for an instruction where the vCPU is."""
        real_mode = not self.vcpu.get_sregs().cr0 & 1
        if self._observer.takes_smi():
            # RSM would come back to a half-done operation: let the SMI interrupt nothing.
            return (code.SMM_IDLE, code.SMM_STACK_TOP) if real_mode else _IDLE
        if real_mode:
            return code.smm_snippet(what.instruction), code.SMM_STACK_TOP
        if not what.user:
            return code.snippet(what.instruction), layout.STACK_TOP
        frame = code.user_frame(what.instruction)
        self._memory.ram[code.USER_FRAME : code.USER_FRAME + len(frame)] = frame
        return code.ENTER_USER, code.USER_FRAME

    def _step_rsm(self, what: StepRsm, extra: dict[str, Any]) -> str:
        regs = self.vcpu.get_regs()
        regs.rip, regs.rsp = code.smm_snippet(Instruction.RSM), code.SMM_STACK_TOP
        regs.rflags = layout.RFLAGS_ON
        self.vcpu.set_regs(regs)
        steps = GuestDebug.KVM_GUESTDBG_ENABLE | GuestDebug.KVM_GUESTDBG_SINGLESTEP
        self.vcpu.set_guest_debug(steps)
        try:
            result = self._run()
        finally:
            with contextlib.suppress(KvmError):
                # A dead VM answers EIO, and runs no more.
                self.vcpu.set_guest_debug(0)
        if result == STEPPED:
            extra |= registers_after(self.vcpu)
        return result

    def _resume(self, what: Resume, extra: dict[str, Any]) -> str:
        if not what.immediate:
            return self._run()
        return self._enter_immediately() or "intr"

    def _run(self) -> str:
        try:
            exit_ = self._runner.step(RUN_TIMEOUT_S)
        except KvmError as e:
            return f"run: {errno_name(e.errno or 0)}"
        except VcpuTimeout:
            return "hang"
        if isinstance(exit_, IoExit) and exit_.is_out:
            return self._enter_immediately() or _report(exit_.port)
        return _ending(exit_)

    def _enter_immediately(self) -> str | None:
        """Enter and leave KVM_RUN, finishing I/O; return how it ended if not by EINTR."""
        try:
            self.vcpu.run.immediate_exit = 1
            for _ in range(_MOST_PIECES):
                exit_ = self.vcpu.enter()
                if isinstance(exit_, Interrupted):
                    return None
            return _ending(exit_)
        except KvmError as e:
            return f"run: {errno_name(e.errno or 0)}"
        finally:
            self.vcpu.run.immediate_exit = 0

    # Ioctls

    def _set_msr(self, what: SetMsr, extra: dict[str, Any]) -> str:
        return "ok" if self.vcpu.set_msrs({what.index: what.value}) == 1 else "refused"

    def _set_sregs(self, what: SetSregs, extra: dict[str, Any]) -> str:
        sregs = self.vcpu.get_sregs()
        for name, value in what.changes.items():
            if name == "cs.attrib":
                set_attributes(sregs.cs, value)
                continue
            if not isinstance(getattr(sregs, name, None), int):
                raise HarnessError(f"kvm_sregs has no register {name}")
            setattr(sregs, name, value)
        self.vcpu.set_sregs(sregs)
        return "ok"

    def _set_cpuid(self, what: SetCpuid, extra: dict[str, Any]) -> str:
        if what.feature not in FEATURES:
            raise HarnessError(f"no CPUID feature is called {what.feature} here")
        (self._hidden.discard if what.on else self._hidden.add)(what.feature)
        self.vcpu.set_cpuid2(self.cpuid())
        return "ok"

    def _get_nested_state(self, what: GetNestedState, extra: dict[str, Any]) -> str:
        # In guest mode KVM writes all of it before it finds that the buffer is too small.
        state: kvm_nested_state = kvm_nested_state.over(bytearray(max(what.size, _NESTED_BYTES)))
        state.size = what.size
        error = self.vcpu.try_call(self.vcpu.KVM_GET_NESTED_STATE, state)
        extra["get.size"] = state.size
        if error:
            return errno_name(error)
        extra["get.flags"] = state.flags
        self._kept = _bytes_of(state)[_HEADER_BYTES:_NESTED_BYTES]
        return "ok"

    def _set_nested_state(self, what: SetNestedState, extra: dict[str, Any]) -> str:
        # Always a whole buffer: `size` is what is claimed.
        blob = bytearray(_NESTED_BYTES)
        data = bytearray(self._kept if what.kept else _TEMPLATE)
        VMCB.write(data, what.changes)
        blob[_HEADER_BYTES:] = data
        state: kvm_nested_state = kvm_nested_state.over(blob)
        state.flags, state.format, state.size = what.flags, what.format, what.size
        state.hdr.svm.vmcb_pa = what.vmcb_pa
        error = self.vcpu.try_call(self.vcpu.KVM_SET_NESTED_STATE, state)
        return errno_name(error) if error else "ok"

    def _set_smm(self, what: SetSmm, extra: dict[str, Any]) -> str:
        events = self.vcpu.get_vcpu_events()
        events.smi.smm = int(what.on)
        self.vcpu.set_vcpu_events(events)
        return "ok"

    def _smi(self, what: Smi, extra: dict[str, Any]) -> str:
        self.vcpu.smi()
        return "ok"

    def _init(self, what: Init, extra: dict[str, Any]) -> str:
        events = self.vcpu.get_vcpu_events()
        events.smi.latched_init = 1
        self.vcpu.set_vcpu_events(events)
        return "ok"

    # The guest's memory

    def _write_vmcb(self, what: WriteVmcb, extra: dict[str, Any]) -> str:
        gpa = layout.SLOTS[f"vmcb_{what.vmcb}"].gpa
        VMCB.write(self._memory.vmcb(gpa), what.changes)
        return "ok"

    def _write_save_area(self, what: WriteSaveArea, extra: dict[str, Any]) -> str:
        area = SMRAM_LEGACY if what.legacy else SMRAM
        area.write(memoryview(self._memory.smram)[SMRAM_STATE_OFFSET:], what.changes)
        return "ok"

    def _write_host_save(self, what: WriteHostSave, extra: dict[str, Any]) -> str:
        gpa = layout.HSAVE_GPA
        VMCB.write(self._memory.vmcb(gpa), what.changes)
        return "ok"

    def _set_slot(self, what: SetSlot, extra: dict[str, Any]) -> str:
        if what.what not in layout.SLOTS:
            raise HarnessError(f"no slot is called {what.what}")
        self._memory.show(what.what, what.present)
        return "ok"

    def cpuid(self) -> list[kvm_cpuid_entry2]:
        """Return the vCPU's CPUID."""
        entries = self._policy.entries(self._supported, 0, 1)
        return list(without(entries, self._hidden))


def errno_name(number: int) -> str:
    """Return `EINVAL` of 22."""
    return errno.errorcode.get(number, f"errno {number}")


def _report(port: int) -> str:
    if port == code.REPORT_PORT:
        return "report"
    vector = port - code.VECTOR_PORT
    return vector_name(vector) if 0 <= vector < code.VECTORS else f"out {port:#x}"


def _ending(exit_: Exit | Kicked) -> str:
    if isinstance(exit_, IoExit):
        return f"in {exit_.port:#x}"
    names = {
        HltExit: "hlt",
        ShutdownExit: "shutdown",
        InternalErrorExit: "internal error",
        FailEntryExit: "fail entry",
        DebugExit: STEPPED,
        Interrupted: "intr",
    }
    return names.get(type(exit_), repr(exit_))


_IDLE: Final = (layout.IDLE_L1, layout.STACK_TOP)


def _template_data() -> bytes:
    data = bytearray(VMCB_SIZE)
    VMCB.write(data, layout.template_nested_state())
    return bytes(data)


_TEMPLATE: Final = _template_data()


def _bytes_of(state: kvm_nested_state) -> bytes:
    return ctypes.string_at(ctypes.addressof(state), state.allocated_bytes)


_DO: Final[dict[type, Callable[[BareBench, Any, dict[str, Any]], str]]] = {
    Execute: BareBench._execute,
    Resume: BareBench._resume,
    SetMsr: BareBench._set_msr,
    SetSregs: BareBench._set_sregs,
    SetCpuid: BareBench._set_cpuid,
    GetNestedState: BareBench._get_nested_state,
    SetNestedState: BareBench._set_nested_state,
    SetSmm: BareBench._set_smm,
    Smi: BareBench._smi,
    Init: BareBench._init,
    WriteVmcb: BareBench._write_vmcb,
    WriteSaveArea: BareBench._write_save_area,
    WriteHostSave: BareBench._write_host_save,
    StepRsm: BareBench._step_rsm,
    SetSlot: BareBench._set_slot,
}
