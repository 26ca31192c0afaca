"""The members of a kernel module's structs, from its BTF (/sys/kernel/btf; kernel: linux/btf.h)."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from harness.errors import HostError

_BTF: Final = Path("/sys/kernel/btf")
_MAGIC: Final = 0xEB9F
_HEADER: Final = struct.Struct("<HBBIIIII")
_TYPE: Final = struct.Struct("<III")
_MEMBER_BYTES: Final = 12
_STRUCT: Final = 4
#: Bytes after `struct btf_type`, by kind: for the type as such, and for each of its `vlen`.
_TAILS: Final = {
    1: (4, 0), 2: (0, 0), 3: (12, 0), 4: (0, 12), 5: (0, 12), 6: (0, 8), 7: (0, 0), 8: (0, 0),
    9: (0, 0), 10: (0, 0), 11: (0, 0), 12: (0, 0), 13: (0, 8), 14: (4, 0), 15: (0, 12),
    16: (0, 0), 17: (4, 0), 18: (0, 0), 19: (0, 12),
}  # fmt: skip


def struct_members(module: str, name: str, directory: Path = _BTF) -> list[str] | None:
    """Return the names of a struct's members, in order; None if the module has no such struct.

    Raises:
        HostError: there is no BTF of the module, or it cannot be read.
    """
    try:
        base, data = ((directory / file).read_bytes() for file in ("vmlinux", module))
    except OSError as e:
        raise HostError(f"no type information of {module}: {e.strerror or e}") from e
    for found, members in _structs(data, _strings(base)):
        if found == name:
            return members
    return None


def _section_sizes(data: bytes) -> tuple[int, int, int, int, int]:
    """Return header length, type offset and length, string offset and length."""
    magic, _, _, *sizes = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise HostError(f"no BTF: its magic is {magic:#x}")
    header, type_off, type_len, str_off, str_len = sizes
    return header, type_off, type_len, str_off, str_len


def _strings(data: bytes) -> bytes:
    header, _, _, str_off, str_len = _section_sizes(data)
    return data[header + str_off : header + str_off + str_len]


def _structs(data: bytes, base: bytes) -> Iterator[tuple[str, list[str]]]:
    """Yield name and members of every struct; strings go on where the kernel's own (`base`) end."""
    header, type_off, type_len, *_ = _section_sizes(data)
    strings = base + _strings(data)

    def text(offset: int) -> str:
        return strings[offset : strings.index(0, offset)].decode()

    at, end = header + type_off, header + type_off + type_len
    while at < end:
        name, info, _ = _TYPE.unpack_from(data, at)
        kind, vlen = info >> 24 & 0x1F, info & 0xFFFF
        if kind not in _TAILS:
            raise HostError(f"BTF has a type of the unknown kind {kind}")
        fixed, each = _TAILS[kind]
        at += _TYPE.size
        if kind == _STRUCT and name:
            offsets = range(at, at + vlen * _MEMBER_BYTES, _MEMBER_BYTES)
            yield text(name), [text(int.from_bytes(data[m : m + 4], "little")) for m in offsets]
        at += fixed + each * vlen
