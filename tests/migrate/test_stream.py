"""The format: what is written is read again, and nothing else is."""

import contextlib
import io
import json
import struct
import zlib

import pytest
from forged_stream import (
    PAGE,
    SHAPE,
    SOURCE,
    Mutator,
    Raw,
    seal,
    section_bytes,
    stream,
    take_apart,
    vcpu_parts,
    vm_parts,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

from harness.migrate.errors import Refused, StreamError
from harness.migrate.inspect import as_json, compare, inspect_stream
from harness.migrate.memory_image import BATCH_PAGES, Batch, Memory
from harness.migrate.sections import (
    LONGEST,
    NUMBER,
    SIDE,
    Mould,
    Section,
    expect_inside,
    pack_parts,
    parse_json,
    split_parts,
    unpack_number,
    unpack_pages,
    unpack_parts,
    unpack_side,
)
from harness.migrate.shape import Shape
from harness.migrate.stream import MAGIC, PAGES_BESIDE, StreamReader, StreamWriter
from kvm_ioctl.asm_kvm import kvm_msr_entry, kvm_nested_state

VALID = stream()
SECTIONS = take_apart(VALID)
LONGEST_LINE = 400
TWICE = bytes(kvm_msr_entry(index=5)) * 2

names = st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=255)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip


def read(data):
    return inspect_stream(io.BytesIO(data))


def refusal(data):
    """Return the line that a stream is refused with."""
    with pytest.raises((StreamError, Refused)) as caught:
        read(data)
    return one_line(caught.value)


def one_line(error):
    line = str(error)
    assert line
    assert line.isprintable()
    assert len(line) < LONGEST_LINE
    return line


def head(**changes):
    tree = json.loads(SECTIONS[0].body)
    tree.update(changes)
    return seal([Raw(b"HEAD", json.dumps(tree).encode()), *SECTIONS[1:]])


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


# Damage


def flipped(at, bit):
    damaged = bytearray(VALID)
    damaged[at] ^= 1 << bit
    return bytes(damaged)


def header_bytes():
    """Every place of the start and of the sections' headers."""
    yield from range(16)
    at = 16
    for section in SECTIONS:
        yield from range(at, at + 24)
        at += 24 + len(section.body)


def test_a_flipped_bit_in_any_byte_of_a_header_is_seen():
    for at in header_bytes():
        refusal(flipped(at, at % 8))


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(VALID) - 1), st.integers(0, 7))
def test_a_flipped_bit_anywhere_is_seen(at, bit):
    refusal(flipped(at, bit))


@settings(max_examples=150, deadline=None)
@given(st.integers(0, len(VALID) - 1))
@example(0)
@example(len(VALID) - 1)
def test_any_truncation_is_seen(size):
    assert "cut off" in refusal(VALID[:size])


def test_more_after_the_end_is_seen():
    assert "more bytes after the end" in refusal(VALID + b"\0")


@pytest.mark.parametrize("number", range(len(SECTIONS)))
def test_a_section_that_is_missing_moved_or_there_twice_is_seen(number):
    raw = [section_bytes(section, i) for i, section in enumerate(SECTIONS)]
    start = VALID[:16]
    refusal(start + b"".join(raw[:number] + raw[number + 1 :]))
    refusal(start + b"".join(raw[: number + 1] + raw[number:]))
    for other in range(number):
        swapped = list(raw)
        swapped[number], swapped[other] = raw[other], raw[number]
        refusal(start + b"".join(swapped))


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_are_no_stream(data):
    refusal(data)
    refusal(VALID[:16] + data)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32))
def test_damage_with_right_checksums_is_refused_or_can_be_shown(seed):
    try:
        found = read(Mutator(VALID, seed).mutated())
    except (StreamError, Refused) as e:
        one_line(e)
    else:
        json.dumps(as_json(found), allow_nan=False)
        compare(found, read(VALID))


@settings(max_examples=150, deadline=None)
@given(st.integers(0, len(SECTIONS) - 1), st.binary(max_size=300))
def test_random_bodies_with_right_checksums_are_refused_in_one_line(number, body):
    sections = list(SECTIONS)
    sections[number] = Raw(sections[number].tag, body)
    try:
        read(seal(sections, recount=False))
    except (StreamError, Refused) as e:
        one_line(e)


# One case each


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (b"", "the start: cut off after 0 of 16 bytes"),
        (b"x" * 16, "not a machine's stream: it starts with b'xxxxxxxx'"),
        (MAGIC + b"\1\0" + bytes(6), "stream version 1, this harness reads 3"),
        (MAGIC + b"\4\0" + bytes(6), "stream version 4, this harness reads 3"),
        (MAGIC + b"\3\0\4\0" + bytes(4), "the start: unknown flags 0x4"),
        (MAGIC + b"\3\0\0\1" + bytes(4), "the start: unknown flags 0x100"),
        (MAGIC + b"\3\0" + bytes(5) + b"\1", "the start: 00 00 00 01 where zeroes must be"),
        (
            MAGIC + b"\3\0\3\0" + bytes(4),
            "the start: pages come past the stream, and here is no way for them",
        ),
    ],
)
def test_a_wrong_start(data, line):
    assert refusal(data) == line


@pytest.mark.parametrize(
    ("order", "line"),
    [
        ([b"VMST"], "not allowed after the start"),
        ([b"HEAD", b"HEAD"], "not allowed after HEAD"),
        ([b"HEAD", b"DONE"], "not allowed after HEAD"),
        ([b"HEAD", b"VCPU"], "not allowed after HEAD"),
        ([b"HEAD", b"VMST", b"PAGE"], "not allowed after VMST"),
        ([b"HEAD", b"VMST", b"VCPU", b"SIDE", b"VCPU"], "not allowed after SIDE"),
        ([b"HEAD", b"SIDE", b"VMST", b"VMST"], "not allowed after VMST"),
        ([b"HEAD", b"WHAT"], "unknown tag b'WHAT'"),
        ([b"HEAD", b"\n\0\xff "], "unknown tag"),
        ([b"HEAD", b"VMST", b"VCPU", b"DONE"], "1 vCPUs of 2 came"),
        ([b"HEAD", b"VMST", b"VCPU", b"VCPU"], "vCPU 0, 1 is next"),
    ],
)
def test_a_wrong_order(order, line):
    by_tag = {raw.tag: raw for raw in reversed(SECTIONS)}
    sections = [by_tag.get(tag, Raw(tag, b"")) for tag in order]
    assert line in refusal(seal(sections))


def test_a_count_that_is_wrong():
    done = Raw(b"DONE", struct.pack("<Q", 99))
    assert "counts other sections" in refusal(seal([*SECTIONS[:-1], done], recount=False))


@pytest.mark.parametrize("tag", LONGEST)
def test_a_claim_of_too_many_bytes_is_refused_before_any_is_read(tag):
    header = struct.pack("<4sIQI", tag, 0, LONGEST[tag] + 1, 0)

    class Source(io.BytesIO):
        def read(self, size=-1, /):
            assert self.tell() <= 16 + 20
            return super().read(size)

    source = Source(VALID[:16] + header + struct.pack("<I", zlib.crc32(header)))
    with pytest.raises(StreamError, match="are possible"):
        next(StreamReader(source).sections())


def test_memory_is_taken_for_what_came_and_not_for_what_a_header_claims():
    asked = []

    class Source(io.BytesIO):
        def read(self, size=-1, /):
            asked.append(size)
            return super().read(size)

    raw = section_bytes(Raw(SIDE, bytes(LONGEST[SIDE])), 0)
    with pytest.raises(StreamError, match="cut off after 1000 of"):
        next(StreamReader(Source(VALID[:16] + raw[:1024])).sections())
    assert max(asked) <= 1 << 20


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"NaN", b"[Infinity]", b"1e999", b"\xff", b'{"a":1,"a":2}', b"[" * 100_000,
        b"9" * 5000, "1".encode("utf-16"), b"\xef\xbb\xbf1", b'"' + b"x" * 5000,
    ],
)  # fmt: skip
def test_json_that_is_none(body):
    with pytest.raises(StreamError, match="malformed JSON") as caught:
        parse_json(Section(b"SIDE", 0, 0, body), body)
    one_line(caught.value)


@pytest.mark.parametrize(
    ("body", "line"),
    [
        (b"\0", "no name at 0x0"),
        (b"\5abc", "no name at 0x0"),
        (b"\3a\nb", "no name at 0x0"),
        (b"\3a\xffb", "no name at 0x0"),
        (b"\1z\0\0\0\0", "part 'z' is unknown"),
        (b"\1a\0\0\0\0\1a\0\0\0\0", "part 'a' is there twice"),
        (b"\1a\0\0", "part a is cut off"),
        (b"\1a\2\0\0\0x", "part a is cut off"),
        (b"\1a\xff\xff\xff\xffx", "part a is cut off"),
    ],
)
def test_parts_that_are_none(body, line):
    with pytest.raises(StreamError, match=line):
        unpack_parts(Section(b"VMST", 0, 0, body), 0, ["a", "b"])


def page_body(spans, pages, mapping=0, count=None):
    table = b"".join(struct.pack("<QQ", *span) for span in spans)
    header = struct.pack("<II", mapping, len(spans) if count is None else count)
    return header + table + bytes(pages * PAGE)


@pytest.mark.parametrize(
    ("body", "line"),
    [
        (b"", "0 bytes are no pages"),
        (bytes(7), "7 bytes are no pages"),
        (page_body([], 0), "0 spans, 1 to 256 are possible"),
        (page_body([], 1), "0 spans, 1 to 256 are possible"),
        (page_body([(0, 1)], 1, count=257), "257 spans, 1 to 256 are possible"),
        (page_body([(0, 1)], 0, count=2), "the table of its pages is cut off"),
        (page_body([(0, 1)], 0), "0 bytes are not 1 whole pages"),
        (page_body([(0, 1)], 1)[:-1], "4095 bytes are not 1 whole pages"),
        (page_body([(0, 1)], 2), "8192 bytes are not 1 whole pages"),
        (page_body([(0, 0)], 0), "0 pages from 0 on"),
        (page_body([(0, 257)], 1), "257 pages from 0 on"),
        (page_body([(0, 2**64 - 1)], 1), "pages from 0 on"),
        (page_body([(1, 1), (0, 1)], 2), "1 pages from 0 on, after those up to 2"),
        (page_body([(0, 2), (1, 1)], 3), "1 pages from 1 on, after those up to 2"),
        (page_body([(1, 1), (1, 1)], 2), "1 pages from 1 on, after those up to 2"),
        (page_body([(0, 200), (300, 57)], 255), "not 257 whole pages"),
        (page_body([(0, 1)], 1, mapping=9), "pages 0..0 of mapping 9 are outside memory"),
        (page_body([(4, 1)], 1), "outside memory"),
        (page_body([(0, 1), (4, 1)], 2), "outside memory"),
        (page_body([(3, 2)], 2), "outside memory"),
        (page_body([(2**64 - 1, 1)], 1), "outside memory"),
    ],
)
def test_pages_that_are_none(body, line):
    data = seal([SECTIONS[0], Raw(b"PAGE", body), *SECTIONS[1:]])
    assert line in refusal(data)
    sections = sections_in_place(data, bytearray(4 * PAGE))
    next(sections)
    with pytest.raises(StreamError, match=line):
        next(sections)


def test_too_many_pages_are_refused():
    body = page_body([(0, BATCH_PAGES + 1)], BATCH_PAGES + 1)
    assert "are possible" in refusal(seal([SECTIONS[0], Raw(b"PAGE", body), *SECTIONS[1:]]))


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


# Parts of a machine


@pytest.mark.parametrize("name", sorted(set(vcpu_parts()) - {"tsc_khz", "xcrs", "nested"}))
def test_a_vcpu_without_a_part_is_refused(name):
    line = refusal(stream(vcpus=[vcpu_parts(), vcpu_parts(**{name: None})]))
    assert f"part {name} is missing" in line


@pytest.mark.parametrize("name", ["tsc_khz", "xcrs", "nested"])
def test_what_a_kernel_may_not_tell_may_be_missing(name):
    assert name not in read(stream(vcpus=[vcpu_parts(**{name: None})] * 2)).state.vcpus[0]


@pytest.mark.parametrize("name", sorted(vcpu_parts()))
@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"\0"])
def test_a_vcpu_part_of_a_wrong_size_is_refused(name, change):
    line = refusal(stream(vcpus=[vcpu_parts(**{name: change(vcpu_parts()[name])})] * 2))
    assert f"part {name} has" in line


@pytest.mark.parametrize("name", sorted(vm_parts()))
def test_the_vms_own_parts_are_looked_at_too(name):
    parts = vm_parts()
    assert f"part {name} has" in refusal(stream(vm={**parts, name: parts[name] + b"\0"}))
    del parts[name]
    assert f"part {name} is missing" in refusal(stream(vm=parts))


@pytest.mark.parametrize("name", ["lapic", "pic_master"])
def test_irqchips_come_only_with_irqchips(name):
    shape = Shape(SHAPE.backings, SHAPE.slots, 2, False)
    vm = {**vm_parts(False), **({name: vm_parts()[name]} if name in vm_parts() else {})}
    vcpu = vcpu_parts(False)
    if name == "lapic":
        vcpu["lapic"] = vcpu_parts()["lapic"]
    assert "without irqchip" in refusal(stream(shape=shape, vm=vm, vcpus=[vcpu] * 2))


@pytest.mark.parametrize(
    ("vcpu", "line"),
    [
        ({"nested": vcpu_parts()["nested"][:128]}, "says that it has 4224 bytes, and has 128"),
        ({"msrs": vcpu_parts()["msrs"] * 2}, "one MSR is there twice"),
        ({"cpuid": bytes(40 * 257)}, "part cpuid has 10280 bytes"),
    ],
)
def test_parts_that_are_wrong_in_themselves(vcpu, line):
    assert line in refusal(stream(vcpus=[vcpu_parts(**vcpu)] * 2))


def test_a_chip_in_anothers_place_is_refused():
    parts = vm_parts()
    swapped = {**parts, "pic_master": parts["ioapic"], "ioapic": parts["pic_master"]}
    assert "chip_id is 2, not KVM_IRQCHIP_PIC_MASTER" in refusal(stream(vm=swapped))


def test_more_vcpus_than_the_shape_has_are_refused_as_they_come():
    assert "the machine has 2 vCPUs" in refusal(stream(vcpus=[vcpu_parts()] * 3))


def test_sides_of_one_name_are_refused():
    assert "'early' is there twice" in refusal(stream(sides={"early": 2}))


def test_sides_without_end_are_refused():
    many = [Raw(SIDE, b"\4%04d1" % number) for number in range(1025)]
    assert "too many SIDEs" in refusal(seal([SECTIONS[0], *many]))


# The header's words


@pytest.mark.parametrize(
    ("source", "line"),
    [
        (None, "fingerprint is malformed"),
        ({}, "fingerprint is malformed"),
        ({"architecture": "x86_64", "kernel": "6", "capabilities": []}, "no numbers"),
        ({"architecture": "x86_64", "kernel": "6", "capabilities": {"a": "1"}}, "no numbers"),
        ({"architecture": "x86_64", "kernel": 6, "capabilities": {}}, "is no text"),
        ({"architecture": "a" * 5000, "kernel": "6", "capabilities": {}}, "architecture 'aaa"),
        ({"architecture": "aarch64", "kernel": "6", "capabilities": {}}, "architecture 'aarch64'"),
    ],
)
def test_a_foreign_source(source, line):
    assert line in refusal(head(source=source))


@pytest.mark.parametrize("body", [b"1", b"[]", b'{"shape":{}}', b'{"shape":{},"source":{},"x":1}'])
def test_a_header_that_is_none(body):
    assert "section 0 (HEAD at offset 0x10): malformed" in refusal(
        seal([Raw(b"HEAD", body), *SECTIONS[1:]])
    )


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


def sections_in_place(data, memory, source=io.BytesIO):
    def place(where, batch):
        expect_inside(where, batch, (len(memory),))
        return batch.views(memoryview(memory))

    return StreamReader(source(data), place).sections()


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


def past_the_stream(*found):
    """Return a stream whose pages were brought otherwise, and what was brought."""
    sink, brought = io.BytesIO(), []
    writer = StreamWriter(sink, bring=lambda batch, memory: brought.append((batch, memory)))
    writer.head({})
    batch, memory = Batch(0, found), Memory(bytearray(b"\5" * (16 * PAGE)))
    assert writer.pages_of(batch, memory) == batch.pages
    assert brought[0][1] is memory
    assert writer.written_bytes == len(sink.getvalue()) + sum(n for _, n in found) * PAGE
    return sink.getvalue(), brought


def test_pages_past_the_stream_are_not_in_it():
    data, [(batch, _)] = past_the_stream((1, 2), (9, 1))
    assert batch == Batch(0, ((1, 2), (9, 1)))
    assert bytes([5] * 16) not in data
    came = [batch]
    sections = StreamReader(io.BytesIO(data), came=lambda batch: batch == came.pop()).sections()
    next(sections)
    assert next(sections).pages == batch
    assert not came


def test_pages_past_the_stream_that_did_not_come_are_missed():
    data, _ = past_the_stream((1, 2))
    sections = StreamReader(io.BytesIO(data), came=lambda batch: False).sections()
    next(sections)
    with pytest.raises(StreamError, match=r"section 1 .*: its pages did not come"):
        next(sections)


def test_pages_past_the_stream_and_in_it_are_refused():
    data = bytearray(with_pages((1, 1)))
    data[10] |= PAGES_BESIDE
    sections = StreamReader(io.BytesIO(data), came=lambda batch: True).sections()
    next(sections)
    with pytest.raises(StreamError, match="4096 bytes of pages that come past the stream"):
        next(sections)


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


@pytest.mark.parametrize(
    ("prep", "line"),
    [
        ([PREPARED[1]], "vCPU 1, 0 is next"),
        ([PREPARED[0], PREPARED[0]], "vCPU 0, 1 is next"),
        ([*PREPARED, (3, vm_parts())], "the machine has 2 vCPUs"),
        ([(0, vm_parts())], "part 'pic_master' is unknown"),
        ([(0, vcpu_parts(regs=b""))], "part regs has 0 bytes, not 144"),
        ([(0, vcpu_parts(msrs=TWICE))], "one MSR is there twice"),
    ],
)
def test_wrong_ones_beforehand_are_refused(prep, line):
    assert line in refusal(stream(prep=prep))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"nested": vcpu_parts()["nested"][:-1]}, "part nested"),
        ({"nested": b""}, "part nested has 0 bytes"),
        ({"regs": None}, "part regs is missing"),
        ({"lapic": b"x"}, "part lapic has 1 bytes"),
    ],
)
def test_wrong_ones_after_right_ones_are_refused(changes, line):
    vcpus = [vcpu_parts(**changes), vcpu_parts()]
    assert line in refusal(stream(prep=PREPARED, vcpus=vcpus))


def test_one_msr_twice_after_right_ones_is_refused():
    earlier = vcpu_parts(msrs=bytes(kvm_msr_entry(index=1)) + bytes(kvm_msr_entry(index=2)))
    data = stream(prep=[(0, earlier), *PREPARED[1:]], vcpus=[vcpu_parts(msrs=TWICE), vcpu_parts()])
    assert "one MSR is there twice" in refusal(data)


def test_a_wrong_chip_after_right_ones_is_refused():
    vm = {**vm_parts(), "ioapic": vm_parts()["pic_slave"]}
    assert "chip_id is 1, not KVM_IRQCHIP_IOAPIC" in refusal(stream(prep=PREPARED, vm=vm))
