import bz2
import contextlib
import gzip
import lzma
import struct

import pytest
import zstandard
from forging import RELEASE, UNAME_V, bzimage, elf, vmlinux
from hypothesis import given
from hypothesis import strategies as st

from harness.host import lz4_legacy
from harness.host.kernel_image import (
    KernelError,
    UnknownCompression,
    extract_vmlinux,
    has_pvh_entry,
    inspect,
)


def lz4(data):
    """The legacy frame with literals only."""
    block = bytearray([0xF0])
    left = len(data) - 15
    while left >= 255:
        block.append(255)
        left -= 255
    block += bytes([left]) + data
    return lz4_legacy.MAGIC + struct.pack("<I", len(block)) + bytes(block)


def size_appended(packed):
    """As the kernel's build does for all but gzip, which has the size in its trailer."""
    return packed + struct.pack("<I", len(vmlinux()))


COMPRESSIONS = {
    "gzip": gzip.compress(vmlinux()),
    "xz": size_appended(lzma.compress(vmlinux(), check=lzma.CHECK_CRC32)),
    "lzma": size_appended(lzma.compress(vmlinux(), format=lzma.FORMAT_ALONE)),
    "bzip2": size_appended(bz2.compress(vmlinux())),
    "zstd": size_appended(zstandard.ZstdCompressor(22).compress(vmlinux())),
    "zstd-stream": size_appended(
        zstandard.ZstdCompressor(write_content_size=False, write_checksum=True).compress(vmlinux())
    ),
    "lz4": size_appended(lz4(vmlinux())),
    "none": vmlinux(),
}


@pytest.fixture
def image(tmp_path):
    """Write bytes to a file and return its path."""

    def write(data):
        path = tmp_path / "image"
        path.write_bytes(data)
        return path

    return write


@pytest.mark.parametrize("packed", COMPRESSIONS.values(), ids=COMPRESSIONS)
def test_the_payload_is_decompressed(image, packed):
    assert extract_vmlinux(image(bzimage(packed))) == vmlinux()


@pytest.mark.parametrize("setup_sects", [4, 27, 39])
def test_the_payloads_place_follows_the_setup_code(image, setup_sects):
    data = bzimage(COMPRESSIONS["xz"], setup_sects=setup_sects)
    assert extract_vmlinux(image(data)) == vmlinux()


@pytest.mark.parametrize("name", [n for n in COMPRESSIONS if n != "none"])
def test_a_payload_cut_short_is_damaged(image, name):
    packed = COMPRESSIONS[name]
    with pytest.raises(KernelError, match=r"the compressed kernel \(\w+\) is damaged"):
        extract_vmlinux(image(bzimage(packed[: len(packed) * 2 // 3])))


@pytest.mark.parametrize("name", ["gzip", "xz", "bzip2", "zstd-stream"])
def test_a_payload_with_a_flipped_bit_is_damaged(image, name):
    packed = bytearray(COMPRESSIONS[name])
    packed[len(packed) // 2] ^= 0x10
    with pytest.raises(KernelError, match="damaged"):
        extract_vmlinux(image(bzimage(bytes(packed))))


def test_a_file_cut_short_is_told_from_a_damaged_payload(image):
    whole = bzimage(COMPRESSIONS["xz"])
    with pytest.raises(KernelError, match="the file ends inside the compressed kernel"):
        extract_vmlinux(image(whole[:-60]))


def test_an_unknown_compression_has_its_own_error(image):
    with pytest.raises(UnknownCompression, match=r"starts 89 4c 5a 4f"):  # LZO
        extract_vmlinux(image(bzimage(b"\x89LZO" + bytes(64))))


def test_a_payload_that_holds_no_elf_is_refused(image):
    with pytest.raises(KernelError, match="not an ELF image"):
        extract_vmlinux(image(bzimage(gzip.compress(b"something else" * 9))))


def test_an_old_boot_protocol_is_refused(image):
    with pytest.raises(KernelError, match=r"boot protocol before 2\.08"):
        extract_vmlinux(image(bzimage(COMPRESSIONS["gzip"], protocol=0x0207)))


def test_a_bzimage_says_its_release(image):
    info = inspect(image(bzimage(COMPRESSIONS["gzip"])))
    assert (info.release, info.version, info.is_elf) == (RELEASE, UNAME_V, False)


def test_an_elf_says_its_release(image):
    info = inspect(image(vmlinux()))
    assert (info.release, info.version, info.is_elf) == (RELEASE, UNAME_V, True)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "the file is empty"),
        (b"#!/bin/sh\n", "neither a bzImage nor an ELF"),
        (bytes(4096), "neither a bzImage nor an ELF"),
        (bzimage(b"x")[:0x210], "neither a bzImage nor an ELF"),
        (bzimage(b"x", loadflags=0), "zImage"),
        (bzimage(b"x", release=""), "does not say its release"),
        (b"\x7fELF", "not for x86-64"),
        (elf(machine=183), "not for x86-64"),
        (elf(), "no version banner"),
    ],
)
def test_a_file_that_is_no_kernel_is_one_clear_line(image, data, words):
    path = image(data)
    with pytest.raises(KernelError, match=words) as error:
        inspect(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_a_missing_file_is_one_clear_line(tmp_path):
    with pytest.raises(KernelError, match="No such file or directory"):
        inspect(tmp_path / "nothing")


def test_a_directory_is_one_clear_line(tmp_path):
    with pytest.raises(KernelError, match="Is a directory"):
        inspect(tmp_path)


def test_the_pvh_entry_is_found_among_other_notes(image):
    assert has_pvh_entry(image(vmlinux(pvh=True)))


@pytest.mark.parametrize("data", [vmlinux(pvh=False), b"\x7fELF", bzimage(b"x"), vmlinux()[:140]])
def test_no_pvh_entry(image, data):
    assert not has_pvh_entry(image(data))


@given(data=st.binary(min_size=1, max_size=300), where=st.integers(0x1F1, 0x24F))
def test_any_header_is_read_or_refused_and_nothing_else(tmp_path_factory, data, where):
    whole = bytearray(bzimage(COMPRESSIONS["gzip"]))
    whole[where : where + len(data)] = data
    path = tmp_path_factory.getbasetemp() / "any-header"
    path.write_bytes(bytes(whole))
    for read in (inspect, extract_vmlinux):
        # Whatever else may be raised is what this test is about.
        with contextlib.suppress(KernelError):
            read(path)


# LZ4: sequences of literals and a match (offset back, length), as an encoder would choose them.
sequences = st.lists(
    st.tuples(st.binary(min_size=1, max_size=40), st.integers(1, 300), st.integers(4, 600)),
    max_size=12,
)


def encode(items, last):
    packed, plain = bytearray(), bytearray()
    for literals, offset, length in items:
        plain += literals
        offset = min(offset, len(plain))
        packed += sequence(literals, length - 4) + struct.pack("<H", offset)
        packed += extension(length - 4)
        for _ in range(length):
            plain.append(plain[-offset])
    packed += sequence(last, 0) + b""
    plain += last
    return bytes(packed), bytes(plain)


def sequence(literals, match):
    token = min(len(literals), 15) << 4 | min(match, 15)
    return bytes([token]) + extension(len(literals)) + literals


def extension(value):
    if value < 15:
        return b""
    return b"\xff" * ((value - 15) // 255) + bytes([(value - 15) % 255])


@given(items=sequences, last=st.binary(min_size=1, max_size=40))
def test_lz4_blocks_decompress(items, last):
    packed, plain = encode(items, last)
    frame = lz4_legacy.MAGIC + struct.pack("<I", len(packed)) + packed
    assert lz4_legacy.decompress(frame) == plain
    assert lz4_legacy.decompress(frame + struct.pack("<I", len(plain))) == plain


@given(items=sequences, last=st.binary(min_size=1, max_size=40), cut=st.integers(1, 30))
def test_lz4_cut_short_is_an_error(items, last, cut):
    packed, _ = encode(items, last)
    frame = lz4_legacy.MAGIC + struct.pack("<I", len(packed)) + packed
    with pytest.raises(EOFError):
        lz4_legacy.decompress(frame[: -min(cut, len(packed))])


def test_lz4_match_before_the_block_is_an_error():
    packed = b"\x10a" + struct.pack("<H", 2) + b"\x10b"
    with pytest.raises(ValueError, match="before the block"):
        lz4_legacy.decompress(lz4_legacy.MAGIC + struct.pack("<I", len(packed)) + packed)


def test_lz4_goes_on_after_a_full_block():
    full, rest = bytes(8 << 20), b"the rest"
    # One literal byte, then a match over itself that fills the block; literals end it.
    match = len(full) - 1 - 5
    packed = b"\x1f\0\x01\0" + extension(match - 4) + b"\x50" + bytes(5)
    second = b"\x80" + rest
    frame = lz4_legacy.MAGIC
    for block in (packed, second):
        frame += struct.pack("<I", len(block)) + block
    assert lz4_legacy.decompress(frame + struct.pack("<I", len(full + rest))) == full + rest
