"""The header by which a multiboot image says how it is to be loaded."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from harness.machine.errors import ImageError

_MAGIC = 0x1BADB002
_SEARCH_BYTES = 8192
_BASIC = struct.Struct("<III")
_ADDRESSES = struct.Struct("<IIIII")
_HAS_ADDRESSES = 1 << 16
_UNSUPPORTED = 0xFFFC
"""Header flags this loader cannot honour: video mode, and must-haves that are not defined."""


@dataclass(frozen=True)
class LoadAddresses:
    """Where an image wants its bytes; they count instead of an ELF file's program headers."""

    start_in_file: int
    load_addr: int
    load_end_addr: int
    bss_end_addr: int
    entry_addr: int


@dataclass(frozen=True)
class MultibootHeader:
    """A multiboot 1 header (Multiboot Specification 0.6.96, 3.1)."""

    flags: int
    addresses: LoadAddresses | None


def find_multiboot_header(data: bytes, name: str) -> MultibootHeader | None:
    """Return the header in a file, None if it has none.

    Raises ImageError: it asks for what this loader does not do, or its addresses make no sense.
    """
    head = data[:_SEARCH_BYTES]
    for at in range(0, len(head) - _BASIC.size + 1, 4):
        magic, flags, checksum = _BASIC.unpack_from(head, at)
        if magic == _MAGIC and (magic + flags + checksum) & 0xFFFF_FFFF == 0:
            if flags & _UNSUPPORTED:
                raise ImageError(f"{name}: multiboot header flags {flags:#x} are not supported")
            has_addresses = flags & _HAS_ADDRESSES
            return MultibootHeader(flags, _addresses(data, at, name) if has_addresses else None)
    return None


def _addresses(data: bytes, at: int, name: str) -> LoadAddresses:
    """Read the address fields of the header at file offset `at`."""
    if at + _BASIC.size + _ADDRESSES.size > len(data):
        raise ImageError(f"{name}: truncated in its multiboot header")
    header, load, load_end, bss_end, entry = _ADDRESSES.unpack_from(data, at + _BASIC.size)
    start = at - (header - load)
    # Zero: to the end of the file, and no zeroes after that.
    load_end = load_end or load + len(data) - start
    bss_end = bss_end or load_end
    if not 0 <= start <= at or not load <= load_end <= bss_end or not load <= entry < load_end:
        raise ImageError(
            f"{name}: the addresses in its multiboot header make no sense: header {header:#x}, "
            f"load {load:#x}-{load_end:#x}, bss end {bss_end:#x}, entry {entry:#x}"
        )
    if start + load_end - load > len(data):
        raise ImageError(
            f"{name}: truncated, its multiboot header wants {start + load_end - load} bytes of "
            f"{len(data)}"
        )
    return LoadAddresses(start, load, load_end, bss_end, entry)
