"""The state that vCPUs enter an image in: page tables, descriptor table, registers.

All of it lies in `ENTRY_AREA`, below the images and below the default SMBASE; for multiboot images
in `MULTIBOOT_AREA`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

from harness.machine.addresses import Gpa
from harness.machine.loader import EntryMode, Image
from harness.machine.memory import GuestMemory
from harness.machine.memory_map import MemoryRange
from harness.machine.multiboot import (
    MULTIBOOT_AREA,
    MULTIBOOT_BOOTLOADER_MAGIC,
    MULTIBOOT_GDT_GPA,
    MULTIBOOT_INFO_GPA,
    multiboot_info,
)
from harness.svm.msrs import Cr0, Cr4, Efer
from kvm_ioctl.asm_kvm import kvm_regs, kvm_segment, kvm_sregs

_GDT_GPA: Final = Gpa(0x1000)
_PML4_GPA: Final = Gpa(0x2000)
_PDPT_GPA: Final = Gpa(0x3000)
_PD_GPA: Final = Gpa(0x4000)
_PD_COUNT: Final = 4

ENTRY_AREA: Final = range(_GDT_GPA, 0x9000)
"""Guest memory that no image may occupy which is entered in 64-bit or plain protected mode."""

_CS32, _DS, _CS64 = 0x08, 0x10, 0x18
_GDT = (0, 0x00CF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF, 0x00AF_9B00_0000_FFFF)

_PRESENT_WRITABLE_USER_ACCESSED = 0x27
_LARGE_DIRTY = 0xC0
_LARGE_PAGE_BYTES = 2 << 20
_PROTECTED = Cr0.of(PE=1, ET=1, NE=1)
_RFLAGS_FIXED = 0x2
_BUSY_TSS = 11


def reserved_memory(mode: EntryMode) -> list[range]:
    """Return the guest memory that an entry mode needs for itself."""
    if mode is EntryMode.REAL16:
        return []
    return [MULTIBOOT_AREA if mode is EntryMode.MULTIBOOT32 else ENTRY_AREA]


def prepare_entry(
    memory: GuestMemory,
    image: Image,
    command_line: str = "",
    memory_map: Sequence[MemoryRange] | None = None,
) -> None:
    """Write the tables that the image's entry mode needs into `reserved_memory`.

    Args:
        memory: of the guest.
        image: what will be entered.
        command_line: for multiboot images.
        memory_map: for multiboot images; by default all slots are RAM.

    Raises MachineError: the command line is too long.

    """
    if image.mode is EntryMode.REAL16:
        return
    memory.write(_gdt_gpa(image.mode), struct.pack(f"<{len(_GDT)}Q", *_GDT))
    if image.mode is EntryMode.LONG64:
        _write_identity_map(memory)
    elif image.mode is EntryMode.MULTIBOOT32:
        slots = [MemoryRange(slot.gpa, slot.size_bytes) for slot in memory.slots()]
        info = multiboot_info(slots if memory_map is None else memory_map, command_line)
        memory.write(MULTIBOOT_INFO_GPA, info)


def entry_sregs(sregs: kvm_sregs, mode: EntryMode) -> kvm_sregs:
    """Return a vCPU's reset state changed into that of an entry mode."""
    sregs = sregs.copy()
    if mode is EntryMode.REAL16:
        sregs.cs.selector = sregs.cs.base = 0
        return sregs
    long_mode = mode is EntryMode.LONG64
    _set_flat_segments(sregs, long_mode)
    sregs.gdt.base = _gdt_gpa(mode)
    sregs.cr0 = _PROTECTED
    if long_mode:
        sregs.cr0 = _PROTECTED.replace(PG=1)
        sregs.cr3 = _PML4_GPA
        sregs.cr4 = Cr4.of(PAE=1)
        sregs.efer = Efer.of(LME=1, LMA=1)
    return sregs


def entry_regs(image: Image, index: int) -> kvm_regs:
    """Return the general registers for the entry of vCPU `index`."""
    regs = kvm_regs(rip=image.entry, rflags=_RFLAGS_FIXED)
    if image.mode is EntryMode.MULTIBOOT32:
        regs.rax = MULTIBOOT_BOOTLOADER_MAGIC
        regs.rbx = MULTIBOOT_INFO_GPA
    else:
        regs.rdi = index
    return regs


def _gdt_gpa(mode: EntryMode) -> Gpa:
    return MULTIBOOT_GDT_GPA if mode is EntryMode.MULTIBOOT32 else _GDT_GPA


def _set_flat_segments(sregs: kvm_sregs, long_mode: bool) -> None:
    sregs.cs = _flat(_CS64 if long_mode else _CS32, 11, long_mode)
    for name in ("ds", "es", "fs", "gs", "ss"):
        setattr(sregs, name, _flat(_DS, 3, False))
    sregs.tr = kvm_segment(limit=0x67, type=_BUSY_TSS, present=1)
    sregs.ldt = kvm_segment(unusable=1)
    sregs.gdt.limit = 8 * len(_GDT) - 1
    sregs.idt.base = sregs.idt.limit = 0


def _flat(selector: int, kind: int, long_mode: bool) -> kvm_segment:
    return kvm_segment(
        limit=0xFFFF_FFFF,
        selector=selector,
        type=kind,
        present=1,
        db=int(not long_mode),
        s=1,
        l=int(long_mode),
        g=1,
    )


def _write_identity_map(memory: GuestMemory) -> None:
    """Map the low 4 GiB to themselves with 2 MiB pages."""
    flags = _PRESENT_WRITABLE_USER_ACCESSED
    memory.write_int(_PML4_GPA, 8, _PDPT_GPA | flags)
    tables = [_PD_GPA + i * 4096 | flags for i in range(_PD_COUNT)]
    memory.write(_PDPT_GPA, struct.pack(f"<{_PD_COUNT}Q", *tables))
    pages = [i * _LARGE_PAGE_BYTES | flags | _LARGE_DIRTY for i in range(512 * _PD_COUNT)]
    memory.write(_PD_GPA, struct.pack(f"<{len(pages)}Q", *pages))
