import contextlib

import pytest
from forged_elf import forge_elf, multiboot_header
from hypothesis import given, settings
from hypothesis import strategies as st
from slots import IgnoresSlots

from harness.machine.entry import ENTRY_AREA
from harness.machine.errors import ImageError
from harness.machine.loader import EntryMode, parse_elf, raw_image, read_image
from harness.machine.memory import GuestMemory

MIB = 1 << 20


@pytest.fixture
def memory(fake_vm):
    with GuestMemory(fake_vm) as memory:
        memory.add(0, 4 * MIB)
        yield memory


@pytest.mark.parametrize(
    ("bits", "code", "mode"),
    [
        (64, b"code", EntryMode.LONG64),
        (32, b"code", EntryMode.PROTECTED32),
        (32, multiboot_header(), EntryMode.MULTIBOOT32),
        (64, multiboot_header(), EntryMode.LONG64),
    ],
)
def test_elf_is_read(bits, code, mode):
    data = forge_elf(bits, [(0x100000, code, 0x2000)], entry=0x100004, symbols=[("spin", 0x100008)])
    image = parse_elf(data)
    assert image.mode is mode
    assert image.entry == 0x100004
    assert [(s.gpa, s.data, s.size_bytes) for s in image.segments] == [(0x100000, code, 0x2000)]
    assert image.symbol("spin") == 0x100008


def test_segments_are_placed_and_their_rest_is_zeroed(memory):
    memory.write(0x100000, b"\xff" * 0x3000)
    parse_elf(forge_elf(segments=[(0x100000, b"code", 0x2000)])).place(memory)
    assert memory.read(0x100000, 0x2001) == b"code".ljust(0x2000, b"\0") + b"\xff"


def test_raw_code_is_placed(memory):
    image = raw_image(b"\xf4", 0x10000)
    image.place(memory, [ENTRY_AREA])
    assert (image.entry, image.mode) == (0x10000, EntryMode.REAL16)
    assert memory.read(0x10000, 1) == b"\xf4"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "image: not an ELF file"),
        (b"#!/bin/sh\n", "image: not an ELF file"),
        (b"\x7fELF", "image: truncated, ELF header ends at byte 6 of 4"),
        (forge_elf(elf_class=3), "ELF class 0301 is not little-endian 32 or 64"),
        (forge_elf(machine=183), "made for ELF machine 183, expected 62 in this class"),
        (forge_elf(32, machine=62), "made for ELF machine 62, expected 3 in this class"),
        (forge_elf(type=3), "ELF type 3 is no executable"),
        (forge_elf(segments=[]), "nothing to load in it"),
        (forge_elf(segments=[(0x100000, b"code", 2)]), "segment 0 has more bytes than memory"),
        (
            forge_elf(32, [(0x100000, multiboot_header(1 << 2), 12)]),
            "multiboot header flags 0x4 are not supported",
        ),
    ],
)
def test_what_is_no_image_is_refused_in_one_line(data, message):
    with pytest.raises(ImageError) as caught:
        parse_elf(data)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([(4 * MIB - 2, b"code", 4)], "is outside memory"),
        ([(2**63, b"code", 4)], "is outside memory"),
        ([(0x100000, b"code", 2**62)], "is outside memory"),
        (
            [(0x101000, b"code", 4), (0x100000, b"x", 0x1001)],
            "segment 0x100000-0x101000 overlaps segment 0x101000-0x101003",
        ),
        ([(0x8FFF, b"x", 1)], "segment 0x8fff-0x8fff overlaps 0x1000-0x8fff, which the loader"),
    ],
)
def test_a_segment_in_the_wrong_place_is_refused(memory, segments, message):
    image = parse_elf(forge_elf(segments=segments), "guest.elf")
    with pytest.raises(ImageError) as caught:
        image.place(memory, [ENTRY_AREA])
    assert message in str(caught.value)
    assert str(caught.value).startswith("guest.elf: ")


def test_touching_segments_are_fine(memory):
    image = parse_elf(forge_elf(segments=[(0x100000, b"a", 0x1000), (0x101000, b"b", 1)]))
    image.place(memory, [ENTRY_AREA])
    assert memory.read(0x101000, 1) == b"b"


def test_a_missing_symbol_is_named():
    with pytest.raises(ImageError, match="image: no symbol spin"):
        parse_elf(forge_elf()).symbol("spin")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ImageError, match=r"no\.elf: No such file or directory"):
        read_image(tmp_path / "no.elf")


WHOLE = {
    bits: forge_elf(
        bits,
        [(0x100000, multiboot_header() + b"code", 0x100), (0x102000, b"data", 0x2000)],
        symbols=[("a", 1), ("b", 2)],
    )
    for bits in (32, 64)
}


@pytest.mark.parametrize("bits", [32, 64])
def test_an_elf_cut_off_anywhere_is_an_image_error(bits):
    whole = WHOLE[bits]
    parse_elf(whole)
    for length in range(len(whole)):
        with pytest.raises(ImageError, match=r"truncated|not an ELF file"):
            parse_elf(whole[:length])


def load(data, vm):
    """Parse and place an image; only ImageError may come out."""
    with GuestMemory(vm) as memory:
        memory.add(0, 4 * MIB)
        with contextlib.suppress(ImageError):
            parse_elf(data).place(memory, [ENTRY_AREA])


@settings(deadline=None)
@given(
    st.sampled_from([32, 64]),
    st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=8),
)
def test_corruption_never_escapes_image_error(bits, changes):
    data = bytearray(WHOLE[bits])
    for at, value in changes:
        data[at % len(data)] = value
    load(bytes(data), IgnoresSlots())


@settings(deadline=None)
@given(st.sampled_from([32, 64]), st.integers(0, 250), st.binary(max_size=120))
def test_foreign_bytes_never_escape_image_error(bits, at, junk):
    data = WHOLE[bits]
    load(data[:at] + junk + data[at + len(junk) :], IgnoresSlots())


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_random_bytes_never_escape_image_error(junk):
    load(b"\x7fELF\x02\x01" + junk, IgnoresSlots())
