"""The format: what is written is read again."""

import contextlib
import io
import struct

import pytest
from forged_stream import (
    PAGE,
    SHAPE,
    SOURCE,
    Raw,
    seal,
    stream,
    take_apart,
    vcpu_parts,
    vm_parts,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from stream_reading import SECTIONS, VALID, one_line, read, refusal, sections_in_place

from harness.migrate.errors import StreamError
from harness.migrate.inspect import inspect_stream
from harness.migrate.memory_image import BATCH_PAGES, Batch, Memory
from harness.migrate.sections import (
    LONGEST,
    NUMBER,
    SIDE,
    Mould,
    Section,
    pack_parts,
    split_parts,
    unpack_number,
    unpack_pages,
    unpack_parts,
    unpack_side,
)
from harness.migrate.shape import Shape
from harness.migrate.stream import PAGES_BESIDE, PAGES_UNCHECKED, StreamReader, StreamWriter
from kvm_ioctl.asm_kvm import kvm_nested_state

names = st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=255)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip


def filled(value, *found):
    """Spans of mapping 0, and pages full of one value for them."""
    pages = [memoryview(bytes([value]) * (count * PAGE)) for _, count in found]
    return Batch(0, tuple(found)), pages


# Round trips


def unchecked():
    """The pages of `VALID` and no more, without checksums."""
    sink = io.BytesIO()
    writer = StreamWriter(sink, page_checksums=False)
    writer.head({"source": SOURCE, "shape": SHAPE.to_json()})
    writer.pages(*filled(7, (1, 1)))
    writer.vm(vm_parts())
    for number in range(SHAPE.vcpus):
        writer.vcpu(number, vcpu_parts())
    writer.done()
    return sink.getvalue()


def test_pages_without_checksums_are_read_all_the_same():
    found = read(unchecked())
    assert sorted(found.pages) == [(0, 1)]
    assert found.state.vm == vm_parts()


def test_without_checksums_only_the_bytes_of_pages_are_believed():
    data = unchecked()
    page = data.index(bytes([7]) * PAGE)
    seen = set()
    for at in range(0, len(data), 7):
        flipped = bytearray(data)
        flipped[at] ^= 0x10
        if page <= at < page + PAGE:
            read(bytes(flipped))
            seen.add("page")
        else:
            refusal(bytes(flipped))
            seen.add("other")
    assert seen == {"page", "other"}


def test_all_that_is_written_is_read():
    found = read(VALID)
    assert found.shape == SHAPE
    assert sorted(found.pages) == [(0, 0), (0, 1), (0, 2), (1, 0)]
    # (0, 2) came twice, and counts as it came last.
    assert len(set(found.pages.values())) == 4
    assert found.state.vm == vm_parts()
    assert list(found.state.vcpus) == [vcpu_parts()] * 2
    assert found.sides == {"early": 1, "proxies": {"l1": [1, None, "x"]}}
    assert found.size_bytes == len(VALID)
    assert found.sections == len(SECTIONS)


def test_taking_apart_and_sealing_changes_nothing():
    assert seal(SECTIONS) == VALID


@settings(deadline=None)
@given(st.dictionaries(names, st.binary(max_size=64), max_size=5), st.integers(0, 2**32 - 1))
def test_parts_come_back(parts, number):
    sink = io.BytesIO()
    StreamWriter(sink).vcpu(number, parts)
    raw = take_apart(sink.getvalue())[0]
    section = Section(raw.tag, 0, 0, raw.body)
    assert unpack_number(section) == number
    assert unpack_parts(section, NUMBER.size, parts) == parts
    assert split_parts(raw.body, NUMBER.size) == parts


@settings(deadline=None)
@given(st.dictionaries(names, st.binary(max_size=64), min_size=1, max_size=5), st.data())
def test_a_mould_fits_what_is_like_it_and_nothing_else(parts, data):
    mould, *_, last = Mould(parts), *parts
    like = {name: bytes(len(value)) for name, value in parts.items()}
    like[last] = data.draw(st.binary(max_size=64))
    packed = b"1234" + pack_parts(like)
    assert mould.split(packed, 4) == like
    damaged = bytearray(packed)
    damaged[data.draw(st.integers(4, len(packed) - 1))] ^= 1
    found = mould.split(bytes(damaged), 4)
    assert found is None or found == split_parts(bytes(damaged), 4)
    assert mould.split(packed[: data.draw(st.integers(0, len(packed) - 1))], 4) is None


@settings(deadline=None)
@given(names, json_values)
def test_sides_come_back(name, data):
    sink = io.BytesIO()
    StreamWriter(sink).side(name, data)
    section = take_apart(sink.getvalue())[0]
    assert unpack_side(Section(section.tag, 0, 0, section.body)) == (name, data)


@settings(deadline=None)
@given(st.integers(0, 3), st.integers(0, 20), st.integers(1, 4))
def test_pages_come_back_or_are_outside(backing, first, count):
    sink = io.BytesIO()
    data = bytes(range(256)) * (16 * count)
    spans = ((first, count), (first + count + 1, 1))
    pages = [memoryview(data), memoryview(bytes(PAGE))]
    StreamWriter(sink).pages(Batch(backing, spans), pages)
    section = Section(b"PAGE", 0, 0, take_apart(sink.getvalue())[0].body)
    backings = (4 * PAGE, 20 * PAGE)
    if backing < 2 and (first + count + 2) * PAGE <= backings[backing]:
        batch, found = unpack_pages(section, backings)
        assert batch == Batch(backing, spans)
        assert bytes(found) == data + bytes(PAGE)
    else:
        with pytest.raises(StreamError, match="outside memory"):
            unpack_pages(section, backings)


def test_a_source_that_gives_a_byte_at_a_time_is_read_too():
    class Drip(io.BytesIO):
        def read(self, size=-1, /):
            return super().read(min(size, 1))

    assert inspect_stream(Drip(VALID)) == read(VALID)


def test_a_machine_without_vcpus_may_have_sides():
    found = read(stream(shape=Shape((PAGE,), SHAPE.slots[:1], 0, False), pages=False))
    assert list(found.sides) == ["early", "proxies"]


def test_a_page_counts_as_it_came_last():
    zero = Raw(b"PAGE", struct.pack("<IIQQ", 0, 1, 1, 1) + bytes(PAGE))
    assert (0, 1) not in read(seal([*SECTIONS[:3], zero, *SECTIONS[3:]])).pages
    assert (0, 1) in read(seal([SECTIONS[0], zero, *SECTIONS[1:]])).pages


# What the writer does not write


@pytest.mark.parametrize("name", ["", "x" * 256, "ä", "a\n", "\x7f"])
def test_a_name_that_no_reader_takes_is_not_written(name):
    with pytest.raises(StreamError, match="no name") as caught:
        StreamWriter(io.BytesIO()).side(name, 1)
    one_line(caught.value)


@pytest.mark.parametrize("data", [float("nan"), float("inf"), {1, 2}, b"x"])
def test_what_json_cannot_say_is_not_written(data):
    with pytest.raises(StreamError, match="side 'a': cannot be said in JSON") as caught:
        StreamWriter(io.BytesIO()).side("a", data)
    one_line(caught.value)


def test_a_body_that_no_reader_takes_is_not_written():
    sink = io.BytesIO()
    with pytest.raises(StreamError, match="are possible"):
        StreamWriter(sink).side("a", "x" * LONGEST[SIDE])
    assert len(sink.getvalue()) == 16


@pytest.mark.parametrize("found", [(), ((0, BATCH_PAGES + 1),), ((0, 1), (2, BATCH_PAGES))])
def test_pages_that_no_reader_takes_are_not_written(found):
    sink = io.BytesIO()
    with pytest.raises(StreamError, match=r"a PAGE of \d+ pages: 1 to 256 are possible"):
        StreamWriter(sink).pages(*filled(1, *found))
    assert len(sink.getvalue()) == 16


# Many sections in one write; pages straight into memory


class WritingSink:
    def __init__(self):
        self.writes = []

    def write(self, data):
        self.writes.append(bytes(data))


class TakingAllSink(WritingSink):
    def write_all(self, pieces):
        self.writes.append(b"".join(pieces))


def written(pages, *, gathered, sink=WritingSink):
    sink = sink()
    writer = StreamWriter(sink)
    with writer.gathered() if gathered else contextlib.nullcontext():
        for first, count in pages:
            writer.pages(*filled(first, (first, count)))
        assert not gathered or writer.written_bytes >= sum(map(len, sink.writes))
    assert writer.written_bytes == sum(map(len, sink.writes))
    return sink.writes


PAGES = [(1, 1), (3, 1), (5, 1), (20, 100), (130, 1)]


@pytest.mark.parametrize("sink", [WritingSink, TakingAllSink])
def test_gathered_sections_are_the_same_bytes_in_fewer_writes(sink):
    one_by_one, gathered = (written(PAGES, gathered=how, sink=sink) for how in (False, True))
    assert b"".join(gathered) == b"".join(one_by_one)
    assert len(gathered) < len(PAGES) < len(one_by_one)


def test_an_error_while_sections_are_gathered_writes_none_of_them():
    sink = io.BytesIO()
    writer = StreamWriter(sink)

    def fail_on_the_way():
        with writer.gathered():
            writer.pages(*filled(0, (1, 1)))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_on_the_way()
    assert len(sink.getvalue()) == 16


def with_pages(*found):
    sink = io.BytesIO()
    writer = StreamWriter(sink)
    writer.head({})
    writer.pages(*filled(0x11, *found))
    return sink.getvalue()


class OnlyRead:
    """A source that has nothing but what `Source` asks for, and gives little at a time."""

    def __init__(self, data):
        self._file = io.BytesIO(data)

    def read(self, size):
        return self._file.read(min(size, 1000))


class Scattering(OnlyRead):
    """One that fills many buffers at once."""

    def fill(self, buffers):
        for buffer in buffers:
            assert self._file.readinto(buffer) == len(buffer)


@pytest.mark.parametrize("source", [io.BytesIO, OnlyRead, Scattering])
def test_pages_go_where_they_are_wanted(source):
    memory = bytearray(6 * PAGE)
    sections = sections_in_place(with_pages((1, 1), (3, 2)), memory, source)
    assert next(sections).pages is None
    assert next(sections).pages == Batch(0, ((1, 1), (3, 2)))
    full = b"\x11" * PAGE
    assert memory == bytes(PAGE) + full + bytes(PAGE) + 2 * full + bytes(PAGE)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (with_pages((4, 3)), "section 1 .*: pages 4..6 of mapping 0 are outside memory"),
        (with_pages((2, 3))[:-1] + b"\0", "section 1 .*: checksum of the body is wrong"),
        (with_pages((0, 1), (2, 2))[:-1], "section 1 .*: cut off after 12287 of 12288 bytes"),
    ],
)
def test_pages_that_cannot_be_placed(data, why):
    sections = sections_in_place(data, bytearray(6 * PAGE))
    next(sections)
    with pytest.raises(StreamError, match=why):
        next(sections)


# Pages past the stream


class Bearer:
    """Brings pages nowhere, and remembers them."""

    def __init__(self):
        self.brought = []

    def bring(self, batch, memory):
        self.brought.append((batch, memory))

    def bring_bits(self, backing, pages, memory):
        self.brought.append((backing, pages, memory))


def test_pages_past_the_stream_are_not_in_it():
    sink, bearer = io.BytesIO(), Bearer()
    writer = StreamWriter(sink, bearer=bearer)
    writer.head({})
    batch, memory = Batch(0, ((1, 2), (9, 1))), Memory(bytearray(b"\5" * (16 * PAGE)))
    assert writer.pages_of(batch, memory) == 3
    assert writer.pages_of_bits(1, {0: 0b1001}, memory) == 2
    assert bearer.brought == [(batch, memory), (1, {0: 0b1001}, memory)]
    assert writer.written_bytes == len(sink.getvalue()) + 5 * PAGE
    assert (writer.sections, sink.getvalue()[10]) == (1, PAGES_UNCHECKED | PAGES_BESIDE)
    with pytest.raises(StreamError, match="here is no way for them"):
        StreamReader(io.BytesIO(sink.getvalue()))


def test_pages_past_the_stream_and_in_it_are_refused():
    data = bytearray(with_pages((1, 1)))
    data[10] |= PAGES_BESIDE
    sections = StreamReader(io.BytesIO(data), beside=True).sections()
    next(sections)
    with pytest.raises(StreamError, match="not allowed where pages come past the stream"):
        next(sections)


def test_pages_of_bits_are_those_of_spans():
    sinks = []
    for write in (
        lambda writer, memory: writer.pages_of_bits(0, {0: 0b1100111}, memory),
        lambda writer, memory: writer.pages_of(Batch(0, ((0, 3), (5, 2))), memory),
    ):
        sinks.append(io.BytesIO())
        memory = Memory(bytearray(bytes(range(16)) * PAGE))
        assert write(StreamWriter(sinks[-1]), memory) == 5
    assert sinks[0].getvalue() == sinks[1].getvalue()


# What came beforehand

PREPARED = [(0, vcpu_parts()), (1, vcpu_parts()), (2, vm_parts())]


def test_what_came_beforehand_counts_less():
    earlier = [(0, vcpu_parts(regs=b"\7" * 144)), *PREPARED[1:]]
    assert read(stream(prep=earlier)).state == read(stream()).state


@pytest.mark.parametrize("name", ["nested", "msrs", "cpuid"])
def test_a_state_that_is_not_like_the_one_beforehand_is_read_all_the_same(name):
    other = kvm_nested_state(size=128, format=1).as_bytes() if name == "nested" else b""
    earlier = [(0, vcpu_parts(**{name: other})), *PREPARED[1:]]
    assert read(stream(prep=earlier)).state == read(stream()).state
