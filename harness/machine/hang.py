"""Where a vCPU was when its time was up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from harness.errors import ScenarioFailure
from harness.machine.addresses import Gpa, Gva
from harness.machine.errors import GuestMemoryError
from harness.machine.memory import GuestMemory
from kvm_ioctl.asm_kvm import NestedStateFlags
from kvm_ioctl.capabilities import Cap
from kvm_ioctl.handles import Vcpu, Vm
from kvm_ioctl.request import KvmError

_CODE_BYTES = 16


@dataclass(frozen=True)
class NestedWhere:
    """What KVM_GET_NESTED_STATE says of a vCPU."""

    guest_mode: bool
    run_pending: bool
    gif: bool
    vmcb12_gpa: Gpa


@dataclass(frozen=True)
class Hang:
    """A vCPU that did not leave KVM_RUN in time, as found afterwards."""

    index: int
    timeout_s: float
    rip: Gva
    cs_selector: int
    cs_base: int
    efer: int
    cr0: int
    cr3: int
    cr4: int
    code: bytes | None
    """Bytes at CS:RIP, None if they cannot be read."""
    nested: NestedWhere | None
    """None where KVM has no nested state."""
    last_exits: tuple[str, ...]

    def __str__(self) -> str:
        code = "unreadable" if self.code is None else self.code.hex(" ")
        return (
            f"vCPU {self.index} did not stop within {self.timeout_s:g} s: rip={self.rip:#x} "
            f"cs={self.cs_selector:#x} (base {self.cs_base:#x}) efer={self.efer:#x} "
            f"cr0={self.cr0:#x} cr3={self.cr3:#x} cr4={self.cr4:#x} code={code}"
            f"{self._nested_text()}; last exits: {', '.join(self.last_exits) or 'none'}"
        )

    def _nested_text(self) -> str:
        if self.nested is None:
            return ""
        if not self.nested.guest_mode:
            return f" in L1, GIF={int(self.nested.gif)}"
        return f" in L2 of vmcb12 {self.nested.vmcb12_gpa:#x}"


class VcpuTimeout(ScenarioFailure):
    """A vCPU was still running at its deadline; it was stopped and `hang` says where."""

    def __init__(self, hang: Hang) -> None:
        super().__init__(str(hang))
        self.hang = hang


class VcpuStuck(ScenarioFailure):
    """A thread did not leave KVM_RUN whatever was done; only the end of the process helps."""


def describe_hang(
    vm: Vm,
    vcpu: Vcpu,
    memory: GuestMemory,
    *,
    index: int,
    timeout_s: float,
    last_exits: Sequence[str],
) -> Hang:
    """Look at a vCPU that was just kicked out of KVM_RUN."""
    regs, sregs = vcpu.get_regs(), vcpu.get_sregs()
    return Hang(
        index=index,
        timeout_s=timeout_s,
        rip=Gva(regs.rip),
        cs_selector=sregs.cs.selector,
        cs_base=sregs.cs.base,
        efer=sregs.efer,
        cr0=sregs.cr0,
        cr3=sregs.cr3,
        cr4=sregs.cr4,
        code=_code_at(vcpu, memory, Gva(sregs.cs.base + regs.rip)),
        nested=nested_where(vm, vcpu),
        last_exits=tuple(last_exits),
    )


def nested_where(vm: Vm, vcpu: Vcpu) -> NestedWhere | None:
    """Return whether L2 is current, or None where KVM has no nested state."""
    if not vm.check_extension(Cap.KVM_CAP_NESTED_STATE):
        return None
    try:
        state = vcpu.get_nested_state()
    except KvmError:
        return None
    flags = NestedStateFlags(state.flags)
    return NestedWhere(
        guest_mode=NestedStateFlags.KVM_STATE_NESTED_GUEST_MODE in flags,
        run_pending=NestedStateFlags.KVM_STATE_NESTED_RUN_PENDING in flags,
        gif=NestedStateFlags.KVM_STATE_NESTED_GIF_SET in flags,
        vmcb12_gpa=Gpa(state.hdr.svm.vmcb_pa),
    )


def _code_at(vcpu: Vcpu, memory: GuestMemory, gva: Gva) -> bytes | None:
    """Return the bytes at an address as KVM translates it, up to the end of its page."""
    try:
        where = vcpu.translate(gva)
        if not where.valid:
            return None
        count = min(_CODE_BYTES, 4096 - gva % 4096)
        return memory.read(Gpa(where.physical_address), count)
    except (KvmError, GuestMemoryError):
        return None
