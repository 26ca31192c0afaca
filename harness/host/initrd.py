"""The emulated host's initrd: Python, the modules that KVM and the channel need, and the agent.

An uncompressed cpio archive in the kernel's "newc" format
(Documentation/driver-api/early-userspace/ buffer-format.rst). Uncompressed, because unpacking under
TCG costs more than reading.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from harness.errors import HostError

#: Where Debian's Python keeps its library, in the userland tree and in the initrd.
STDLIB = "usr/lib/python3.11"

#: Parts of the standard library that nothing in a host needs; half of its size.
_UNNEEDED = {
    "__pycache__", "test", "idlelib", "lib2to3", "ensurepip", "pydoc_data", "distutils", "tkinter",
    "turtledemo", "unittest", "venv", "asyncio", "sqlite3", "dbm", "curses", "wsgiref", "xmlrpc",
    "email", "http", "html", "xml", "site-packages", "dist-packages",
}  # fmt: skip

#: Extension modules whose own shared libraries are not carried.
_UNNEEDED_EXTENSIONS = (
    "_ssl", "_hashlib", "_sqlite3", "readline", "_curses", "_dbm", "_gdbm", "_tkinter", "_bz2",
    "_lzma", "_uuid", "nis", "_crypt", "_test", "_xx", "xx", "_codecs_",
)  # fmt: skip

_INIT = """#!/usr/bin/python3.11 -ISB
import sys
sys.path.insert(0, "/nsvm")
import init
init.main()
"""


@dataclass(frozen=True)
class Entry:
    """One file, directory or link of the archive."""

    name: str
    mode: int
    data: bytes = b""


def cpio(entries: Iterable[Entry]) -> Iterator[bytes]:
    """Yield a newc archive of `entries`, parents before children, reproducible."""
    for inode, entry in enumerate([*entries, Entry("TRAILER!!!", 0)], start=1):
        name = entry.name.encode() + b"\0"
        fields = (inode, entry.mode, 0, 0, 1, 0, len(entry.data), 0, 0, 0, 0, len(name), 0)
        head = b"070701" + b"".join(b"%08x" % field for field in fields) + name
        yield head + bytes(-len(head) % 4)
        yield entry.data + bytes(-len(entry.data) % 4)


@dataclass(frozen=True)
class Module:
    """A kernel module to insert at boot, uncompressed, with its options."""

    name: str
    image: bytes
    options: str = ""


def native_python(userland: Path) -> list[str]:
    """Return the command that runs the userland's own Python on this machine.

    What it compiles is byte code for exactly the interpreter that is in the host.
    """
    libraries = [userland / "lib/x86_64-linux-gnu", userland / "usr/lib/x86_64-linux-gnu"]
    return [
        str(userland / "lib64/ld-linux-x86-64.so.2"),
        "--library-path",
        ":".join(map(str, libraries)),
        str(userland / "usr/bin/python3.11"),
    ]


def compile_tree(userland: Path, tree: Path, installed_as: str) -> None:
    """Replace every .py below `tree` by its byte code; tracebacks name `installed_as`."""
    command = [
        *native_python(userland), "-sSBm", "compileall", "-q", "-b", "-s", str(tree),
        "-p", installed_as, "--invalidation-mode", "unchecked-hash", str(tree),
    ]  # fmt: skip
    # Not -I, which ignores PYTHONHOME too: what the user has set for another Python goes this way.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment["PYTHONHOME"] = str(userland / "usr")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise HostError(
            f"compiling {installed_as} for the host: {done.stdout}{done.stderr}".strip()
        )
    for source in tree.rglob("*.py"):
        source.unlink()


def _stdlib(userland: Path) -> Iterator[Entry]:
    with tempfile.TemporaryDirectory(prefix="nsvm-stdlib-") as scratch:
        tree = Path(scratch) / "python3.11"
        shutil.copytree(
            userland / STDLIB,
            tree,
            ignore=lambda _, names: [n for n in names if n in _UNNEEDED],
        )
        for extension in (tree / "lib-dynload").glob("*.so"):
            if extension.name.startswith(_UNNEEDED_EXTENSIONS):
                extension.unlink()
        compile_tree(userland, tree, f"/{STDLIB}")
        yield from walk(tree, STDLIB)


def walk(tree: Path, name: str) -> Iterator[Entry]:
    """Yield `tree` and all below it as `name`, sorted, links kept."""
    yield Entry(name, stat.S_IFDIR | 0o755)
    for path in sorted(tree.iterdir()):
        inner = f"{name}/{path.name}"
        if path.is_symlink():
            yield Entry(inner, stat.S_IFLNK | 0o777, os.readlink(path).encode())
        elif path.is_dir():
            yield from walk(path, inner)
        else:
            yield Entry(inner, stat.S_IFREG | (path.stat().st_mode & 0o777), path.read_bytes())


def _runtime(userland: Path) -> Iterator[Entry]:
    """Yield the interpreter and the shared libraries it is linked with."""
    for directory in ("lib", "lib/x86_64-linux-gnu", "lib64", "usr", "usr/bin", "usr/lib",
                      "usr/lib/x86_64-linux-gnu"):  # fmt: skip
        yield Entry(directory, stat.S_IFDIR | 0o755)
    for name in ("usr/bin/python3.11", "lib64/ld-linux-x86-64.so.2"):
        yield Entry(name, stat.S_IFREG | 0o755, (userland / name).read_bytes())
    wanted = ("libc.so.6", "libm.so.6", "libz.so.1", "libexpat.so.1", "libffi.so.8",
              "libpthread.so.0", "libdl.so.2", "libutil.so.1")  # fmt: skip
    for library in wanted:
        for directory in ("lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"):
            if (path := userland / directory / library).exists():
                yield Entry(f"lib/x86_64-linux-gnu/{library}", stat.S_IFREG | 0o755,
                            path.read_bytes())  # fmt: skip
                break
        else:
            raise HostError(f"the userland in {userland} has no {library}")


def entries(userland: Path, agent: Path, modules: list[Module]) -> Iterator[Entry]:
    """Yield all of the initrd: runtime, library, `agent` (a tree of byte code), `modules`."""
    for directory in ("proc", "sys", "dev", "run", "tmp", "modules"):
        yield Entry(directory, stat.S_IFDIR | 0o755)
    yield from _runtime(userland)
    yield from _stdlib(userland)
    yield from walk(agent, "nsvm")
    for module in modules:
        yield Entry(f"modules/{module.name}.ko", stat.S_IFREG | 0o644, module.image)
    order = [{"name": m.name, "options": m.options} for m in modules]
    yield Entry("modules/order.json", stat.S_IFREG | 0o644, json.dumps(order).encode())
    yield Entry("init", stat.S_IFREG | 0o755, _INIT.encode())
