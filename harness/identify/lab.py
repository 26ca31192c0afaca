"""A VM whose vCPU executes single instructions: as L1, as L2, as the SMI handler.

The host points RIP at a few bytes that end in a write to a port; which port tells who came there.
Exceptions have handlers that write their vector. L2 uses L1's memory and tables, without nested
paging. Addresses are guest-physical, and virtual as well.
"""

from __future__ import annotations

import errno
import struct
from typing import Any, Final, Self

from harness.machine.addresses import Gpa
from harness.machine.cpuid import CpuidPolicy
from harness.machine.hang import VcpuTimeout
from harness.machine.loader import EntryMode, Image, Segment
from harness.machine.machine import Machine
from harness.machine.memory import Slot
from harness.machine.vcpu import Kicked
from harness.model.layout import DR6_RESET, DR7_RESET, PAT_RESET
from harness.proxy.program import vector_name
from harness.svm.exit_codes import ExitCode
from harness.svm.intercepts import Intercept
from harness.svm.msrs import Efer, Msr
from harness.svm.smram import (
    DEFAULT_SMBASE,
    SMM_ENTRY_OFFSET,
    SMRAM_STATE_OFFSET,
    kvm_smram_state_64,
)
from harness.svm.vmcb import VMCB_SIZE, SegAttrib, vmcb
from kvm_ioctl.asm_kvm import (
    NestedStateFlags,
    kvm_nested_state,
    kvm_regs,
    kvm_segment,
    kvm_vcpu_events,
)
from kvm_ioctl.exits import Exit, InternalErrorExit, IoExit, ShutdownExit
from kvm_ioctl.handles import Kvm, KvmError, Vcpu

RUN_S: Final = 4.0
"""One KVM_RUN here is over in milliseconds, emulated too, unless it never ends."""

CODE: Final = Gpa(0x10_0000)
L2_CODE: Final = Gpa(0x10_1000)
_IDT: Final = Gpa(0x10_2000)
_HANDLERS: Final = Gpa(0x10_3000)
STACK_TOP: Final = 0x11_0000
_L2_STACK_TOP: Final = 0x11_8000
HSAVE: Final = Gpa(0x12_0000)

VMCB12: Final = Gpa(0x100_0000)
MSRPM: Final = Gpa(0x110_0000)
NOWHERE: Final = Gpa(0x200_0000)
"""A legal address without memory."""

_L1_PORT, _EXCEPTION_PORT, _L2_PORT, _SMM_PORT, _L2_LATER_PORT = 0x20, 0x21, 0x22, 0x24, 0x25
IN_L1, IN_L2, IN_SMM, LATER_IN_L2 = (
    "L1 goes on",
    "L2 runs",
    "the SMI handler runs",
    "L2's code goes on",
)
SHUTDOWN: Final = "KVM_EXIT_SHUTDOWN"
INTERNAL_ERROR: Final = "KVM_EXIT_INTERNAL_ERROR"
HANG: Final = "KVM_RUN does not return"
_PLACES: Final = {
    _L1_PORT: IN_L1,
    _L2_PORT: IN_L2,
    _SMM_PORT: IN_SMM,
    _L2_LATER_PORT: LATER_IN_L2,
}


def out(port: int) -> bytes:
    """Return the instruction that writes AL to a port."""
    return bytes((0xE6, port))


_VMRUN: Final = bytes.fromhex("0f01d8")
VMMCALL: Final = bytes.fromhex("0f01d9")
WRMSR: Final = bytes.fromhex("0f30")
RSM: Final = bytes.fromhex("0faa")
STOP_IN_L2: Final = out(_L2_PORT)
STOP_LATER_IN_L2: Final = out(_L2_LATER_PORT)
STOP_IN_L1: Final = out(_L1_PORT)
_HLT = b"\xf4"

_CS64 = 0x18
_INTERRUPT_GATE = 0x8E
_VECTORS = 32

GUEST_MODE: Final = NestedStateFlags.KVM_STATE_NESTED_GUEST_MODE
RUN_PENDING: Final = NestedStateFlags.KVM_STATE_NESTED_RUN_PENDING
GIF_SET: Final = NestedStateFlags.KVM_STATE_NESTED_GIF_SET


class Lab:
    """One VM of one vCPU, in 64-bit mode, with SVM in its CPUID; use it in a `with`."""

    def __init__(
        self, kvm: Kvm, *, cpuid: CpuidPolicy | None = None, smm: bool = False, svme: bool = True
    ) -> None:
        """Build it.

        Args:
            kvm: an open /dev/kvm.
            cpuid: changes to the guest's CPUID.
            smm: show the memory in the address space of SMM, with a handler in it.
            svme: start with EFER.SVME set, and with VM_HSAVE_PA.

        """
        image = Image("lab", EntryMode.LONG64, CODE, (Segment(CODE, _HLT, 1),))
        self.machine = Machine(kvm, image=image, memory_mib=4, cpuid=cpuid, smm=smm)
        self._runner = self.machine.vcpus[0]
        self.vcpu: Vcpu = self._runner.vcpu
        memory = self.machine.memory
        self.vmcb12_slot: Slot = memory.add(VMCB12, VMCB_SIZE)
        self.msrpm_slot: Slot = memory.add(MSRPM, 2 * VMCB_SIZE)
        self._write_idt()
        if smm:
            memory.write(Gpa(DEFAULT_SMBASE + SMM_ENTRY_OFFSET), out(_SMM_PORT) + RSM)
        if svme:
            self.set_svme(True)
            self.vcpu.set_msrs({Msr.MSR_VM_HSAVE_PA: HSAVE})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.machine.close()

    # Running

    def run(self, timeout_s: float = RUN_S) -> str:
        """Issue KVM_RUN once; return where the vCPU stopped, in words."""
        try:
            exit_ = self._runner.step(timeout_s)
        except VcpuTimeout:
            return HANG
        except KvmError as e:
            return f"KVM_RUN fails with {taken(e.errno or 0)}"
        if isinstance(exit_, IoExit):
            # Or the next run would end the OUT first, and drop an interrupt shadow set meanwhile.
            self._runner.finish_io()
        return _in_words(exit_)

    def execute(self, code: bytes, **registers: int) -> str:
        """Let the vCPU execute code, at the end of which L1 stops; return where it stopped."""
        self.machine.memory.write(CODE, code + STOP_IN_L1 + _HLT)
        self.vcpu.set_regs(kvm_regs(**{"rip": CODE, "rsp": STACK_TOP, "rflags": 2} | registers))
        return self.run()

    def vmrun(self, code: bytes, gpa: int = VMCB12, *, rflags: int = 2) -> str:
        """Let L1 execute VMRUN, and L2 this code; return where it stopped."""
        self.put_l2_code(code)
        return self.execute(_VMRUN, rax=gpa, rflags=rflags)

    def put_l2_code(self, code: bytes) -> None:
        """Write what L2 executes."""
        self.machine.memory.write(L2_CODE, code + _HLT)

    def start_at_l2_code(self) -> None:
        """Set the registers for L2, as they are when guest mode is entered by an ioctl."""
        self.vcpu.set_regs(kvm_regs(rip=L2_CODE, rsp=_L2_STACK_TOP, rflags=2))

    def smi(self) -> str:
        """Raise an SMI and run; return where it stopped."""
        self.vcpu.smi()
        return self.run()

    # State

    def set_svme(self, svme: bool) -> None:
        """Write EFER.SVME through KVM_SET_SREGS."""
        sregs = self.vcpu.get_sregs()
        sregs.efer = Efer(sregs.efer).replace(SVME=svme)
        self.vcpu.set_sregs(sregs)

    def set_events(self, change: Any) -> None:
        """Write what KVM_GET_VCPU_EVENTS gives, changed in place by `change`."""
        events: kvm_vcpu_events = self.vcpu.get_vcpu_events()
        change(events)
        self.vcpu.set_vcpu_events(events)

    def flags(self) -> int:
        """Return the flags of KVM_GET_NESTED_STATE."""
        return int(self.vcpu.get_nested_state().flags)

    @property
    def gif(self) -> bool:
        """GIF."""
        return bool(self.flags() & GIF_SET)

    @property
    def guest_mode(self) -> bool:
        """Whether L2 is current."""
        return bool(self.flags() & GUEST_MODE)

    def nested_vmcb(self) -> vmcb:
        """Return the data of KVM_GET_NESTED_STATE: the control area kept, and L1's save area."""
        return vmcb.from_bytes(bytes(self.vcpu.get_nested_state().data))

    def try_set_nested(self, flags: int, data: vmcb | None = None, *, vmcb_pa: int = VMCB12) -> str:
        """Return `taken`, or the errno of KVM_SET_NESTED_STATE in words."""
        state = kvm_nested_state.with_tail(VMCB_SIZE)
        state.flags, state.format = flags, 1
        state.hdr.svm.vmcb_pa = vmcb_pa
        state.data[:] = (data or self.template()).as_bytes()
        if flags & GUEST_MODE == 0:
            state.size = 128
        return taken(self.vcpu.try_call(Vcpu.KVM_SET_NESTED_STATE, state))

    # vmcb12 and the SMRAM save area, in the guest's memory

    def template(self) -> vmcb:
        """Return a vmcb12 that VMRUN takes, for L2 in L1's mode at `L2_CODE`."""
        sregs, made = self.vcpu.get_sregs(), vmcb()
        control, save = made.control, made.save
        control.set_intercept(Intercept.INTERCEPT_VMRUN)
        control.set_intercept(Intercept.INTERCEPT_VMMCALL)
        control.set_intercept(Intercept.INTERCEPT_SHUTDOWN)
        control.asid, control.msrpm_base_pa = 1, MSRPM
        for name in ("es", "cs", "ss", "ds", "fs", "gs", "tr"):
            _set_segment(getattr(save, name), getattr(sregs, name))
        for name, table in (("gdtr", sregs.gdt), ("idtr", sregs.idt)):
            getattr(save, name).base, getattr(save, name).limit = table.base, table.limit
        save.cr0, save.cr3, save.cr4 = sregs.cr0, sregs.cr3, sregs.cr4
        save.efer = Efer(sregs.efer).replace(SVME=1)
        save.dr6, save.dr7, save.g_pat = DR6_RESET, DR7_RESET, PAT_RESET
        save.rip, save.rsp, save.rflags = L2_CODE, _L2_STACK_TOP, 2
        return made

    def write_template(self) -> vmcb:
        """Write the template as vmcb12, and return it."""
        self.vmcb12 = made = self.template()
        return made

    @property
    def vmcb12(self) -> vmcb:
        """A copy of vmcb12 as it is in memory; assigning writes it."""
        return self.machine.memory.read_struct(vmcb, VMCB12)

    @vmcb12.setter
    def vmcb12(self, value: vmcb) -> None:
        self.machine.memory.write_struct(VMCB12, value)

    @property
    def save_area(self) -> kvm_smram_state_64:
        """A copy of the state that the SMI saved; assigning writes it."""
        return self.machine.memory.read_struct(kvm_smram_state_64, _SAVE_AREA)

    @save_area.setter
    def save_area(self, value: kvm_smram_state_64) -> None:
        self.machine.memory.write_struct(_SAVE_AREA, value)

    def _write_idt(self) -> None:
        memory = self.machine.memory
        for vector in range(_VECTORS):
            handler = _HANDLERS + 16 * vector
            memory.write(Gpa(handler), bytes((0xB0, vector)) + out(_EXCEPTION_PORT) + _HLT)
            gate = struct.pack("<HHBBHII", handler & 0xFFFF, _CS64, 0, _INTERRUPT_GATE,
                               handler >> 16 & 0xFFFF, handler >> 32, 0)  # fmt: skip
            memory.write(Gpa(_IDT + 16 * vector), gate)
        sregs = self.vcpu.get_sregs()
        sregs.idt.base, sregs.idt.limit = _IDT, 16 * _VECTORS - 1
        self.vcpu.set_sregs(sregs)


_SAVE_AREA: Final = Gpa(DEFAULT_SMBASE + SMRAM_STATE_OFFSET)


def taken(error: int) -> str:
    """Return an errno in words, 0 as `taken`."""
    return errno.errorcode.get(error, str(error)) if error else "taken"


def exit_name(code: int) -> str:
    """Return an exit code in words."""
    known = code in ExitCode._value2member_map_
    return ExitCode(code).name if known else f"exit code {code:#x}"


def _in_words(exit_: Exit | Kicked) -> str:
    if isinstance(exit_, IoExit):
        if exit_.port == _EXCEPTION_PORT:
            return vector_name(exit_.value)
        return _PLACES.get(exit_.port, str(exit_))
    if isinstance(exit_, ShutdownExit):
        return SHUTDOWN
    if isinstance(exit_, InternalErrorExit):
        return INTERNAL_ERROR
    return str(exit_)


def _set_segment(target: Any, source: kvm_segment) -> None:
    target.selector, target.base, target.limit = source.selector, source.base, source.limit
    if not source.unusable:
        target.attrib = SegAttrib.of(
            TYPE=source.type, S=source.s, DPL=source.dpl, P=source.present,
            AVL=source.avl, L=source.l, DB=source.db, G=source.g,
        )  # fmt: skip
