"""A tiny real-mode guest on this machine's own KVM, of any vendor."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterator

import pytest

from kvm_ioctl.handles import Kvm, Vcpu, Vm

CODE_GPA = 0x1000
RAM_BYTES = 0x8000
"""Memory is at 0 to 0x8000; what is above exits as MMIO."""


class RealModeGuest:
    """One vCPU in real mode that starts at CODE_GPA with flat segments at 0."""

    def __init__(self, vm: Vm, code: bytes, flags: int = 0, vcpu_id: int = 0) -> None:
        self.vm = vm
        self.ram = mmap.mmap(-1, RAM_BYTES)
        self.ram[CODE_GPA : CODE_GPA + len(code)] = code
        hva = ctypes.addressof(ctypes.c_char.from_buffer(self.ram))
        vm.set_user_memory_region(0, 0, hva, RAM_BYTES, flags)
        self.vcpu: Vcpu = vm.create_vcpu(vcpu_id)
        self.restart()

    def restart(self) -> None:
        """Go to the start of the code."""
        sregs = self.vcpu.get_sregs()
        for segment in (sregs.cs, sregs.ds, sregs.es, sregs.ss):
            segment.base = segment.selector = 0
        self.vcpu.set_sregs(sregs)
        regs = self.vcpu.get_regs()
        regs.rip, regs.rflags, regs.rsp = CODE_GPA, 2, RAM_BYTES
        self.vcpu.set_regs(regs)


@pytest.fixture
def vm(kvm: Kvm) -> Vm:
    return kvm.create_vm()


@pytest.fixture
def guest(vm: Vm) -> Iterator[Callable[..., RealModeGuest]]:
    made = []  # keeps their memory mapped for as long as the VM may touch it

    def make(code: str, flags: int = 0) -> RealModeGuest:
        made.append(RealModeGuest(vm, bytes.fromhex(code), flags))
        return made[-1]

    yield make
    vm.close()
