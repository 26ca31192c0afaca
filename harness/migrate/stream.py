"""The stream that a machine travels in: what its bytes mean.

A stream is the 8 bytes of `MAGIC`, `VERSION` (2 bytes), flags (2 bytes), 4 bytes of zero, and
sections; nothing comes after the last one. All numbers are little-endian. A section is a header
and a body::

    offset  size  header
         0     4  tag, four letters
         4     4  sequence number, from 0
         8     8  bytes of the body, at most what `LONGEST` says for the tag
        16     4  CRC-32 (zlib's) of the body; of a PAGE see the flags
        20     4  CRC-32 of the 20 bytes before

    tag    body
    HEAD   JSON: {"source": fingerprint of the source, "shape": `Shape.to_json` of the machine}
    PAGE   mapping (4), number of spans (4), for each span its first page (8) and how many follow
           one another from there (8), then the pages of 4096 bytes, span by span
    PREP   number (4), then parts of that vCPU's state as they were a while ago; those of the VM
           have the number after the last vCPU's
    VMST   parts of the VM's state, `VM_PARTS`
    VCPU   number (4), then parts of the vCPU's state, `VCPU_PARTS`
    SIDE   name, then JSON: what the machine's user needs to go on
    DONE   the number of sections before it (8)

The flags are of live migration; files have none of them:

* `PAGES_UNCHECKED` (1): the CRC-32 of a PAGE's body ends before its pages. A link that carries
  bytes (TCP, UNIX sockets, pipes, SSH) has checks of its own or needs none, and at both ends this
  checksum takes as long as the copy.
* `PAGES_BESIDE` (2): there is no PAGE, the pages are brought past the stream to where they belong.
  That is for two ends in one process, and needs a reader that knows of it.

Spans are in ascending order and do not overlap; a PAGE has 1 to `BATCH_PAGES` pages.

A name is its length (1), then 1 to 255 printable ASCII characters. A part is a name, the length of
the data (4), and the data: KVM's struct, or structs, of that part. No part comes twice; which ones
must come, and how long each may be, is said where they are declared. JSON is UTF-8 without NaN or
infinities and without a key that comes twice in one object.

The order is HEAD, PAGE and SIDE in any number and among them PREP, for each vCPU from 0 up and then
the VM, or none, VMST, VCPU for each vCPU from 0 up, SIDE in any number, DONE. Names of SIDEs
differ. A page that comes twice counts as it came last, which is what live migration does; one that
never comes is zero. In the same way what VCPU and VMST say counts more than PREP. A stream from the
future, with another version, tag, part or key, is refused: nothing of it may be ignored.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import IntEnum, auto
from typing import Any, Final, Protocol, runtime_checkable

from harness.machine.memory import PAGE_SIZE
from harness.migrate.errors import StreamError
from harness.migrate.memory_image import (
    Batch,
    Bearer,
    Memory,
    PageBits,
    count_of_bits,
    spans_of_bits,
    together,
)
from harness.migrate.parts import Data
from harness.migrate.sections import (
    COUNT,
    DONE,
    HEAD,
    LONGEST,
    NUMBER,
    PAGE,
    PAGE_HEADER,
    PREP,
    SIDE,
    VCPU,
    VMST,
    Section,
    pack_json,
    pack_name,
    pack_parts,
    pack_spans,
    spans_bytes,
    unpack_spans,
)

MAGIC: Final = b"NSVMMIGR"
VERSION: Final = 3

PAGES_UNCHECKED: Final = 1
PAGES_BESIDE: Final = 2

_START: Final = struct.Struct("<8sHH4s")
_HEADER: Final = struct.Struct("<4sIQI")
_WHOLE_HEADER: Final = struct.Struct("<4sIQII")
_CRC: Final = struct.Struct("<I")

_READ_BYTES: Final = 1 << 20
"""Asked for at once, so that memory is taken for what came and not for what a header claims."""

_GATHER_BYTES: Final = 256 << 10
"""Put into one write of the sink, if it may be."""

Piece = bytes | memoryview


class Source(Protocol):
    """What a stream is read from."""

    def read(self, size: int, /) -> bytes:
        """Return up to so many bytes; none at the end."""


@runtime_checkable
class FillingSource(Source, Protocol):
    """One that can do without making objects of what it reads."""

    def readinto(self, buffer: memoryview, /) -> int | None:
        """Read up to as many bytes as the buffer has; return how many, 0 at the end."""


@runtime_checkable
class ScatteringSource(Source, Protocol):
    """One that fills many buffers at once."""

    def fill(self, buffers: Sequence[memoryview], /) -> None:
        """Fill all of them; what keeps it from that is an error."""


class Sink(Protocol):
    """What a stream is written to."""

    def write(self, data: bytes | bytearray | memoryview, /) -> object:
        """Take all of the bytes."""


@runtime_checkable
class GatheringSink(Sink, Protocol):
    """One that takes many pieces at once."""

    def write_all(self, pieces: Sequence[Piece], /) -> object:
        """Take all of the bytes, in this order."""


Place = Callable[[str, Batch], list[memoryview]]
"""Returns where the pages of each span go; raises StreamError if there is no such place.

Its first argument is what messages begin with.
"""


class StreamWriter:
    """Writes one stream.

    Every method raises StreamError for what no reader would take.
    """

    def __init__(
        self, sink: Sink, *, page_checksums: bool = True, bearer: Bearer | None = None
    ) -> None:
        """Write the start.

        Args:
            sink: where to.
            page_checksums: have checksums of pages, too.
            bearer: what brings pages past the stream, which then has none.

        """
        self._sink = sink
        self._gathering = sink if isinstance(sink, GatheringSink) else None
        self._page_checksums = page_checksums and bearer is None
        self._bearer = bearer
        self.sections = 0
        self.written_bytes = 0
        """With those of pages that went past the stream."""
        self.gathers = False
        """Whether a `gathered` is going on."""
        self._pieces: list[Piece] = []
        self._pieces_bytes = 0
        flags = 0 if self._page_checksums else PAGES_UNCHECKED
        flags |= 0 if bearer is None else PAGES_BESIDE
        self._put(_START.pack(MAGIC, VERSION, flags, bytes(4)))

    def gathered(self) -> _Gathered:
        """Put many sections into one write of the sink, for the time of a `with`.

        At its end all are written, and what they are made of must stay as it is until then. One
        inside another does nothing.
        """
        return _Gathered(self)

    def head(self, data: Mapping[str, Any]) -> None:
        """Write the header."""
        self._section(HEAD, pack_json(data, "header"))

    def pages(self, batch: Batch, pages: Sequence[memoryview]) -> None:
        """Write the pages of each span.

        They may be written to meanwhile: the checksum, if there is one, is of what is sent.
        """
        table = pack_spans(batch)
        if self._page_checksums:
            self._section(PAGE, table, *map(bytes, pages))
        else:
            self._section(PAGE, table, unchecked=pages)

    def prepare(self, number: int, packed: bytes) -> None:
        """Write what the state of one vCPU, or of the VM, is going to be like, and partly be."""
        self._section(PREP, NUMBER.pack(number), packed)

    def pages_of(self, batch: Batch, memory: Memory) -> int:
        """Write pages of a mapping, as `pages` does, or have them brought; return how many."""
        if self._bearer is None:
            self.pages(batch, batch.views(memory.view))
        else:
            self._bearer.bring(batch, memory)
            self.written_bytes += batch.size_bytes
        return batch.pages

    def pages_of_bits(self, backing: int, pages: PageBits, memory: Memory) -> int:
        """Do the same with any pages of a mapping."""
        if self._bearer is None:
            found = together(backing, spans_of_bits(pages))
            return sum([self.pages_of(batch, memory) for batch in found])
        self._bearer.bring_bits(backing, pages, memory)
        count = count_of_bits(pages)
        self.written_bytes += count * PAGE_SIZE
        return count

    def vm(self, parts: Mapping[str, Data] | bytes) -> None:
        """Write the VM's state; bytes are parts that are packed already."""
        self._section(VMST, parts if isinstance(parts, bytes) else pack_parts(parts))

    def vcpu(self, number: int, parts: Mapping[str, Data] | bytes) -> None:
        """Write the state of one vCPU, as `vm` does."""
        packed = parts if isinstance(parts, bytes) else pack_parts(parts)
        self._section(VCPU, NUMBER.pack(number), packed)

    def side(self, name: str, data: Any) -> None:
        """Write what the machine's user needs, as JSON."""
        self._section(SIDE, pack_name(name), pack_json(data, f"side {name!r}"))

    def done(self) -> None:
        """End the stream."""
        self._section(DONE, COUNT.pack(self.sections))

    def _section(self, tag: bytes, *checked: bytes, unchecked: Sequence[memoryview] = ()) -> None:
        pieces: tuple[Piece, ...] = (*checked, *unchecked)
        size = sum(map(len, pieces))
        if size > LONGEST[tag]:
            raise StreamError(f"a {tag.decode()} of {size} bytes: {_at_most(tag)}")
        crc = 0
        for piece in checked:
            crc = zlib.crc32(piece, crc)
        header = _HEADER.pack(tag, self.sections, size, crc)
        self._put(header + _CRC.pack(zlib.crc32(header)), *pieces)
        self.sections += 1

    def _put(self, *pieces: Piece) -> None:
        self._pieces += pieces
        size = sum(map(len, pieces))
        self._pieces_bytes += size
        self.written_bytes += size
        if not self.gathers or self._pieces_bytes >= _GATHER_BYTES:
            self.flush()

    def forget(self) -> list[Piece]:
        """Return what was gathered and not written yet, and write none of it."""
        pieces, self._pieces, self._pieces_bytes = self._pieces, [], 0
        return pieces

    def flush(self) -> None:
        """Write all that was gathered."""
        pieces = self.forget()
        if self._gathering is not None:
            self._gathering.write_all(pieces)
            return
        small: list[Piece] = []
        for piece in pieces:
            if len(piece) < _GATHER_BYTES:
                small.append(piece)
                continue
            # Copying it costs more than a second write.
            self._write(small)
            self._sink.write(piece)
            small = []
        self._write(small)

    def _write(self, small: list[Piece]) -> None:
        if small:
            self._sink.write(b"".join(small))


class _Gathered:
    """The time of `StreamWriter.gathered`; a class for the same reason as `links.During`."""

    __slots__ = ("_inner", "_writer")

    def __init__(self, writer: StreamWriter) -> None:
        self._writer = writer

    def __enter__(self) -> None:
        self._inner = self._writer.gathers
        self._writer.gathers = True

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if self._inner:
            return
        self._writer.gathers = False
        if error is None:
            self._writer.flush()
        else:
            self._writer.forget()


class StreamReader:
    """Reads one stream and believes nothing: tags, order, lengths and checksums are checked."""

    def __init__(self, source: Source, place: Place | None = None, *, beside: bool = False) -> None:
        """Read the start.

        Args:
            source: where from.
            place: where pages go; by default into the bodies of their sections. They go there
                before their checksum is known: nothing may come of it unless all was taken.
            beside: pages may come past the stream.

        Raises StreamError: it is no stream, or of another version.

        """
        self._source = source
        self._place = place
        # Asked once: it takes long.
        self._filling = source if isinstance(source, FillingSource) else None
        self._scattering = source if isinstance(source, ScatteringSource) else None
        self.offset = 0
        self._number = 0
        magic, version, flags, zero = _START.unpack(self._take(_START.size, "the start"))
        if magic != MAGIC:
            raise StreamError(f"not a machine's stream: it starts with {magic!r}")
        if version != VERSION:
            raise StreamError(f"stream version {version}, this harness reads {VERSION}")
        if flags & ~(PAGES_UNCHECKED | PAGES_BESIDE):
            raise StreamError(f"the start: unknown flags {flags:#x}")
        if any(zero):
            raise StreamError(f"the start: {zero.hex(' ')} where zeroes must be")
        self._page_checksums = not flags & PAGES_UNCHECKED
        self._beside = bool(flags & PAGES_BESIDE)
        if self._beside and not beside:
            raise StreamError("the start: pages come past the stream, and here is no way for them")

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
        raw = self._take(_WHOLE_HEADER.size, f"{what}'s header")
        tag, number, size, crc, header_crc = _WHOLE_HEADER.unpack(raw)
        if zlib.crc32(raw[: _HEADER.size]) != header_crc:
            raise StreamError(f"{what}: checksum of the header at offset {start:#x} is wrong")
        if tag not in LONGEST:
            raise StreamError(f"{what}: unknown tag {tag!r} at offset {start:#x}")
        if number != self._number:
            raise StreamError(f"{what}: numbered {number} at offset {start:#x}")
        where = f"{what} ({tag.decode()} at offset {start:#x})"
        if size > LONGEST[tag]:
            raise StreamError(f"{where}: {size} bytes, {_at_most(tag)}")
        read = self._pages if tag == PAGE else self._body
        body, found, pages = read(where, size)
        if found != crc:
            raise StreamError(f"{where}: checksum of the body is wrong")
        self._number += 1
        return Section(tag, number, start, body, pages)

    def _body(self, where: str, size: int) -> tuple[bytes, int, Batch | None]:
        """Read a body; return it with its checksum."""
        body = self._take(size, where)
        return body, zlib.crc32(body), None

    def _pages(self, where: str, size: int) -> tuple[bytes, int, Batch | None]:
        """Read the body of a PAGE, the pages to where they go; return what is left of it."""
        if self._beside:
            raise StreamError(f"{where}: not allowed where pages come past the stream")
        header = self._take(min(size, PAGE_HEADER.size), where)
        table_bytes = spans_bytes(where, header)
        rest = size - len(header) - table_bytes
        if rest < 0:
            raise StreamError(f"{where}: the table of its pages is cut off")
        table = self._take(table_bytes, where)
        crc = zlib.crc32(table, zlib.crc32(header))
        batch = unpack_spans(where, header, table, rest)
        if self._place is None:
            pages = self._take(rest, where)
            crc = zlib.crc32(pages, crc) if self._page_checksums else crc
            return header + table + pages, crc, None
        buffers = self._place(where, batch)
        self._fill(buffers, rest, where)
        if self._page_checksums:
            for buffer in buffers:
                crc = zlib.crc32(buffer, crc)
        return header + table, crc, batch

    def _fill(self, buffers: list[memoryview], size: int, where: str) -> None:
        if self._scattering is not None:
            self._scattering.fill(buffers)
        else:
            done = 0
            for buffer in buffers:
                rest = buffer
                while rest:
                    count = self._read_into(rest)
                    if not count:
                        raise StreamError(f"{where}: cut off after {done} of {size} bytes")
                    rest, done = rest[count:], done + count
        self.offset += size

    def _read_into(self, buffer: memoryview) -> int:
        if self._filling is not None:
            return self._filling.readinto(buffer) or 0
        data = self._source.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _take(self, size: int, what: str) -> bytes:
        if not size:
            return b""
        data = self._source.read(size if size < _READ_BYTES else _READ_BYTES)
        if len(data) < size:
            data = self._take_on(data, size, what)
        self.offset += size
        return data

    def _take_on(self, data: bytes, size: int, what: str) -> bytes:
        """Read what is missing after some bytes, if it was more than none; return all."""
        parts, missing = [data], size - len(data)
        while missing:
            if not data:
                have = size - missing
                raise StreamError(f"{what}: cut off after {have} of {size} bytes")
            data = self._source.read(min(missing, _READ_BYTES))
            parts.append(data)
            missing -= len(data)
        return b"".join(parts)


class _Phase(IntEnum):
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
    (_Phase.MEMORY, PREP): _Phase.MEMORY,
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
    if len(section.body) != COUNT.size or COUNT.unpack(section.body)[0] != section.number:
        raise StreamError(f"{section.where}: counts other sections than there were")
