"""Where a host's QEMU is: installed, or on the disk that an emulated host has for it.

The disk is a tar archive (`harness.host.qemu_payload` makes it), unpacked once per boot into
memory. The Python packages that drive QEMU come along and go onto `sys.path`.
"""

from __future__ import annotations

import os
import shutil
import sys
import tarfile
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from harness.errors import HostError

PROGRAM: Final = "qemu-system-x86_64"
_DISK: Final = Path("/dev/vdb")
_TREE: Final = Path("/run/nsvm-qemu")
_LOADER: Final = "ld-linux-x86-64.so.2"


@dataclass(frozen=True)
class Installation:
    """How QEMU is started: the words before its own options."""

    command: tuple[str, ...]


def find_installation() -> Installation:
    """Return the host's QEMU, with the packages that drive it made importable.

    Raises HostError: there is none, or what there is is damaged.
    """
    if _DISK.exists() and not shutil.which(PROGRAM):
        return _carried(_unpacked())
    if (program := shutil.which(PROGRAM)) is None:
        raise HostError(f"this host has no {PROGRAM}, and no disk with one")
    return Installation((program,))


def _unpacked() -> Path:
    """Return the disk's content as a tree."""
    if not _TREE.exists():
        temporary = _TREE.with_name(f"{_TREE.name}.{os.getpid()}")
        try:
            with tarfile.open(_DISK) as tar:
                tar.extractall(temporary)
            temporary.rename(_TREE)
        except (OSError, tarfile.TarError) as e:
            raise HostError(f"{_DISK}: cannot unpack QEMU: {e}") from e
    return _TREE


def _carried(tree: Path) -> Installation:
    libraries = str(tree / "lib")
    if (python := str(tree / "python")) not in sys.path:
        sys.path.append(python)
        _stand_in_for_ssl()
    loader = str(tree / "lib" / _LOADER)
    return Installation(
        (loader, "--library-path", libraries, str(tree / "bin/qemu"), "-L", str(tree / "roms"))
    )


def _stand_in_for_ssl() -> None:
    """Let qemu.qmp be imported where Python has no OpenSSL: it wants a name of it, for hints."""
    # First asyncio: it looks by itself whether there is any.
    import asyncio  # noqa: F401

    try:
        import ssl  # noqa: F401
    except ImportError:
        module = types.ModuleType("ssl")
        module.SSLContext = type("SSLContext", (), {})  # type: ignore[attr-defined]
        sys.modules["ssl"] = module
