import struct

import pytest
from forged_elf import forge_elf, multiboot_header

from harness.machine.entry import reserved_memory
from harness.machine.errors import ImageError, MachineError
from harness.machine.loader import EntryMode, Segment, parse_image, raw_image
from harness.machine.memory_map import e820_map
from harness.machine.multiboot import MULTIBOOT_INFO_GPA, multiboot_info
from harness.machine.pc import check_image

MAGIC, ADDRESSES = 0x1BADB002, 1 << 16


def addressed(header=0x100010, load=0x100000, load_end=0, bss_end=0, entry=0x100004, tail=b"code"):
    """Return a file that is no ELF and has its header at byte 0x10."""
    basic = struct.pack("<III", MAGIC, ADDRESSES, -(MAGIC + ADDRESSES) & 0xFFFFFFFF)
    return bytes(16) + basic + struct.pack("<IIIII", header, load, load_end, bss_end, entry) + tail


def test_addresses_in_the_header_count():
    data = addressed(load_end=0x100032, bss_end=0x102000)
    image = parse_image(data)
    assert image.mode is EntryMode.MULTIBOOT32
    assert image.entry == 0x100004
    assert image.segments == (Segment(0x100000, data[:0x32], 0x2000),)


def test_without_ends_the_whole_file_is_loaded():
    data = addressed()
    assert parse_image(data).segments == (Segment(0x100000, data, len(data)),)


def test_addresses_count_even_in_an_elf_file():
    data = forge_elf(32, [(0x400000, addressed()[16:], 64)], entry=0x400000)
    at = data.index(struct.pack("<I", MAGIC))
    image = parse_image(data)
    assert [s.gpa for s in image.segments] == [0x100000]
    assert image.segments[0].data == data[at - 16 :]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"header": 0x0F0000}, "make no sense: header 0xf0000, load 0x100000-"),
        ({"header": 0x100020}, "make no sense"),
        ({"load_end": 0x0FF000}, "make no sense"),
        ({"bss_end": 0x100001}, "make no sense"),
        ({"entry": 0x200000}, "make no sense"),
        ({"load_end": 0x200000, "bss_end": 0x200000}, "truncated, its multiboot header wants"),
    ],
)
def test_addresses_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ImageError, match=message):
        parse_image(addressed(**changes))


def test_a_header_that_is_cut_off_is_refused():
    with pytest.raises(ImageError, match="truncated in its multiboot header"):
        parse_image(addressed()[:0x20])


def test_a_wrong_checksum_is_no_header():
    header = bytearray(multiboot_header())
    header[8] ^= 1
    image = parse_image(forge_elf(32, [(0x100000, bytes(header), 12)]))
    assert image.mode is EntryMode.PROTECTED32


def read(blob, gpa, size):
    at = gpa - MULTIBOOT_INFO_GPA
    return blob[at : at + size]


def test_the_information_holds_the_map_of_a_pc():
    blob = multiboot_info(e820_map(5 << 30), "image a b")
    flags, lower_kib, upper_kib = struct.unpack_from("<III", blob)
    assert (flags, lower_kib, upper_kib) == (0x245, 639, (3 << 20) - 1024)
    length, at = struct.unpack_from("<II", blob, 44)
    entries = list(struct.iter_unpack("<IQQI", read(blob, at, length)))
    assert entries == [(20, r.gpa, r.size_bytes, r.kind) for r in e820_map(5 << 30)]
    assert read(blob, struct.unpack_from("<I", blob, 16)[0], 10) == b"image a b\0"
    assert struct.unpack_from("<I", blob, 20)[0] == 0, "no modules"


# What is found out before anything boots

IN_LOW_MEMORY = raw_image(b"\x90" * 0x1000, 0x4000, EntryMode.MULTIBOOT32)


def test_an_image_in_low_memory_is_welcome():
    check_image(IN_LOW_MEMORY, 2, "image")


@pytest.mark.parametrize(
    ("gpa", "memory_mib", "message"),
    [
        (0x100000 * 16, 16, "segment 0x1000000-0x1000fff is outside memory (0x0-0x9ffff, 0xc0000-"),
        (0x9F800, 16, "overlaps 0x9b000-0x9fbff, which the loader needs"),
        (0xBFFF0, 16, "is outside memory"),
    ],
)
def test_an_image_that_does_not_fit_is_refused(gpa, memory_mib, message):
    image = raw_image(b"\x90" * 0x1000, gpa, EntryMode.MULTIBOOT32)
    with pytest.raises(ImageError) as caught:
        check_image(image, memory_mib, "image")
    assert message in str(caught.value)


def test_a_plain_elf_must_leave_room_for_its_page_tables():
    (area,) = reserved_memory(EntryMode.LONG64)
    with pytest.raises(ImageError, match="which the loader needs"):
        check_image(raw_image(b"\x90", area.start, EntryMode.LONG64), 16, "image")


def test_an_entry_point_in_no_segment_is_refused():
    image = raw_image(b"\x90" * 16, 0x100000, EntryMode.PROTECTED32, entry=0x100010)
    with pytest.raises(ImageError, match="the entry point 0x100010 is in no segment"):
        check_image(image, 16, "image")


def test_a_command_line_that_is_too_long_is_refused():
    with pytest.raises(MachineError, match="too long for multiboot"):
        check_image(IN_LOW_MEMORY, 16, "x" * 20000)


def test_symbols_name_addresses():
    image = parse_image(forge_elf(symbols=[("start", 0x100000), ("middle", 0x100002)]))
    assert image.symbol_at(0x100001) == "start+0x1"
    assert image.symbol_at(0x100003) == "middle+0x1"
    assert image.symbol_at(0x200000) is None
