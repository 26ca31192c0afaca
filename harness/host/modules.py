"""Kernel modules: finding them in a tree, what they depend on, and their decompressed images.

A kernel package carries no modules.dep, so the dependencies come from the modules themselves: the
strings of their .modinfo section (include/linux/module.h, MODULE_INFO).
"""

import gzip
import lzma
import re
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import zstandard

from harness.host.kernel_image import ELF_MAGIC, KernelError

_FILE = re.compile(r"(.+)\.ko(?:\.xz|\.zst|\.gz)?")

_PREFERRED = ("updates", "extra", "kernel")
"""A module below the first of these directories hides one of the same name below the others, so
that one's own kvm.ko can be laid beside the distribution's (as depmod.d(5) has it)."""


def normalise(name: str) -> str:
    """Return a module's name as the kernel has it: files and people also write it with dashes."""
    return name.replace("-", "_")


def find_modules(tree: Path) -> dict[str, Path]:
    """Return every module file below `tree` (a lib/modules/RELEASE directory) by its name."""
    found: dict[str, Path] = {}
    for path in sorted(tree.rglob("*.ko*"), key=lambda p: _precedence(p.relative_to(tree))):
        match = _FILE.fullmatch(path.name)
        if match:
            found.setdefault(normalise(match[1]), path)
    return found


def read_builtin(tree: Path) -> frozenset[str] | None:
    """Return the names in modules.builtin, or None when the tree has no such file."""
    try:
        lines = (tree / "modules.builtin").read_text().splitlines()
    except FileNotFoundError:
        return None
    matches = (_FILE.fullmatch(Path(line).name) for line in lines)
    return frozenset(normalise(m[1]) for m in matches if m)


def read_module(path: Path) -> bytes:
    """Return a module's ELF image, decompressed by its file name. Raises KernelError."""
    decompress = _DECOMPRESS.get(path.suffix)
    if decompress is None:
        raise KernelError(f"{path}: not a kernel module by its name")
    try:
        image = decompress(path.read_bytes())
    except (lzma.LZMAError, zlib.error, zstandard.ZstdError, EOFError, OSError) as e:
        raise KernelError(f"{path}: cannot be read: {e}") from e
    if image[:4] != ELF_MAGIC:
        raise KernelError(f"{path}: not a kernel module, no ELF image in it")
    return image


def modinfo(path: Path) -> dict[str, str]:
    """Return a module's .modinfo strings, the first of each key. Raises KernelError."""
    image = read_module(path)
    try:
        section = next((data for name, data in _sections(image) if name == b".modinfo"), b"")
    except (struct.error, ValueError) as e:
        raise KernelError(f"{path}: a damaged ELF image") from e
    info: dict[str, str] = {}
    for item in section.decode("utf-8", "replace").split("\0"):
        key, equals, value = item.partition("=")
        if equals:
            info.setdefault(key, value)
    if "vermagic" not in info:
        raise KernelError(f"{path}: not a kernel module, it names no kernel (vermagic)")
    return info


def built_for(info: dict[str, str]) -> str:
    """Return the kernel release that a module's modinfo names."""
    return info["vermagic"].split(" ", 1)[0]


def closure(
    release: str,
    files: dict[str, Path],
    builtin: frozenset[str] | None,
    names: Iterable[str],
    optional: Iterable[str] = (),
) -> list[Path]:
    """Return the files of modules and all they depend on, each after its own dependencies.

    Built-in modules need no file. An `optional` one that the kernel does not have is left out;
    soft dependencies are not followed, since insertion does not need them.

    Raises KernelError for a module that is missing, or was built for another kernel.
    """
    order: dict[str, Path] = {}
    has = {*files, *(builtin or ())}
    wanted = [normalise(n) for n in names]
    wanted += [n for n in map(normalise, optional) if n in has]
    for name in wanted:
        _insert(release, files, builtin, name, order, ())
    return list(order.values())


def _insert(
    release: str,
    files: dict[str, Path],
    builtin: frozenset[str] | None,
    name: str,
    order: dict[str, Path],
    users: tuple[str, ...],
) -> None:
    if name in order:
        return
    if name in users:
        raise KernelError(f"modules depend on each other: {' -> '.join((*users, name))}")
    path = files.get(name)
    if path is None:
        if builtin is None or name not in builtin:
            raise _missing(release, name, users, builtin)
        return
    info = modinfo(path)
    if built_for(info) != release:
        raise KernelError(f"{path}: built for kernel {built_for(info)}, not for {release}")
    for need in filter(None, info.get("depends", "").split(",")):
        _insert(release, files, builtin, normalise(need), order, (*users, name))
    order[name] = path


def _missing(
    release: str, name: str, users: tuple[str, ...], builtin: frozenset[str] | None
) -> KernelError:
    needed = f" (which {users[-1]} depends on)" if users else ""
    why = "" if builtin is not None else ", and without modules.builtin it cannot be told built in"
    return KernelError(f"kernel {release} has no module {name}{needed}{why}")


def _precedence(path: Path) -> tuple[int, str]:
    top = path.parts[0]
    return (_PREFERRED.index(top) if top in _PREFERRED else len(_PREFERRED), str(path))


def _unzstd(data: bytes) -> bytes:
    stream = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
    out = stream.decompress(data)
    if not stream.eof:
        raise EOFError("the file ends too early")
    return out


_DECOMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".ko": bytes,
    ".xz": lzma.decompress,
    ".gz": gzip.decompress,
    ".zst": _unzstd,
}


def _sections(image: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield name and content of every section of an ELF64 file (Elf64_Ehdr, Elf64_Shdr)."""
    shoff = struct.unpack_from("<Q", image, 40)[0]
    shentsize, shnum, shstrndx = struct.unpack_from("<HHH", image, 58)
    headers = [struct.unpack_from("<IIQQQQ", image, shoff + i * shentsize) for i in range(shnum)]
    if shstrndx >= len(headers):
        raise ValueError("no section names")
    names = image[headers[shstrndx][4] :]
    for name, _, _, _, offset, size in headers:
        end = names.index(b"\0", name)
        yield names[name:end], image[offset : offset + size]
