"""What is in a stream, without a VM: to be read, and to be compared with another stream."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from harness.machine.memory import PAGE_SIZE
from harness.migrate.contents import Contents
from harness.migrate.decode import Block, vcpu_blocks
from harness.migrate.difference import EXCUSED, Difference, field_differences
from harness.migrate.fields import Fields, state_fields
from harness.migrate.sections import PAGE, Section, unpack_pages
from harness.migrate.shape import Shape
from harness.migrate.state import MachineState
from harness.migrate.stream import Source, StreamReader
from harness.svm.vmcb_text import Row

_ZERO_PAGE: Final = bytes(PAGE_SIZE)
_DIGEST_BYTES: Final = 16

Pages = dict[tuple[int, int], str]
"""Digests of the pages that are not zero, by mapping and number in it."""


@dataclass(frozen=True)
class Inspection:
    """All that a stream says."""

    source: Mapping[str, Any]
    """The fingerprint of where it comes from."""
    shape: Shape
    pages: Pages
    state: MachineState
    sides: Mapping[str, Any]
    sections: int
    size_bytes: int


def inspect_stream(source: Source) -> Inspection:
    """Read a whole stream.

    Raises StreamError: it is malformed, cut off or foreign.
    Raises Refused: it is of another architecture.
    """
    reader = StreamReader(source)
    contents, pages, sections = Contents(), Pages(), 0
    for section in reader.sections():
        contents.take(section)
        if section.tag == PAGE:
            _take_pages(pages, section, contents.shape)
        sections += 1
    reader.expect_end()
    return Inspection(
        contents.source,
        contents.shape,
        pages,
        contents.state(),
        contents.sides,
        sections,
        reader.offset,
    )


def _take_pages(pages: Pages, section: Section, shape: Shape) -> None:
    batch, data = unpack_pages(section, shape.backings)
    numbers = [first + n for first, count in batch.spans for n in range(count)]
    for at, number in enumerate(numbers):
        page = data[at * PAGE_SIZE : (at + 1) * PAGE_SIZE]
        place = batch.backing, number
        # One that came before counts no more, whether this one is zero or not.
        pages.pop(place, None)
        if page != _ZERO_PAGE:
            pages[place] = hashlib.blake2b(page, digest_size=_DIGEST_BYTES).hexdigest()


# In words


def blocks(found: Inspection) -> list[Block]:
    """Return all that a stream says, in words."""
    vcpus = enumerate(found.state.vcpus)
    return [
        Block("source", tuple(_source_rows(found.source))),
        Block("machine", tuple(_machine_rows(found))),
        Block("memory slots", tuple(_slot_rows(found))),
        *(block for number, parts in vcpus for block in vcpu_blocks(number, parts)),
    ]


def as_json(found: Inspection) -> dict[str, Any]:
    """Return all that a stream says, as JSON can say it: every field, and the words by block."""
    return {
        "source": dict(found.source),
        "shape": found.shape.to_json(),
        "memory": {"pages": len(found.pages), "pages_by_mapping": _pages_by_mapping(found)},
        "state": state_fields(found.state),
        "words": {block.title: {r.name: r.text for r in block.rows} for block in blocks(found)},
        "sides": dict(found.sides),
        "sections": found.sections,
        "size_bytes": found.size_bytes,
    }


def _source_rows(source: Mapping[str, Any]) -> Iterator[Row]:
    yield Row("kernel", source["kernel"], False)
    yield Row("architecture", source["architecture"], False)
    for name, value in source["capabilities"].items():
        yield Row(name, str(value) if value else "no", False)


def _machine_rows(found: Inspection) -> Iterator[Row]:
    shape = found.shape
    yield Row("vCPUs", str(shape.vcpus), False)
    yield Row("irqchip", "in the kernel" if shape.irqchip else "none", False)
    yield Row("memory", f"{shape.memory_bytes} bytes in {len(shape.backings)} mapping(s)", False)
    yield Row("pages not zero", str(len(found.pages)), False)
    yield Row("sides", " ".join(found.sides) or "none", False)
    yield Row("stream", f"{found.size_bytes} bytes in {found.sections} sections", False)


def _slot_rows(found: Inspection) -> Iterator[Row]:
    counts = _pages_by_mapping(found)
    for slot in found.shape.slots:
        end = slot.gpa + found.shape.backings[slot.backing]
        space = ", seen in SMM" if slot.as_id else ""
        text = f"{slot.gpa:#x}-{end - 1:#x} flags={slot.flags:#x} mapping {slot.backing}"
        pages = f"{counts[slot.backing]} page(s) not zero{space}"
        yield Row(f"{slot.number} (as_id {slot.as_id})", f"{text}, {pages}", False)


def _pages_by_mapping(found: Inspection) -> list[int]:
    counts = [0] * len(found.shape.backings)
    for backing, _ in found.pages:
        counts[backing] += 1
    return counts


# Compared


@dataclass(frozen=True)
class Excused:
    """A difference that is none of the machine's state."""

    difference: Difference
    why: str


@dataclass(frozen=True)
class Comparison:
    """Where two streams differ."""

    differences: tuple[Difference, ...]
    excused: tuple[Excused, ...]


def compare(one: Inspection, other: Inspection) -> Comparison:
    """Return every value in which two streams differ, those that may sorted out."""
    counted, excused = [], []
    for difference in field_differences(_all_fields(one), _all_fields(other)):
        why = next((why for e, why in EXCUSED.items() if re.fullmatch(e, difference.what)), None)
        if why is None:
            counted.append(difference)
        else:
            excused.append(Excused(difference, why))
    return Comparison(tuple(counted), tuple(excused))


def comparison_as_json(compared: Comparison) -> dict[str, Any]:
    """Return where two streams differ, as JSON can say it."""
    return {
        "differences": [_difference_json(difference) for difference in compared.differences],
        "excused": [{**_difference_json(e.difference), "why": e.why} for e in compared.excused],
    }


def _difference_json(difference: Difference) -> dict[str, Any]:
    return {"what": difference.what, "one": difference.one, "other": difference.other}


def _all_fields(found: Inspection) -> Fields:
    return {
        **_json_fields("source", found.source),
        **_json_fields("shape", found.shape.to_json()),
        **_memory_fields(found),
        **state_fields(found.state),
        **_json_fields("sides", found.sides),
    }


def _memory_fields(found: Inspection) -> Fields:
    """Pages by the address of the first slot that shows them; what they hold is told apart only."""
    gpas: dict[int, tuple[int, int]] = {}
    for slot in sorted(found.shape.slots, key=lambda slot: (slot.as_id, slot.number)):
        gpas.setdefault(slot.backing, (slot.as_id, slot.gpa))
    fields: Fields = {}
    for (backing, page), digest in sorted(found.pages.items()):
        as_id, gpa = gpas[backing]
        space = " in SMRAM" if as_id else ""
        fields[f"page at {gpa + page * PAGE_SIZE:#x}{space}"] = f"<{digest[:8]}>"
    return fields


def _json_fields(path: str, value: Any) -> Fields:
    if isinstance(value, Mapping) and value:
        items = [(f"{path}.{name}", inner) for name, inner in value.items()]
    elif isinstance(value, list) and value:
        items = [(f"{path}[{number}]", inner) for number, inner in enumerate(value)]
    else:
        return {path: value if type(value) is int else repr(value)}
    return {name: found for at, inner in items for name, found in _json_fields(at, inner).items()}
