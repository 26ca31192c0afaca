"""What a reader refuses, a case each, and the line that it says."""

import io
import json
import struct
import zlib

import pytest
from forged_stream import (
    PAGE,
    SHAPE,
    Raw,
    seal,
    section_bytes,
    stream,
    vcpu_parts,
    vm_parts,
)
from stream_reading import SECTIONS, VALID, one_line, read, refusal, sections_in_place

from harness.migrate.errors import StreamError
from harness.migrate.memory_image import BATCH_PAGES
from harness.migrate.sections import (
    LONGEST,
    SIDE,
    Section,
    parse_json,
    unpack_parts,
)
from harness.migrate.shape import Shape
from harness.migrate.stream import MAGIC, StreamReader
from kvm_ioctl.asm_kvm import kvm_msr_entry

TWICE = bytes(kvm_msr_entry(index=5)) * 2
PREPARED = [(0, vcpu_parts()), (1, vcpu_parts()), (2, vm_parts())]


def head(**changes):
    tree = json.loads(SECTIONS[0].body)
    tree.update(changes)
    return seal([Raw(b"HEAD", json.dumps(tree).encode()), *SECTIONS[1:]])


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


# What came beforehand


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
