"""What runs inside the emulated host besides the kernel: busybox and Debian's own Python 3.11."""

import hashlib
import os
from pathlib import Path

from harness.host.archive import BOOKWORM, Archive, unpack
from harness.host.cache import build_dir

PACKAGES = (
    "busybox-static",
    "python3.11-minimal",
    "libpython3.11-minimal",
    "libpython3.11-stdlib",
    "libc6",
    "libexpat1",  # python3.11 is linked with it
    "zlib1g",  # and with it
    "libffi8",  # ctypes
)
"""Bookworm's packages of the userland tree.

The libraries of _ssl, _hashlib, _bz2, _lzma, _uuid and others are left out: nothing in a host needs
them, and hashlib and shutil do without.
"""

PYTHON = "usr/bin/python3.11"
"""The interpreter's path in the tree."""

BUSYBOX = "bin/busybox"
"""The static busybox's path in the tree."""

HEADERS_SUITES = ("trixie-backports",)


def userland(archive: Archive | None = None) -> Path:
    """Return the userland tree, a root directory, unpacked once into the cache.

    Raises ArchiveError when a package cannot be had.
    """
    archive = archive or Archive()

    def build(tree: Path) -> None:
        for deb in archive.fetch_all(PACKAGES, BOOKWORM):
            unpack(deb, tree)
        make_links_relative(tree)

    # Keyed by what is in it, so that a changed list makes a new tree.
    digest = hashlib.sha256(" ".join(PACKAGES).encode()).hexdigest()[:8]
    return build_dir(archive.root / "userland" / f"bookworm-{digest}", build)


def make_links_relative(tree: Path) -> None:
    """Turn every absolute symbolic link in `tree` into one that stays inside it.

    lib64/ld-linux-x86-64.so.2 is one, and would lead to this machine's own loader.
    """
    for path in tree.rglob("*"):
        if path.is_symlink() and (target := os.readlink(path)).startswith("/"):
            inside = os.path.relpath(tree / target.lstrip("/"), path.parent)
            path.unlink()
            path.symlink_to(inside)


def headers(archive: Archive | None = None) -> tuple[Path, Path]:
    """Return the include directories of the newest kernel's userspace headers (linux-libc-dev).

    Unpacked into the cache once per version. Raises ArchiveError when they cannot be had.
    """
    archive = archive or Archive()
    deb = archive.fetch("linux-libc-dev", suites=HEADERS_SUITES)
    tree = build_dir(archive.root / "headers" / deb.stem, lambda t: unpack(deb, t))
    usr = tree / "usr"
    return usr / "include/x86_64-linux-gnu", usr / "include"
