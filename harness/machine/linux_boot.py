"""Linux by the 64-bit boot protocol: where kernel, initrd and parameters go, and how it is entered.

Documentation/arch/x86/boot.rst ("64-bit Boot Protocol") and zero-page.rst; struct boot_params and
setup_header of asm/bootparam.h. An uncompressed ELF is entered at its own entry point (startup_64)
in the same state.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from harness.machine.addresses import Gpa
from harness.machine.errors import ImageError
from harness.machine.loader import elf_layout
from harness.machine.memory import GuestMemory
from harness.machine.memory_map import HIGH_START, LOW_LIMIT, MemoryRange
from harness.svm.msrs import Cr0, Cr4, Efer
from kvm_ioctl.asm_kvm import kvm_regs, kvm_segment, kvm_sregs

GDT_GPA: Final = Gpa(0x500)
PAGE_TABLES_GPA: Final = Gpa(0x9000)
BOOT_PARAMS_GPA: Final = Gpa(0x7000)
COMMAND_LINE_GPA: Final = Gpa(0x2_0000)
COMMAND_LINE_BYTES: Final = 2048
"""What x86 takes (COMMAND_LINE_SIZE), the final zero included."""

_BOOT_CS, _BOOT_DS = 0x10, 0x18
_GDT = (0, 0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF)
_PRESENT_WRITABLE, _LARGE = 0x03, 0x80
_PAGE, _LARGE_PAGE, _GIB = 4096, 2 << 20, 1 << 30
_MAPPED_GIB = 4
_BUSY_TSS = 11

# struct boot_params
_E820_ENTRIES, _E820_TABLE, _E820_MAX = 0x1E8, 0x2D0, 128
_HDR, _HDR_END = 0x1F1, 0x290
# struct setup_header, by its place in boot_params
_SETUP_SECTS, _BOOT_FLAG, _JUMP, _HEADER, _VERSION = 0x1F1, 0x1FE, 0x201, 0x202, 0x206
_TYPE_OF_LOADER, _LOADFLAGS = 0x210, 0x211
_RAMDISK_IMAGE, _RAMDISK_SIZE, _CMD_LINE_PTR, _INITRD_ADDR_MAX = 0x218, 0x21C, 0x228, 0x22C
_KERNEL_ALIGNMENT, _XLOADFLAGS, _CMDLINE_SIZE = 0x230, 0x236, 0x238
_PREF_ADDRESS, _INIT_SIZE = 0x258, 0x260

_HDRS, _BOOT_FLAG_MAGIC = b"HdrS", 0xAA55
_UNDEFINED_LOADER = 0xFF
_LOADED_HIGH = 0x01
_XLF_KERNEL_64 = 0x01
_OLDEST_PROTOCOL = 0x20C
"""The first with xloadflags, which say that there is a 64-bit entry point."""
_STARTUP_64 = 0x200
_INITRD_LIMIT = 0x7FFF_FFFF
_COPY_BYTES = 64 << 10


@dataclass(frozen=True)
class LinuxBoot:
    """What to boot, and what the kernel is told."""

    kernel: memoryview
    """A bzImage or an uncompressed ELF."""
    initrd: memoryview | None = None
    command_line: str = ""
    name: str = "kernel"
    """For errors."""


@dataclass(frozen=True)
class _Piece:
    """A run of a file's bytes, and where it goes."""

    gpa: int
    offset: int
    size_bytes: int


@dataclass(frozen=True)
class _Kernel:
    entry: Gpa
    pieces: tuple[_Piece, ...]
    end: int
    """The first address that the kernel leaves alone while it starts."""
    header: bytes
    """The file's own setup_header, from `_HDR` on; empty for an ELF."""


def map_file(path: Path) -> memoryview:
    """Return the bytes of a file without reading them.

    Raises ImageError: it cannot be read, or is empty.
    """
    try:
        with path.open("rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as e:
        raise ImageError(f"{path}: {getattr(e, 'strerror', None) or e}") from e


def load_linux(memory: GuestMemory, boot: LinuxBoot, ram: Sequence[MemoryRange]) -> Gpa:
    """Place kernel, initrd, command line, boot_params and page tables; return the entry point.

    Args:
        memory: of the guest, all zeroes.
        boot: what to load.
        ram: the memory map that the kernel is told (e820).

    Raises ImageError: unreadable, no such kernel, or it does not fit into memory.

    """
    low_end = max((r.end for r in ram if HIGH_START <= r.end <= LOW_LIMIT), default=0)
    kernel = _parse(boot.kernel, boot.name)
    if kernel.end > low_end:
        raise ImageError(f"{boot.name}: needs memory up to {kernel.end:#x}, has {low_end:#x}")
    for piece in kernel.pieces:
        _copy(memory, boot.kernel, piece)
    initrd = _load_initrd(memory, boot, kernel, low_end)
    _write_command_line(memory, boot.command_line)
    memory.write(BOOT_PARAMS_GPA, _boot_params(kernel, initrd, ram))
    memory.write(GDT_GPA, struct.pack(f"<{len(_GDT)}Q", *_GDT))
    _write_page_tables(memory)
    return kernel.entry


def linux_sregs(reset: kvm_sregs) -> kvm_sregs:
    """Return a vCPU's reset state changed into what the 64-bit entry point expects."""
    sregs = reset.copy()
    sregs.cs = _segment(_BOOT_CS, 11, long_mode=True)
    for name in ("ds", "es", "fs", "gs", "ss"):
        setattr(sregs, name, _segment(_BOOT_DS, 3, long_mode=False))
    sregs.tr = kvm_segment(limit=0x67, type=_BUSY_TSS, present=1)
    sregs.ldt = kvm_segment(unusable=1)
    sregs.gdt.base, sregs.gdt.limit = GDT_GPA, 8 * len(_GDT) - 1
    sregs.idt.base = sregs.idt.limit = 0
    sregs.cr0 = Cr0.of(PE=1, ET=1, NE=1, PG=1)
    sregs.cr3 = PAGE_TABLES_GPA
    sregs.cr4 = Cr4.of(PAE=1)
    sregs.efer = Efer.of(LME=1, LMA=1)
    return sregs


def linux_regs(entry: Gpa) -> kvm_regs:
    """Return the general registers for the entry: RSI points to boot_params."""
    return kvm_regs(rip=entry, rsi=BOOT_PARAMS_GPA, rflags=2)


# The kernel


def _parse(data: memoryview, name: str) -> _Kernel:
    if bytes(data[:4]) == b"\x7fELF":
        layout = elf_layout(data, name)
        pieces = tuple(_Piece(at.gpa, at.offset, at.in_file) for at in layout.segments)
        return _Kernel(layout.entry, pieces, max(at.end for at in layout.segments), b"")
    if bytes(data[_HEADER : _HEADER + 4]) == _HDRS:
        return _parse_bzimage(data, name)
    raise ImageError(f"{name}: neither an ELF nor a bzImage")


def _parse_bzimage(data: memoryview, name: str) -> _Kernel:
    version = _field(data, _VERSION, "H")
    if version < _OLDEST_PROTOCOL or not _field(data, _XLOADFLAGS, "H") & _XLF_KERNEL_64:
        raise ImageError(f"{name}: boot protocol {version:#x} has no 64-bit entry point")
    start = ((data[_SETUP_SECTS] or 4) + 1) * 512
    at = _field(data, _PREF_ADDRESS, "Q")
    end = at + max(_field(data, _INIT_SIZE, "I"), len(data) - start)
    header_end = _HEADER + data[_JUMP]
    return _Kernel(
        Gpa(at + _STARTUP_64),
        (_Piece(at, start, len(data) - start),),
        end,
        bytes(data[_HDR : min(header_end, _HDR_END)]),
    )


def _field(data: memoryview, at: int, kind: str) -> int:
    value: int = struct.unpack_from(f"<{kind}", data, at)[0]
    return value


def _copy(memory: GuestMemory, data: memoryview, piece: _Piece) -> None:
    """Copy a piece of a file; what is zero stays untouched, and so unpopulated."""
    zeroes = bytes(_COPY_BYTES)
    for start in range(0, piece.size_bytes, _COPY_BYTES):
        count = min(_COPY_BYTES, piece.size_bytes - start)
        chunk = bytes(data[piece.offset + start : piece.offset + start + count])
        if chunk != zeroes[:count]:
            memory.write(Gpa(piece.gpa + start), chunk)


# What it is told


def _load_initrd(
    memory: GuestMemory, boot: LinuxBoot, kernel: _Kernel, low_end: int
) -> tuple[int, int]:
    """Place the initrd as high as it may lie; return its address and size, zeroes without one."""
    if boot.initrd is None:
        return 0, 0
    size = len(boot.initrd)
    at = (min(low_end, _INITRD_LIMIT + 1) - size) & -_PAGE
    if at < kernel.end:
        raise ImageError(
            f"{boot.name}: an initrd of {size >> 20} MiB does not fit between {kernel.end:#x} and"
            f" {low_end:#x}"
        )
    _copy(memory, boot.initrd, _Piece(at, 0, size))
    return at, size


def _write_command_line(memory: GuestMemory, text: str) -> None:
    data = text.encode("utf-8", "surrogateescape") + b"\0"
    if len(data) > COMMAND_LINE_BYTES:
        raise ImageError(f"a command line of {len(data)} bytes, {COMMAND_LINE_BYTES} at most")
    memory.write(COMMAND_LINE_GPA, data)


def _boot_params(kernel: _Kernel, initrd: tuple[int, int], ram: Sequence[MemoryRange]) -> bytes:
    page = bytearray(_PAGE)
    for at, kind, value in _header_fields(kernel):
        struct.pack_into(f"<{kind}", page, at, value)
    page[_HEADER : _HEADER + 4] = _HDRS
    if kernel.header:
        page[_HDR : _HDR + len(kernel.header)] = kernel.header
    ours: tuple[tuple[int, str, int], ...] = (
        (_TYPE_OF_LOADER, "B", _UNDEFINED_LOADER),
        (_RAMDISK_IMAGE, "I", initrd[0]),
        (_RAMDISK_SIZE, "I", initrd[1]),
        (_CMD_LINE_PTR, "I", COMMAND_LINE_GPA),
        (_E820_ENTRIES, "B", min(len(ram), _E820_MAX)),
    )
    for at, kind, value in ours:
        struct.pack_into(f"<{kind}", page, at, value)
    for index, line in enumerate(ram[:_E820_MAX]):
        place = _E820_TABLE + 20 * index
        struct.pack_into("<QQI", page, place, line.gpa, line.size_bytes, line.kind)
    return bytes(page)


def _header_fields(kernel: _Kernel) -> Iterator[tuple[int, str, int]]:
    """Yield what an ELF, which has no header of its own, would say there."""
    yield _BOOT_FLAG, "H", _BOOT_FLAG_MAGIC
    yield _VERSION, "H", _OLDEST_PROTOCOL
    yield _LOADFLAGS, "B", _LOADED_HIGH
    yield _INITRD_ADDR_MAX, "I", _INITRD_LIMIT
    yield _KERNEL_ALIGNMENT, "I", _LARGE_PAGE
    yield _XLOADFLAGS, "H", _XLF_KERNEL_64
    yield _CMDLINE_SIZE, "I", COMMAND_LINE_BYTES - 1


def _write_page_tables(memory: GuestMemory) -> None:
    """Map the low 4 GiB to themselves with 2 MiB pages."""
    pdpt, first_pd = PAGE_TABLES_GPA + _PAGE, PAGE_TABLES_GPA + 2 * _PAGE
    memory.write_int(PAGE_TABLES_GPA, 8, pdpt | _PRESENT_WRITABLE)
    tables = [first_pd + i * _PAGE | _PRESENT_WRITABLE for i in range(_MAPPED_GIB)]
    memory.write(Gpa(pdpt), struct.pack(f"<{len(tables)}Q", *tables))
    count = _MAPPED_GIB * _GIB // _LARGE_PAGE
    pages = [i * _LARGE_PAGE | _PRESENT_WRITABLE | _LARGE for i in range(count)]
    memory.write(Gpa(first_pd), struct.pack(f"<{count}Q", *pages))


def _segment(selector: int, kind: int, *, long_mode: bool) -> kvm_segment:
    flags = {"db": int(not long_mode), "l": int(long_mode), "s": 1, "g": 1, "present": 1}
    return kvm_segment(limit=0xFFFF_FFFF, selector=selector, type=kind, **flags)
