"""What a multiboot loader hands over (Multiboot Specification 0.6.96, 3.2 and 3.3)."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

from harness.machine.addresses import Gpa
from harness.machine.errors import MachineError
from harness.machine.memory_map import EBDA_GPA, MemoryRange, lower_kib, upper_kib

MULTIBOOT_BOOTLOADER_MAGIC: Final = 0x2BADB002
"""EAX at the entry of a multiboot image."""

MULTIBOOT_AREA: Final = range(0x9_B000, EBDA_GPA)
"""Guest memory for descriptor table and information.

High up in conventional memory: real-mode images and start-up code for APs lie further down.
"""

MULTIBOOT_GDT_GPA: Final = Gpa(MULTIBOOT_AREA.start)
MULTIBOOT_INFO_GPA: Final = Gpa(MULTIBOOT_AREA.start + 0x100)
"""EBX at the entry."""
_TEXT_GPA: Final = Gpa(MULTIBOOT_AREA.start + 0x200)

_INFO_MEMORY, _INFO_CMDLINE, _INFO_MMAP, _INFO_LOADER_NAME = 1 << 0, 1 << 2, 1 << 6, 1 << 9
_CMDLINE_AT, _MMAP_AT, _LOADER_NAME_AT = 16, 44, 64
_LOADER_NAME = b"nsvm\0"
_ENTRY = struct.Struct("<IQQI")
"""size (of what follows it), base_addr, length, type."""


def multiboot_info(ranges: Sequence[MemoryRange], command_line: str) -> bytes:
    """Return the information structure and what it points to, to lie at `MULTIBOOT_INFO_GPA`.

    There are no modules.

    Raises MachineError: the command line is too long for `MULTIBOOT_AREA`.
    """
    size = _ENTRY.size - 4
    entries = b"".join(_ENTRY.pack(size, r.gpa, r.size_bytes, r.kind) for r in ranges)
    text = command_line.encode("utf-8", "surrogateescape") + b"\0"
    mmap_gpa = _TEXT_GPA + len(_LOADER_NAME)
    text_gpa = mmap_gpa + len(entries)
    if text_gpa + len(text) > MULTIBOOT_AREA.stop:
        raise MachineError(f"a command line of {len(text)} bytes is too long for multiboot")
    info = bytearray(_TEXT_GPA - MULTIBOOT_INFO_GPA)
    flags = _INFO_MEMORY | _INFO_CMDLINE | _INFO_MMAP | _INFO_LOADER_NAME
    struct.pack_into("<III", info, 0, flags, lower_kib(ranges), upper_kib(ranges))
    struct.pack_into("<I", info, _CMDLINE_AT, text_gpa)
    struct.pack_into("<II", info, _MMAP_AT, len(entries), mmap_gpa)
    struct.pack_into("<I", info, _LOADER_NAME_AT, _TEXT_GPA)
    return bytes(info) + _LOADER_NAME + entries + text
