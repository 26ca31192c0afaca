"""Guest images: raw code, ELF64, ELF32, and files with a multiboot header."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise
from pathlib import Path

from harness.machine.addresses import Gpa
from harness.machine.errors import GuestMemoryError, ImageError
from harness.machine.memory import GuestMemory
from harness.machine.multiboot_header import find_multiboot_header


class EntryMode(Enum):
    """The state that a vCPU enters an image in."""

    REAL16 = "16-bit real mode"
    PROTECTED32 = "32-bit protected mode"
    MULTIBOOT32 = "32-bit protected mode with multiboot information"
    LONG64 = "64-bit mode"


@dataclass(frozen=True)
class Segment:
    """A piece of an image: bytes, then zeroes up to its size."""

    gpa: Gpa
    data: bytes
    size_bytes: int

    @property
    def end(self) -> int:
        """The first address past the segment."""
        return self.gpa + self.size_bytes

    def __str__(self) -> str:
        return f"segment {self.gpa:#x}-{self.end - 1:#x}"


@dataclass(frozen=True)
class Image:
    """A parsed image, ready to be placed in guest memory."""

    name: str
    mode: EntryMode
    entry: Gpa
    segments: tuple[Segment, ...]
    symbols: Mapping[str, int] = field(default_factory=dict)

    def symbol(self, name: str) -> Gpa:
        """Return a symbol's address.

        Raises ImageError: the image has no such symbol.
        """
        if name not in self.symbols:
            raise ImageError(f"{self.name}: no symbol {name}")
        return Gpa(self.symbols[name])

    def place(self, memory: GuestMemory, reserved: Iterable[range] = ()) -> None:
        """Write the segments to guest memory.

        Raises ImageError: a segment is outside memory, on another one, or on a reserved range.
        """
        self._check_overlaps(list(reserved))
        for segment in self.segments:
            try:
                memory.zero(
                    Gpa(segment.gpa + len(segment.data)), segment.size_bytes - len(segment.data)
                )
                memory.write(segment.gpa, segment.data)
            except GuestMemoryError as e:
                raise ImageError(f"{self.name}: {segment} is outside memory: {e}") from e

    def check(self, ram: Sequence[range], reserved: Iterable[range] = ()) -> None:
        """Tell whether the image could be placed and entered where memory lies at `ram`.

        Raises ImageError: a segment is outside memory, on another one, or on a reserved range; or
            the entry point is in no segment.
        """
        self._check_overlaps(list(reserved))
        for segment in self.segments:
            if not any(r.start <= segment.gpa and segment.end <= r.stop for r in ram):
                there = ", ".join(f"{r.start:#x}-{r.stop - 1:#x}" for r in ram)
                raise ImageError(f"{self.name}: {segment} is outside memory ({there})")
        if not any(s.gpa <= self.entry < s.end for s in self.segments):
            raise ImageError(f"{self.name}: the entry point {self.entry:#x} is in no segment")

    def symbol_at(self, gpa: int) -> str | None:
        """Return the symbol at or before an address as "name+0x12", None if there is none."""
        if not any(s.gpa <= gpa < s.end for s in self.segments):
            return None
        before = [(value, name) for name, value in self.symbols.items() if value <= gpa]
        if not before:
            return None
        value, name = max(before)
        return f"{name}+{gpa - value:#x}"

    def _check_overlaps(self, reserved: list[range]) -> None:
        ordered = sorted(self.segments, key=lambda s: s.gpa)
        for one, next_one in pairwise(ordered):
            if one.end > next_one.gpa:
                raise ImageError(f"{self.name}: {one} overlaps {next_one}")
        for segment in ordered:
            for taken in reserved:
                if segment.gpa < taken.stop and taken.start < segment.end:
                    raise ImageError(
                        f"{self.name}: {segment} overlaps {taken.start:#x}-{taken.stop - 1:#x}, "
                        "which the loader needs"
                    )


def raw_image(
    code: bytes, gpa: Gpa, mode: EntryMode = EntryMode.REAL16, entry: Gpa | None = None
) -> Image:
    """Make an image of plain code, entered at its start unless `entry` says otherwise."""
    segments = (Segment(gpa, bytes(code), len(code)),) if code else ()
    return Image("raw code", mode, gpa if entry is None else entry, segments)


def read_image(source: Path | str | bytes) -> Image:
    """Read an image from a file, or from the bytes of one.

    Raises ImageError: unreadable, or not an image that can be loaded.
    """
    if isinstance(source, bytes):
        return parse_image(source, "image")
    path = Path(source)
    try:
        return parse_image(path.read_bytes(), path.name)
    except OSError as e:
        raise ImageError(f"{path}: {e.strerror}") from e


@dataclass(frozen=True)
class _Layout:
    """How one ELF class lays out its headers (System V ABI, object files)."""

    ehdr: struct.Struct
    phdr: struct.Struct
    shdr: struct.Struct
    sym: struct.Struct
    machine: int
    phdr_fields: tuple[int, int, int, int]
    """Positions of p_offset, p_paddr, p_filesz and p_memsz."""
    sym_value: int
    sym_info: int


_EM_386, _EM_X86_64 = 3, 62
_CLASS32, _CLASS64, _LITTLE_ENDIAN = 1, 2, 1
_ET_EXEC, _PT_LOAD, _SHT_SYMTAB = 2, 1, 2
_STT_SECTION, _STT_FILE = 3, 4
_E_TYPE, _E_MACHINE, _E_ENTRY, _E_PHOFF, _E_SHOFF = 1, 2, 4, 5, 6
_E_PHENTSIZE, _E_PHNUM, _E_SHENTSIZE, _E_SHNUM = 9, 10, 11, 12
_SH_TYPE, _SH_OFFSET, _SH_SIZE, _SH_LINK = 1, 4, 5, 6

_LAYOUTS = {
    _CLASS32: _Layout(
        struct.Struct("<16sHHIIIIIHHHHHH"),
        struct.Struct("<IIIIIIII"),
        struct.Struct("<IIIIIIIIII"),
        struct.Struct("<IIIBBH"),
        _EM_386,
        (1, 3, 4, 5),
        sym_value=1,
        sym_info=3,
    ),
    _CLASS64: _Layout(
        struct.Struct("<16sHHIQQQIHHHHHH"),
        struct.Struct("<IIQQQQQQ"),
        struct.Struct("<IIQQQQIIQQ"),
        struct.Struct("<IBBHQQ"),
        _EM_X86_64,
        (2, 4, 5, 6),
        sym_value=4,
        sym_info=1,
    ),
}


def parse_image(data: bytes, name: str = "image") -> Image:
    """Parse what a multiboot loader would take, or an ELF executable.

    An image with addresses in its multiboot header need not be an ELF file.

    Raises ImageError: neither, truncated, or of another kind.
    """
    header = find_multiboot_header(data, name)
    if header is None or header.addresses is None:
        return parse_elf(data, name)
    at = header.addresses
    in_file = data[at.start_in_file : at.start_in_file + at.load_end_addr - at.load_addr]
    segment = Segment(Gpa(at.load_addr), in_file, at.bss_end_addr - at.load_addr)
    return Image(name, EntryMode.MULTIBOOT32, Gpa(at.entry_addr), (segment,))


def parse_elf(data: bytes, name: str = "image") -> Image:
    """Parse a statically linked x86 ELF executable.

    Raises ImageError: not an ELF file, truncated, or of another kind.
    """
    if data[:4] != b"\x7fELF":
        raise ImageError(f"{name}: not an ELF file")
    return _ElfFile(data, name).image()


@dataclass(frozen=True)
class SegmentInFile:
    """Where a segment's bytes are in its file, and where it goes."""

    gpa: Gpa
    offset: int
    in_file: int
    size_bytes: int

    @property
    def end(self) -> int:
        """The first address past the segment."""
        return self.gpa + self.size_bytes


@dataclass(frozen=True)
class ElfLayout:
    """What an ELF executable has where; none of its bytes."""

    entry: Gpa
    segments: tuple[SegmentInFile, ...]


def elf_layout(data: bytes | memoryview, name: str) -> ElfLayout:
    """Return where the segments of a 64-bit ELF executable are, which may be large.

    Raises ImageError: not an ELF file, truncated, or of another kind.
    """
    return _ElfFile(data, name).elf_layout()


class _ElfFile:
    """One ELF file being parsed; every offset in it is distrusted."""

    def __init__(self, data: bytes | memoryview, name: str) -> None:
        self.data = data
        self.name = name
        elf_class = self._bytes(4, 2, "ELF header")
        if elf_class[0] not in _LAYOUTS or elf_class[1] != _LITTLE_ENDIAN:
            raise ImageError(f"{name}: ELF class {elf_class.hex()} is not little-endian 32 or 64")
        self.is_64 = elf_class[0] == _CLASS64
        self.layout = _LAYOUTS[elf_class[0]]
        self.header = self._unpack(self.layout.ehdr, 0, "ELF header")

    def image(self) -> Image:
        """Return what the file says."""
        self._check_kind()
        segments = tuple(self._segments())
        entry = Gpa(self.header[_E_ENTRY])
        return Image(self.name, self._mode(), entry, segments, dict(self._symbols()))

    def elf_layout(self) -> ElfLayout:
        """Return where things are."""
        self._check_kind()
        if not self.is_64:
            raise ImageError(f"{self.name}: a 32-bit ELF file")
        return ElfLayout(Gpa(self.header[_E_ENTRY]), tuple(self._places()))

    def _check_kind(self) -> None:
        if self.header[_E_MACHINE] != self.layout.machine:
            raise ImageError(
                f"{self.name}: made for ELF machine {self.header[_E_MACHINE]}, "
                f"expected {self.layout.machine} in this class"
            )
        if self.header[_E_TYPE] != _ET_EXEC:
            raise ImageError(f"{self.name}: ELF type {self.header[_E_TYPE]} is no executable")
        if not any(self._places()):
            raise ImageError(f"{self.name}: nothing to load in it")

    def _mode(self) -> EntryMode:
        if self.is_64:
            return EntryMode.LONG64
        header = find_multiboot_header(bytes(self.data), self.name)
        return EntryMode.PROTECTED32 if header is None else EntryMode.MULTIBOOT32

    def _segments(self) -> Iterator[Segment]:
        for at in self._places():
            what = f"segment at {at.gpa:#x}"
            yield Segment(at.gpa, self._bytes(at.offset, at.in_file, what), at.size_bytes)

    def _places(self) -> Iterator[SegmentInFile]:
        for i in range(self.header[_E_PHNUM]):
            at = self.header[_E_PHOFF] + i * self.header[_E_PHENTSIZE]
            entry = self._unpack(self.layout.phdr, at, f"program header {i}")
            offset, gpa, in_file, in_memory = (entry[k] for k in self.layout.phdr_fields)
            if entry[0] != _PT_LOAD or not in_memory:
                continue
            if in_file > in_memory:
                raise ImageError(f"{self.name}: segment {i} has more bytes than memory")
            self._check_there(offset, in_file, f"segment {i}")
            yield SegmentInFile(Gpa(gpa), offset, in_file, in_memory)

    def _symbols(self) -> Iterator[tuple[str, int]]:
        for i in range(self.header[_E_SHNUM]):
            section = self._section(i)
            if section[_SH_TYPE] == _SHT_SYMTAB:
                table = self._bytes(section[_SH_OFFSET], section[_SH_SIZE], "symbol table")
                names = self._section(section[_SH_LINK])
                strings = self._bytes(names[_SH_OFFSET], names[_SH_SIZE], "symbol names")
                yield from self._symbols_of(table, strings)

    def _section(self, index: int) -> tuple[int, ...]:
        at = self.header[_E_SHOFF] + index * self.header[_E_SHENTSIZE]
        return self._unpack(self.layout.shdr, at, f"section header {index}")

    def _symbols_of(self, table: bytes, strings: bytes) -> Iterator[tuple[str, int]]:
        whole = len(table) - len(table) % self.layout.sym.size
        for entry in self.layout.sym.iter_unpack(table[:whole]):
            kind = entry[self.layout.sym_info] & 0xF
            end = strings.find(b"\0", entry[0])
            if kind not in (_STT_SECTION, _STT_FILE) and end > entry[0]:
                text = strings[entry[0] : end].decode("ascii", "replace")
                yield text, entry[self.layout.sym_value]

    def _unpack(self, layout: struct.Struct, at: int, what: str) -> tuple[int, ...]:
        return layout.unpack(self._bytes(at, layout.size, what))

    def _bytes(self, at: int, count: int, what: str) -> bytes:
        self._check_there(at, count, what)
        return bytes(self.data[at : at + count])

    def _check_there(self, at: int, count: int, what: str) -> None:
        if at + count > len(self.data):
            raise ImageError(
                f"{self.name}: truncated, {what} ends at byte {at + count} of {len(self.data)}"
            )
