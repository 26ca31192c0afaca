"""Linux kernel images for x86-64: the bzImage's header and payload, and the vmlinux ELF.

A bzImage is a real-mode set-up header followed by a compressed vmlinux (kernel documentation,
arch/x86/boot.rst, "The Linux/x86 Boot Protocol"). QEMU boots the uncompressed ELF directly through
its PVH entry point (XEN_ELFNOTE_PHYS32_ENTRY, xen/interface/elfnote.h), which saves the emulated
host the whole decompression.
"""

import bz2
import lzma
import mmap
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import zstandard

from harness.errors import HostError
from harness.host.lz4_legacy import decompress as lz4_decompress

ELF_MAGIC = b"\x7fELF"

# Offsets into the image, from the boot protocol's table.
_SETUP_SECTS = 0x1F1
_BOOT_FLAG = 0x1FE
_HEADER = 0x202
_VERSION = 0x206
_KERNEL_VERSION = 0x20E
_LOADFLAGS = 0x211
_PAYLOAD_OFFSET = 0x248
_HEADER_END = 0x250

_SECTOR_BYTES = 512
_PROTOCOL_WITH_PAYLOAD = 0x0208

_PT_NOTE = 4
_XEN_ELFNOTE_PHYS32_ENTRY = 18

_MAX_VMLINUX_BYTES = 1 << 30

_BANNER = re.compile(rb"Linux version (\d+\.\d+[^\s(]*) [^\n\0]*?(#\d[^\n\0]*)")


class KernelError(HostError):
    """A kernel cannot be had, or a file is no kernel that can be used; says why in one line."""


class UnknownCompression(KernelError):
    """A bzImage's payload is compressed in a way that is not known here."""


@dataclass(frozen=True)
class ImageInfo:
    """What an image says about itself."""

    release: str
    """uname -r"""
    version: str
    """uname -v"""
    is_elf: bool


def inspect(path: Path) -> ImageInfo:
    """Read a bzImage's or vmlinux's release and version. Raises KernelError for anything else."""
    with _mapped(path) as image:
        if image[:4] == ELF_MAGIC:
            return _elf_info(path, image)
        _check_bzimage(path, image)
        # The version string's place is relative to the second sector.
        start = struct.unpack_from("<H", image, _KERNEL_VERSION)[0] + _SECTOR_BYTES
        end = image.find(b"\0", start, start + 512)
        words = image[start : max(end, start)].decode("ascii", "replace")
    release, _, rest = words.partition(" ")
    if start == _SECTOR_BYTES or not re.match(r"\d+\.\d+", release):
        raise KernelError(f"{path}: the image does not say its release")
    return ImageInfo(release, rest[max(rest.find("#"), 0) :], is_elf=False)


def extract_vmlinux(path: Path) -> bytes:
    """Return the ELF image inside a bzImage, decompressed.

    Raises KernelError, also for a compression that is not known here.
    """
    with _mapped(path) as image:
        _check_bzimage(path, image)
        if struct.unpack_from("<H", image, _VERSION)[0] < _PROTOCOL_WITH_PAYLOAD:
            raise KernelError(f"{path}: boot protocol before 2.08, the payload's place is unknown")
        sectors = image[_SETUP_SECTS] or 4
        offset, length = struct.unpack_from("<II", image, _PAYLOAD_OFFSET)
        start = (sectors + 1) * _SECTOR_BYTES + offset
        payload = image[start : start + length]
    if len(payload) < length or length == 0:
        raise KernelError(f"{path}: the file ends inside the compressed kernel")
    vmlinux = _decompress(path, payload)
    if vmlinux[:4] != ELF_MAGIC:
        raise KernelError(f"{path}: the compressed kernel is not an ELF image")
    return vmlinux


def has_pvh_entry(path: Path) -> bool:
    """Whether an ELF file carries the note by which QEMU's -kernel can start it."""
    with _mapped(path) as image:
        try:
            return any(
                name == b"Xen\0" and kind == _XEN_ELFNOTE_PHYS32_ENTRY
                for name, kind in _notes(image)
            )
        except struct.error:
            return False


@contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    """Map a file's bytes: unstripped kernels take hundreds of megabytes."""
    try:
        with path.open("rb") as file:
            image = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    except ValueError as e:
        raise KernelError(f"{path}: not a kernel image, the file is empty") from e
    except OSError as e:
        raise KernelError(f"{path}: {e.strerror}") from e
    with image:
        yield image


def _check_bzimage(path: Path, image: mmap.mmap) -> None:
    flag = struct.unpack_from("<H", image, _BOOT_FLAG)[0] if len(image) >= _HEADER_END else 0
    if flag != 0xAA55 or image[_HEADER : _HEADER + 4] != b"HdrS":
        raise KernelError(f"{path}: not a kernel image, neither a bzImage nor an ELF vmlinux")
    if not image[_LOADFLAGS] & 1:
        raise KernelError(f"{path}: a zImage, which loads low; only bzImages are of use")


def _elf_info(path: Path, image: mmap.mmap) -> ImageInfo:
    # EI_CLASS 2: 64 bits, e_machine 62: x86-64.
    if len(image) < 64 or image[4] != 2 or struct.unpack_from("<H", image, 18)[0] != 62:
        raise KernelError(f"{path}: an ELF file, but not for x86-64")
    banner = _BANNER.search(image)
    if banner is None:
        raise KernelError(f"{path}: an ELF file, but not a Linux kernel (it has no version banner)")
    return ImageInfo(banner[1].decode(), banner[2].decode("ascii", "replace"), is_elf=True)


def _notes(image: mmap.mmap) -> Iterator[tuple[bytes, int]]:
    """Yield name and type of every note (Elf64_Nhdr) of an ELF file."""
    if len(image) < 64 or image[:4] != ELF_MAGIC:
        return
    phoff = struct.unpack_from("<Q", image, 32)[0]
    phentsize, phnum = struct.unpack_from("<HH", image, 54)
    for i in range(phnum):
        kind, _, at, _, _, size = struct.unpack_from("<IIQQQQ", image, phoff + i * phentsize)
        end = at + size if kind == _PT_NOTE else at
        while at + 12 <= end:
            namesz, descsz, note = struct.unpack_from("<III", image, at)
            yield image[at + 12 : at + 12 + namesz], note
            at += 12 + (namesz + 3 & ~3) + (descsz + 3 & ~3)


def _decompress(path: Path, payload: bytes) -> bytes:
    """Decompress a payload by its magic number; the build appends the size to some of them."""
    for name, magic, decompress in _FORMATS:
        if payload.startswith(magic):
            try:
                return decompress(payload)
            except _DECOMPRESSION_ERRORS as e:
                raise KernelError(f"{path}: the compressed kernel ({name}) is damaged: {e}") from e
    if payload.startswith(ELF_MAGIC):
        return payload
    raise UnknownCompression(
        f"{path}: compressed in a way not known here (starts {payload[:4].hex(' ')})"
    )


def _gunzip(data: bytes) -> bytes:
    stream = zlib.decompressobj(wbits=31)
    out = stream.decompress(data, _MAX_VMLINUX_BYTES)
    return _complete(out, stream.eof)


def _unlzma(data: bytes) -> bytes:
    stream = lzma.LZMADecompressor(lzma.FORMAT_AUTO)
    return _complete(stream.decompress(data, _MAX_VMLINUX_BYTES), stream.eof)


def _bunzip2(data: bytes) -> bytes:
    stream = bz2.BZ2Decompressor()
    return _complete(stream.decompress(data, _MAX_VMLINUX_BYTES), stream.eof)


def _unzstd(data: bytes) -> bytes:
    # The kernel is packed with --ultra, whose window is larger than the default limit.
    stream = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
    return _complete(stream.decompress(data), stream.eof)


def _complete(out: bytes, eof: bool) -> bytes:
    if not eof:
        raise EOFError("it ends too early")
    return out


_DECOMPRESSION_ERRORS = (
    EOFError,
    OSError,
    ValueError,
    zlib.error,
    lzma.LZMAError,
    zstandard.ZstdError,
)

_FORMATS = (
    ("gzip", b"\x1f\x8b", _gunzip),
    ("xz", b"\xfd7zXZ\0", _unlzma),
    ("lzma", b"\x5d\0\0", _unlzma),
    ("bzip2", b"BZh", _bunzip2),
    ("zstd", b"\x28\xb5\x2f\xfd", _unzstd),
    ("lz4", b"\x02\x21\x4c\x18", lz4_decompress),
)
"""The kernel's compressions by magic number (lib/decompress.c); LZO alone is missing."""
