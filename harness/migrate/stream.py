"""The stream that a machine travels in: what its bytes mean.

A stream is the 8 bytes of `MAGIC`, `VERSION` (2 bytes), flags (2 bytes), 4 bytes of zero, and
sections; nothing comes after the last one. All numbers are little-endian. The only flag is
`PAGES_UNCHECKED` (1): the checksum of a PAGE's body is 0, and not looked at. Live migration sets
it, for a link that carries bytes (TCP, UNIX sockets, pipes, SSH) has checks of its own or needs
none, and at both ends this checksum takes as long as the copy; files never have it. A section is a
header and a body::

    offset  size  header
         0     4  tag, four letters
         4     4  sequence number, from 0
         8     8  bytes of the body, at most what `LONGEST` says for the tag
        16     4  CRC-32 (zlib's) of the body, or 0, see above
        20     4  CRC-32 of the 20 bytes before

    tag    body
    HEAD   JSON: {"source": fingerprint of the source, "shape": `Shape.to_json` of the machine}
    PAGE   mapping (4), zero (4), first page (8), then 1 to `RUN_PAGES` whole pages of 4096 bytes
    VMST   parts of the VM's state, `VM_PARTS`
    VCPU   number (4), then parts of the vCPU's state, `VCPU_PARTS`
    SIDE   name, then JSON: what the machine's user needs to go on
    DONE   the number of sections before it (8)

A name is its length (1), then 1 to 255 printable ASCII characters. A part is a name, the length of
the data (4), and the data: KVM's struct, or structs, of that part. No part comes twice; which ones
must come, and how long each may be, is said where they are declared. JSON is UTF-8 without NaN or
infinities and without a key that comes twice in one object.

The order is HEAD, PAGE and SIDE in any number, VMST, VCPU for each vCPU from 0 up, SIDE in any
number, DONE. Names of SIDEs differ. A page that comes twice counts as it came last, which is what
live migration does; one that never comes is zero. A stream from the future, with another version,
tag, part or key, is refused: nothing of it may be ignored.
"""

from __future__ import annotations

import contextlib
import json
import math
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Final, Protocol, runtime_checkable

from harness.machine.memory import PAGE_SIZE
from harness.migrate.errors import StreamError
from harness.migrate.memory_image import RUN_PAGES, Run

MAGIC: Final = b"NSVMMIGR"
VERSION: Final = 1

PAGES_UNCHECKED: Final = 1
"""A flag: PAGEs have no checksum of their body."""

_START: Final = struct.Struct("<8sHH4s")
_HEADER: Final = struct.Struct("<4sIQI")
_CRC: Final = struct.Struct("<I")
_PAGE_HEADER: Final = struct.Struct("<IIQ")
_NUMBER: Final = struct.Struct("<I")
_COUNT: Final = struct.Struct("<Q")

HEAD, PAGE, VMST, VCPU, SIDE, DONE = b"HEAD", b"PAGE", b"VMST", b"VCPU", b"SIDE", b"DONE"

LONGEST: Final = {
    HEAD: 1 << 20,
    PAGE: _PAGE_HEADER.size + RUN_PAGES * PAGE_SIZE,
    VMST: 1 << 20,
    VCPU: 1 << 20,
    SIDE: 8 << 20,
    DONE: _COUNT.size,
}
"""Bytes that a body may have; more is refused before any of it is read."""

_READ_BYTES: Final = 1 << 20
"""Asked for at once, so that memory is taken for what came and not for what a header claims."""

_GATHER_BYTES: Final = 256 << 10
"""Put into one write of the sink, if it may be."""

_LONGEST_NAME: Final = 255


class Source(Protocol):
    """What a stream is read from."""

    def read(self, size: int, /) -> bytes:
        """Return up to so many bytes; none at the end."""


@runtime_checkable
class FillingSource(Source, Protocol):
    """One that can do without making objects of what it reads."""

    def readinto(self, buffer: memoryview, /) -> int | None:
        """Read up to as many bytes as the buffer has; return how many, 0 at the end."""


class Sink(Protocol):
    """What a stream is written to."""

    def write(self, data: bytes | bytearray | memoryview, /) -> object:
        """Take all of the bytes."""


@dataclass(frozen=True)
class Section:
    """One section as it was read, its checksums seen to."""

    tag: bytes
    number: int
    offset: int
    """Where its header is in the stream."""
    body: bytes
    pages: Run | None = None
    """Of a PAGE whose pages are where the reader's user wanted them; they are not in the body."""

    @property
    def where(self) -> str:
        """How messages call it."""
        return f"section {self.number} ({self.tag.decode()} at offset {self.offset:#x})"


Place = Callable[[Section, Run], memoryview]
"""Returns where the pages of a run go; raises StreamError if there is no such place."""


class StreamWriter:
    """Writes one stream.

    Every method raises StreamError for what no reader would take.
    """

    def __init__(self, sink: Sink, *, page_checksums: bool = True) -> None:
        self._sink = sink
        self._page_checksums = page_checksums
        self.sections = 0
        self.written_bytes = 0
        self._gathers = False
        self._pieces: list[bytes | memoryview] = []
        self._pieces_bytes = 0
        flags = 0 if page_checksums else PAGES_UNCHECKED
        self._put(_START.pack(MAGIC, VERSION, flags, bytes(4)))

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Put many sections into one write of the sink; at the end of the `with` all are written.

        What they are made of must stay as it is until then.
        """
        self._gathers = True
        try:
            yield
            self._flush()
        finally:
            self._gathers = False
            self._pieces, self._pieces_bytes = [], 0

    def head(self, data: Mapping[str, Any]) -> None:
        """Write the header."""
        self._section(HEAD, pack_json(data, "header"))

    def pages(self, run: Run, data: bytes | memoryview) -> None:
        """Write a run of pages."""
        self._section(PAGE, _PAGE_HEADER.pack(run.backing, 0, run.first), data)

    def vm(self, parts: Mapping[str, bytes]) -> None:
        """Write the VM's state."""
        self._section(VMST, pack_parts(parts))

    def vcpu(self, number: int, parts: Mapping[str, bytes]) -> None:
        """Write the state of one vCPU."""
        self._section(VCPU, _NUMBER.pack(number), pack_parts(parts))

    def side(self, name: str, data: Any) -> None:
        """Write what the machine's user needs, as JSON."""
        self._section(SIDE, pack_name(name), pack_json(data, f"side {name!r}"))

    def done(self) -> None:
        """End the stream."""
        self._section(DONE, _COUNT.pack(self.sections))

    def _section(self, tag: bytes, *pieces: bytes | memoryview) -> None:
        size = sum(map(len, pieces))
        if size > LONGEST[tag]:
            raise StreamError(f"a {tag.decode()} of {size} bytes: {_at_most(tag)}")
        crc = 0
        if tag != PAGE or self._page_checksums:
            for piece in pieces:
                crc = zlib.crc32(piece, crc)
        header = _HEADER.pack(tag, self.sections, size, crc)
        self._put(header + _CRC.pack(zlib.crc32(header)), *pieces)
        self.sections += 1

    def _put(self, *pieces: bytes | memoryview) -> None:
        self._pieces += pieces
        size = sum(map(len, pieces))
        self._pieces_bytes += size
        self.written_bytes += size
        if not self._gathers or self._pieces_bytes >= _GATHER_BYTES:
            self._flush()

    def _flush(self) -> None:
        pieces, self._pieces, self._pieces_bytes = self._pieces, [], 0
        small: list[bytes | memoryview] = []
        for piece in pieces:
            if len(piece) < _GATHER_BYTES:
                small.append(piece)
                continue
            # Copying it costs more than a second write.
            self._write(small)
            self._sink.write(piece)
            small = []
        self._write(small)

    def _write(self, small: list[bytes | memoryview]) -> None:
        if small:
            self._sink.write(b"".join(small))


class StreamReader:
    """Reads one stream and believes nothing: tags, order, lengths and checksums are checked."""

    def __init__(self, source: Source, place: Place | None = None) -> None:
        """Read the start.

        Args:
            source: where from.
            place: where pages go; by default into the bodies of their sections. They go there
                before their checksum is known: nothing may come of it unless all was taken.

        Raises StreamError: it is no stream, or of another version.

        """
        self._source = source
        self._place = place
        # Asked once: it takes long.
        self._filling = source if isinstance(source, FillingSource) else None
        self.offset = 0
        self._number = 0
        magic, version, flags, zero = _START.unpack(self._take(_START.size, "the start"))
        if magic != MAGIC:
            raise StreamError(f"not a machine's stream: it starts with {magic!r}")
        if version != VERSION:
            raise StreamError(f"stream version {version}, this harness reads {VERSION}")
        if flags & ~PAGES_UNCHECKED:
            raise StreamError(f"the start: unknown flags {flags:#x}")
        if any(zero):
            raise StreamError(f"the start: {zero.hex(' ')} where zeroes must be")
        self._page_checksums = not flags & PAGES_UNCHECKED

    def sections(self) -> Iterator[Section]:
        """Yield the sections, DONE being the last.

        Raises StreamError: malformed, truncated or out of order.
        """
        phase, previous = _Phase.START, "the start"
        while phase is not _Phase.END:
            section = self._section()
            following = _NEXT.get((phase, section.tag))
            if following is None:
                raise StreamError(f"{section.where}: not allowed after {previous}")
            if following is _Phase.END:
                _check_done(section)
            phase, previous = following, section.tag.decode()
            yield section

    def expect_end(self) -> None:
        """Make sure that nothing follows.

        Raises StreamError: something does.
        """
        if self._source.read(1):
            raise StreamError(f"more bytes after the end, at offset {self.offset:#x}")

    def _section(self) -> Section:
        start = self.offset
        what = f"section {self._number}"
        raw = self._take(_HEADER.size + _CRC.size, f"{what}'s header")
        tag, number, size, crc = _HEADER.unpack_from(raw)
        if zlib.crc32(raw[: _HEADER.size]) != _CRC.unpack_from(raw, _HEADER.size)[0]:
            raise StreamError(f"{what}: checksum of the header at offset {start:#x} is wrong")
        if tag not in LONGEST:
            raise StreamError(f"{what}: unknown tag {tag!r} at offset {start:#x}")
        if number != self._number:
            raise StreamError(f"{what}: numbered {number} at offset {start:#x}")
        what += f" ({tag.decode()} at offset {start:#x})"
        if size > LONGEST[tag]:
            raise StreamError(f"{what}: {size} bytes, {_at_most(tag)}")
        in_place = tag == PAGE and self._place is not None and size > _PAGE_HEADER.size
        body = self._take(_PAGE_HEADER.size if in_place else size, what)
        checked = tag != PAGE or self._page_checksums
        section, found = Section(tag, number, start, body), zlib.crc32(body) if checked else 0
        if in_place:
            section, found = self._placed(section, size, found)
        if found != crc:
            raise StreamError(f"{what}: checksum of the body is wrong")
        self._number += 1
        return section

    def _placed(self, section: Section, size: int, crc: int) -> tuple[Section, int]:
        """Read the pages of a PAGE that has no more than its header yet; return the body's CRC."""
        assert self._place is not None
        run = _unpack_run(section, size)
        buffer = self._place(section, run)
        self._fill(buffer, section.where)
        placed = Section(section.tag, section.number, section.offset, section.body, run)
        return placed, zlib.crc32(buffer, crc) if self._page_checksums else crc

    def _fill(self, buffer: memoryview, what: str) -> None:
        done, size = 0, len(buffer)
        while done < size:
            count = self._read_into(buffer[done:])
            if not count:
                raise StreamError(f"{what}: cut off after {done} of {size} bytes")
            done += count
        self.offset += size

    def _read_into(self, buffer: memoryview) -> int:
        if self._filling is not None:
            return self._filling.readinto(buffer) or 0
        data = self._source.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _take(self, size: int, what: str) -> bytes:
        parts = []
        missing = size
        while missing:
            data = self._source.read(min(missing, _READ_BYTES))
            if not data:
                have = size - missing
                raise StreamError(f"{what}: cut off after {have} of {size} bytes")
            parts.append(data)
            missing -= len(data)
        self.offset += size
        return parts[0] if len(parts) == 1 else b"".join(parts)


class _Phase(Enum):
    """How far a stream has come."""

    START = auto()
    MEMORY = auto()
    VCPUS = auto()
    SIDES = auto()
    END = auto()


_NEXT: Final[Mapping[tuple[_Phase, bytes], _Phase]] = {
    (_Phase.START, HEAD): _Phase.MEMORY,
    (_Phase.MEMORY, PAGE): _Phase.MEMORY,
    (_Phase.MEMORY, SIDE): _Phase.MEMORY,
    (_Phase.MEMORY, VMST): _Phase.VCPUS,
    (_Phase.VCPUS, VCPU): _Phase.VCPUS,
    (_Phase.VCPUS, SIDE): _Phase.SIDES,
    (_Phase.VCPUS, DONE): _Phase.END,
    (_Phase.SIDES, SIDE): _Phase.SIDES,
    (_Phase.SIDES, DONE): _Phase.END,
}
"""What may come next, and where that leads."""


def _at_most(tag: bytes) -> str:
    return f"at most {LONGEST[tag]} are possible"


def _check_done(section: Section) -> None:
    if len(section.body) != _COUNT.size or _COUNT.unpack(section.body)[0] != section.number:
        raise StreamError(f"{section.where}: counts other sections than there were")


def pack_json(data: Any, what: str) -> bytes:
    """Return data as JSON in the one way that this stream has.

    Raises StreamError: `what` holds something that JSON cannot say.
    """
    try:
        text = json.dumps(data, separators=(",", ":"), sort_keys=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as e:
        raise StreamError(f"{what}: cannot be said in JSON ({e})") from None
    return text.encode()


def parse_json(section: Section, data: bytes) -> Any:
    """Return the JSON of a section's body.

    Raises StreamError: it is none.
    """
    try:
        # Decoded here, for json.loads would take UTF-16 and UTF-32 too.
        return json.loads(
            data.decode(),
            parse_float=_finite,
            parse_constant=_finite,
            object_pairs_hook=_unique_keys,
        )
    except (ValueError, RecursionError) as e:
        raise StreamError(f"{section.where}: malformed JSON ({shortened(str(e))})") from None


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no number")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def shortened(text: str, most: int = 80) -> str:
    """Return what a stream says, fit to be quoted in a line."""
    return text if len(text) <= most else f"{text[:most]}..."


def pack_name(name: str) -> bytes:
    """Return a name with its length before it.

    Raises StreamError: it cannot be one.
    """
    if not (name.isascii() and name.isprintable() and 0 < len(name) <= _LONGEST_NAME):
        raise StreamError(f"{shortened(repr(name))} is no name for a stream")
    return bytes([len(name)]) + name.encode("ascii")


def pack_parts(parts: Mapping[str, bytes]) -> bytes:
    """Return named data as a body has them."""
    return b"".join(
        pack_name(name) + _NUMBER.pack(len(data)) + data for name, data in parts.items()
    )


def unpack_name(section: Section, at: int) -> tuple[str, int]:
    """Return a name at a place in a body, and where it ends.

    Raises StreamError: it is cut off, or no name.
    """
    body = section.body
    size = body[at] if at < len(body) else 0
    name = body[at + 1 : at + 1 + size].decode("latin-1")
    if not (len(name) == size > 0 and name.isascii() and name.isprintable()):
        raise StreamError(f"{section.where}: no name at {at:#x} of the body")
    return name, at + 1 + size


def unpack_parts(section: Section, at: int, known: Iterable[str]) -> dict[str, bytes]:
    """Return the parts of a body from a place up.

    Raises StreamError: one is cut off, unknown or there twice.
    """
    body, names, parts = section.body, set(known), dict[str, bytes]()
    while at < len(body):
        name, at = unpack_name(section, at)
        if name not in names or name in parts:
            what = "there twice" if name in parts else "unknown"
            raise StreamError(f"{section.where}: part {name!r} is {what}")
        if at + _NUMBER.size > len(body):
            raise StreamError(f"{section.where}: part {name} is cut off")
        (size,) = _NUMBER.unpack_from(body, at)
        at += _NUMBER.size
        if at + size > len(body):
            raise StreamError(f"{section.where}: part {name} is cut off")
        parts[name] = body[at : at + size]
        at += size
    return parts


def unpack_vcpu(section: Section, known: Iterable[str]) -> tuple[int, dict[str, bytes]]:
    """Return a vCPU's number and its parts.

    Raises StreamError: malformed.
    """
    if len(section.body) < _NUMBER.size:
        raise StreamError(f"{section.where}: has no vCPU number")
    return _NUMBER.unpack_from(section.body)[0], unpack_parts(section, _NUMBER.size, known)


def unpack_side(section: Section) -> tuple[str, Any]:
    """Return the name and the JSON of what belongs to the machine's user.

    Raises StreamError: malformed.
    """
    name, at = unpack_name(section, 0)
    return name, parse_json(section, section.body[at:])


def unpack_pages(section: Section, backings: tuple[int, ...]) -> tuple[Run, memoryview]:
    """Return a run of pages and their bytes.

    Args:
        section: a PAGE with its whole body.
        backings: bytes of each mapping, which the run must lie in.

    Raises StreamError: malformed, or outside memory.

    """
    run = _unpack_run(section, len(section.body))
    expect_inside(section, run, backings)
    return run, memoryview(section.body)[_PAGE_HEADER.size :]


def expect_inside(section: Section, run: Run, backings: tuple[int, ...]) -> None:
    """Make sure that a run is one of a machine's memory.

    Raises StreamError: it is not.
    """
    if run.backing >= len(backings) or run.end * PAGE_SIZE > backings[run.backing]:
        raise StreamError(
            f"{section.where}: pages {run.first}..{run.end - 1} of mapping {run.backing} "
            "are outside memory"
        )


def _unpack_run(section: Section, size: int) -> Run:
    """Return the run of a PAGE whose body has so many bytes."""
    if size <= _PAGE_HEADER.size or (size - _PAGE_HEADER.size) % PAGE_SIZE:
        raise StreamError(f"{section.where}: {size} bytes are not whole pages")
    backing, zero, first = _PAGE_HEADER.unpack_from(section.body)
    if zero:
        raise StreamError(f"{section.where}: {zero:#x} where zero must be")
    return Run(backing, first, (size - _PAGE_HEADER.size) // PAGE_SIZE)
