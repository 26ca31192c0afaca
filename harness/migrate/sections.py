"""What is in the bodies of a stream's sections; `stream` says what they look like."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from operator import add, le
from typing import Any, Final, NamedTuple, NoReturn

from harness.machine.memory import PAGE_SIZE
from harness.migrate.errors import StreamError
from harness.migrate.memory_image import BATCH_PAGES, Batch
from harness.migrate.parts import Data

HEAD, PAGE, PREP, VMST = b"HEAD", b"PAGE", b"PREP", b"VMST"
VCPU, SIDE, DONE = b"VCPU", b"SIDE", b"DONE"

PAGE_HEADER: Final = struct.Struct("<II")
SPAN: Final = struct.Struct("<QQ")
NUMBER: Final = struct.Struct("<I")
COUNT: Final = struct.Struct("<Q")

LONGEST: Final = {
    HEAD: 1 << 20,
    PAGE: PAGE_HEADER.size + BATCH_PAGES * (SPAN.size + PAGE_SIZE),
    PREP: 1 << 20,
    VMST: 1 << 20,
    VCPU: 1 << 20,
    SIDE: 8 << 20,
    DONE: COUNT.size,
}
"""Bytes that a body may have; more is refused before any of it is read."""

_LONGEST_NAME: Final = 255


class Section(NamedTuple):
    """One section as it was read, its checksums seen to."""

    tag: bytes
    number: int
    offset: int
    """Where its header is in the stream."""
    body: bytes
    pages: Batch | None = None
    """Of a PAGE whose pages are where the reader's user wanted them; they are not in the body."""

    @property
    def where(self) -> str:
        """How messages call it."""
        return f"section {self.number} ({self.tag.decode()} at offset {self.offset:#x})"


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


@cache
def part_header(name: str, size_bytes: int) -> bytes:
    """Return what a body has before a part's data."""
    return pack_name(name) + NUMBER.pack(size_bytes)


def pack_parts(parts: Mapping[str, Data]) -> bytes:
    """Return named data as a body has them."""
    pieces: list[Data] = []
    for name, data in parts.items():
        pieces += part_header(name, len(data)), data
    return b"".join(pieces)


def split_parts(body: bytes, at: int = 0) -> dict[str, bytes]:
    """Return the parts that `pack_parts` has packed; for what others say take `unpack_parts`."""
    parts = {}
    while at < len(body):
        name_end = at + 1 + body[at]
        begin = name_end + NUMBER.size
        end = begin + NUMBER.unpack_from(body, name_end)[0]
        parts[body[at + 1 : name_end].decode()] = body[begin:end]
        at = end
    return parts


class Mould:
    """Where the parts are in a body that was found to be good, so that the next is read at once."""

    def __init__(self, parts: Mapping[str, bytes]) -> None:
        """Take the measure of the parts of a body, at least one."""
        self._names = tuple(parts)
        *fixed, _ = parts.items()
        self._headers = tuple(part_header(name, len(data)) for name, data in fixed)
        sizes = zip(map(len, self._headers), (len(data) for _, data in fixed), strict=True)
        self._struct = struct.Struct("".join(f"{header}s{data}s" for header, data in sizes))
        self._last = pack_name(self._names[-1])

    def split(self, body: bytes, at: int) -> dict[str, bytes] | None:
        """Return the parts of a body from a place up; None: they are others.

        All are as long as those before but the last one, which may have any length.
        """
        end = at + self._struct.size
        begin = end + len(self._last) + NUMBER.size
        if len(body) < begin:
            return None
        found, last = self._struct.unpack_from(body, at), body[begin:]
        if found[::2] != self._headers or body[end:begin] != self._last + NUMBER.pack(len(last)):
            return None
        return dict(zip(self._names, (*found[1::2], last), strict=True))


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
        if at + NUMBER.size > len(body):
            raise StreamError(f"{section.where}: part {name} is cut off")
        (size,) = NUMBER.unpack_from(body, at)
        at += NUMBER.size
        if at + size > len(body):
            raise StreamError(f"{section.where}: part {name} is cut off")
        parts[name] = body[at : at + size]
        at += size
    return parts


def unpack_number(section: Section) -> int:
    """Return the number that a body begins with.

    Raises StreamError: malformed.
    """
    if len(section.body) < NUMBER.size:
        raise StreamError(f"{section.where}: has no vCPU number")
    return int(NUMBER.unpack_from(section.body)[0])


def unpack_side(section: Section) -> tuple[str, Any]:
    """Return the name and the JSON of what belongs to the machine's user.

    Raises StreamError: malformed.
    """
    name, at = unpack_name(section, 0)
    return name, parse_json(section, section.body[at:])


def pack_spans(batch: Batch) -> bytes:
    """Return what a PAGE says of its pages, before they come.

    Raises StreamError: no reader would take so many.
    """
    if not 0 < batch.pages <= BATCH_PAGES:
        raise StreamError(f"a PAGE of {batch.pages} pages: 1 to {BATCH_PAGES} are possible")
    return PAGE_HEADER.pack(batch.backing, len(batch.spans)) + batch.table()


def spans_bytes(where: str, header: bytes) -> int:
    """Return how long the table of spans is, by what is before it.

    Raises StreamError: it cannot be so long, or there is less than a header.
    """
    if len(header) < PAGE_HEADER.size:
        raise StreamError(f"{where}: {len(header)} bytes are no pages")
    _, count = PAGE_HEADER.unpack_from(header)
    if not 0 < count <= BATCH_PAGES:
        raise StreamError(f"{where}: {count} spans, 1 to {BATCH_PAGES} are possible")
    return int(count * SPAN.size)


def unpack_spans(where: str, header: bytes, table: bytes, size: int) -> Batch:
    """Return which pages a PAGE has.

    Args:
        where: what messages begin with.
        header: the first bytes of the body.
        table: the spans, all of them.
        size: bytes of the body after that.

    Raises StreamError: they are not in order, or not so many.

    """
    words = struct.unpack(f"<{len(table) // COUNT.size}Q", table)
    firsts, counts = words[::2], words[1::2]
    ends = tuple(map(add, firsts, counts))
    sound = min(counts) > 0 and max(counts) <= BATCH_PAGES
    if not sound or not all(map(le, ends, firsts[1:])):
        _refuse_spans(where, firsts, counts)
    spans, pages = tuple(zip(firsts, counts, strict=True)), sum(counts)
    if pages > BATCH_PAGES or size != pages * PAGE_SIZE:
        raise StreamError(f"{where}: {size} bytes are not {pages} whole pages")
    return Batch(PAGE_HEADER.unpack_from(header)[0], spans)


def _refuse_spans(where: str, firsts: Sequence[int], counts: Sequence[int]) -> NoReturn:
    """Say which span is wrong; one of them is."""
    end = 0
    for first, count in zip(firsts, counts, strict=True):
        if first < end or not 0 < count <= BATCH_PAGES:
            break
        end = first + count
    raise StreamError(f"{where}: {count} pages from {first} on, after those up to {end}")


def unpack_pages(section: Section, backings: tuple[int, ...]) -> tuple[Batch, memoryview]:
    """Return which pages there are, and their bytes.

    Args:
        section: a PAGE with its whole body.
        backings: bytes of each mapping, which the pages must lie in.

    Raises StreamError: malformed, or outside memory.

    """
    body, at = section.body, PAGE_HEADER.size
    end = at + spans_bytes(section.where, body)
    if len(body) < end:
        raise StreamError(f"{section.where}: the table of its pages is cut off")
    batch = unpack_spans(section.where, body, body[at:end], len(body) - end)
    expect_inside(section.where, batch, backings)
    return batch, memoryview(body)[end:]


def expect_inside(where: str, batch: Batch, backings: tuple[int, ...]) -> None:
    """Make sure that pages are those of a machine's memory.

    Raises StreamError: they are not.
    """
    first, count = batch.spans[-1]
    if not are_inside(batch.backing, first + count, backings):
        raise StreamError(
            f"{where}: pages {first}..{first + count - 1} of mapping {batch.backing} "
            "are outside memory"
        )


def are_inside(backing: int, end: int, backings: tuple[int, ...]) -> bool:
    """Tell whether a machine has a mapping with all pages before one."""
    return backing < len(backings) and end * PAGE_SIZE <= backings[backing]
