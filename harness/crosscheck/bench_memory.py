"""The memory of a bench: RAM, SMRAM, and the slots that show them to the guest."""

from __future__ import annotations

import ctypes
import mmap
from contextlib import ExitStack
from typing import Final

from harness.crosscheck import code
from harness.crosscheck.fields import VMCB
from harness.machine.memory import PAGE_SIZE, SMRAM_AS_ID
from harness.model import layout
from harness.svm.vmcb import VMCB_SIZE
from kvm_ioctl.capabilities import Cap
from kvm_ioctl.handles import Vm

_RAM_BYTES: Final = 0x12_0000
_SPARE_GPA: Final = 0x11_8000
"""In no slot of the layout."""
_TSS_GPA: Final = 0xFFFB_D000
"""Three pages that KVM on Intel needs below 4 GiB (KVM_SET_TSS_ADDR)."""
_BASE: Final = "base"
_NUMBERS: Final = {name: number for number, name in enumerate((_BASE, *layout.SLOTS))}


class BenchMemory:
    """Memory with the layout's content; the host reads and writes it whether a slot is there."""

    def __init__(self, stack: ExitStack) -> None:
        """Make it; `stack` unmaps it, which must come after the end of the VM."""
        self.ram = stack.enter_context(mmap.mmap(-1, _RAM_BYTES, mmap.MAP_PRIVATE))
        """Address space 0, by gpa."""
        size_bytes = layout.SLOTS["smram"].size_bytes
        self.smram = stack.enter_context(mmap.mmap(-1, size_bytes, mmap.MAP_PRIVATE))
        """SMRAM of address space 1, by offset from SMBASE."""
        self._fill()

    def show_all(self, vm: Vm) -> None:
        """Give a VM all slots.

        Raises KvmError: KVM refused one.
        """
        self._vm = vm
        self._has_smm = bool(vm.check_extension(Cap.KVM_CAP_X86_SMM))
        if vm.check_extension(Cap.KVM_CAP_SET_TSS_ADDR):
            vm.set_tss_addr(_TSS_GPA)
        for name in _NUMBERS:
            self.show(name, True)
        # A copy, and never taken away: real-mode code goes on there when SMM is left by force.
        low = layout.SLOTS["smram"]
        at = _hva(self.ram) + low.gpa
        vm.set_user_memory_region(len(_NUMBERS), low.gpa, at, low.size_bytes)

    def show(self, name: str, present: bool) -> None:
        """Put a slot of the layout there, or take it away; its content is kept.

        Raises KvmError: KVM refused it: the slot is not there already.
        """
        slot = layout.BASE if name == _BASE else layout.SLOTS[name]
        smram = name == "smram"
        hva = _hva(self.smram) if smram else _hva(self.ram) + slot.gpa
        for as_id in (SMRAM_AS_ID,) if smram else (0, SMRAM_AS_ID):
            if as_id == SMRAM_AS_ID and not self._has_smm:
                continue
            if present:
                self._vm.set_user_memory_region(
                    _NUMBERS[name], slot.gpa, hva, slot.size_bytes, as_id=as_id
                )
            else:
                self._vm.delete_memory_region(_NUMBERS[name], as_id=as_id)

    def vmcb(self, gpa: int) -> memoryview:
        """Return the page of a VMCB, to be written."""
        return memoryview(self.ram)[gpa : gpa + VMCB_SIZE]

    def renew_roots(self) -> None:
        """Make KVM drop all roots of page tables: it does when a slot goes."""
        number = len(_NUMBERS) + 1
        at = _hva(self.ram) + _SPARE_GPA
        self._vm.set_user_memory_region(number, _SPARE_GPA, at, PAGE_SIZE)
        self._vm.delete_memory_region(number)

    def _fill(self) -> None:
        for gpa, data in code.base_memory():
            self.ram[gpa : gpa + len(data)] = data
        low = layout.SLOTS["smram"].gpa
        for offset, data in code.smram_memory():
            self.smram[offset : offset + len(data)] = data
            self.ram[low + offset : low + offset + len(data)] = data
        for gpa in (layout.VMCB_A_GPA, layout.VMCB_B_GPA):
            VMCB.write(self.vmcb(gpa), layout.template_vmcb12())


def _hva(backing: mmap.mmap) -> int:
    # The c_char is dropped at once: as long as it lives, the mapping cannot be closed.
    return ctypes.addressof(ctypes.c_char.from_buffer(backing))
