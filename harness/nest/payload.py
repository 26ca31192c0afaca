"""The kernel and initrd that a host boots its guests with, wherever it has them.

The emulated host has them as its virtio disk, a guest as memory that its own host shows to it
(`SHARED_GPA`), any other host as a file. The image is a tar archive (POSIX.1, ustar).
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from harness.errors import HostError
from harness.machine.addresses import Gpa
from harness.machine.linux_pc import SHARED_GPA
from harness.machine.memory import huge_mapping

PARAMETER: Final = "nsvm.payload"
"""On a guest's kernel command line: how many bytes there are at SHARED_GPA."""

KERNEL_MEMBER: Final = "kernel"
INITRD_MEMBER: Final = "initrd"

VARIABLE: Final = "NSVM_PAYLOAD"
"""The image as a file, where there is one."""

_DISK = Path("/dev/vda")
_MEMORY = Path("/dev/mem")
_BLOCK = 512
_COPIED_BYTES = 1 << 20
_NAME, _SIZE = slice(0, 100), slice(124, 136)


@dataclass(frozen=True)
class Source:
    """Where an image is: a file, and a part of it."""

    path: Path
    offset: int
    size_bytes: int

    def map(self) -> mmap.mmap:
        """Return the image as memory of one's own.

        Raises HostError: it cannot be mapped.
        """
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                # Private and writable: what is never written is shared, and ctypes takes it.
                return mmap.mmap(
                    fd,
                    self.size_bytes,
                    flags=mmap.MAP_PRIVATE,
                    prot=mmap.PROT_READ | mmap.PROT_WRITE,
                    offset=self.offset,
                )
            finally:
                os.close(fd)
        except (OSError, ValueError) as e:
            raise HostError(f"{self}: {getattr(e, 'strerror', None) or e}") from e

    def copy(self, gpa: Gpa) -> mmap.mmap:
        """Return a copy of the image in huge pages, to be shown to a guest at `gpa`.

        In the mapping itself every page would cost the guest a fault: of a file, or of memory that
        is mapped by /dev/mem, KVM maps single pages.

        Raises HostError: it cannot be mapped.
        """
        made = huge_mapping(gpa, self.size_bytes)
        with self.map() as image:
            for at in range(0, self.size_bytes, _COPIED_BYTES):
                made[at : at + _COPIED_BYTES] = image[at : at + _COPIED_BYTES]
        return made

    def __str__(self) -> str:
        return f"{self.path} at {self.offset:#x}, {self.size_bytes} bytes"


def find_source() -> Source:
    """Return where this host has the image: a file, else as its kernel was told, else its disk.

    Raises HostError: nowhere.
    """
    try:
        if path := os.environ.get(VARIABLE):
            return Source(Path(path), 0, Path(path).stat().st_size)
        if size := _kernel_parameter(PARAMETER):
            return Source(_MEMORY, SHARED_GPA, int(size, 0))
        fd = os.open(_DISK, os.O_RDONLY)
        try:
            return Source(_DISK, 0, os.lseek(fd, 0, os.SEEK_END))
        finally:
            os.close(fd)
    except (OSError, ValueError) as e:
        raise HostError(f"this host has no image of Linux for its guests: {e}") from e


def members(image: memoryview) -> dict[str, memoryview]:
    """Return the files in the archive.

    Raises HostError: it is damaged.
    """
    found: dict[str, memoryview] = {}
    at = 0
    while at + _BLOCK <= len(image) and image[at]:
        header = bytes(image[at : at + _BLOCK])
        name = header[_NAME].rstrip(b"\0").decode("utf-8", "replace")
        try:
            size = int(header[_SIZE].rstrip(b"\0 "), 8)
        except ValueError:
            raise HostError(f"damaged image: {name!r} has no size") from None
        start = at + _BLOCK
        if start + size > len(image):
            raise HostError(f"damaged image: {name!r} ends behind it")
        found[name] = image[start : start + size]
        at = start + (size + _BLOCK - 1) // _BLOCK * _BLOCK
    if missing := {KERNEL_MEMBER, INITRD_MEMBER} - set(found):
        raise HostError(f"damaged image: no {', '.join(sorted(missing))} in it")
    return found


def _kernel_parameter(name: str) -> str:
    for word in Path("/proc/cmdline").read_text().split():
        key, _, value = word.partition("=")
        if key == name:
            return value
    return ""
