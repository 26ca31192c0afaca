"""kbuild's tools of a kernel from a newer distribution, made to run on this machine.

The packages bring `objtool` and `modpost` as programs, which need the C library of their own
distribution. Where this machine's is older, each runs with that one's loader and libraries, from
its packages; everything else stays this machine's.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from harness.host.archive import Archive, unpack
from harness.host.cache import build_dir
from harness.host.userland import make_links_relative

_LIBRARIES = ("libc6", "libelf1t64", "zlib1g", "libzstd1")
"""What the programs are linked with."""
_LIBRARY_PATH = "usr/lib/x86_64-linux-gnu"
_LOADER = f"{_LIBRARY_PATH}/ld-linux-x86-64.so.2"

_NEEDS = re.compile(rb"\0GLIBC_2\.(\d+)(?=\0)")
_ELF = b"\x7fELF"


def make_tools_run(tools: Path, suite: str, archive: Archive) -> None:
    """Replace each program below `tools` that needs a newer C library by a script that has one.

    Args:
        tools: kbuild's tree; its files may be hard links and are not written to.
        suite: of the archive that the programs come from, such as ``trixie-backports``.
        archive: where packages come from.

    Raises:
        ArchiveError: a package is not to be had.
    """
    for program in list(_too_new(tools, _own_version())):
        libraries = _libraries(suite.partition("-")[0], archive)
        moved = program.with_name(f"{program.name}.elf")
        program.rename(moved)
        loader, path = libraries / _LOADER, libraries / _LIBRARY_PATH
        command = [str(loader), "--library-path", str(path), str(moved)]
        program.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
        program.chmod(0o755)


def _libraries(distribution: str, archive: Archive) -> Path:
    def fill(temporary: Path) -> None:
        for deb in archive.fetch_all(_LIBRARIES, (distribution,)):
            unpack(deb, temporary)
        make_links_relative(temporary)

    return build_dir(archive.root / "kbuild-libraries" / distribution, fill)


def _own_version() -> int:
    """Return n of this machine's C library, 2.n; 0 if it is another one."""
    named = re.fullmatch(r"glibc 2\.(\d+).*", os.confstr("CS_GNU_LIBC_VERSION") or "")
    return int(named[1]) if named else 0


def _too_new(tools: Path, own: int) -> Iterator[Path]:
    for path in sorted(tools.rglob("*")):
        if not path.is_symlink() and path.is_file() and os.access(path, os.X_OK):
            data = path.read_bytes()
            if data.startswith(_ELF) and max(map(int, _NEEDS.findall(data)), default=0) > own:
                yield path
