"""Compiles guests with the system's C compiler; same sources, same compiler, same image."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from enum import Enum
from pathlib import Path

from guest_images.header import HEADER_NAME, generated_header, linker_symbols
from harness.errors import HostError
from harness.host.cache import cache_dir
from harness.host.compiler import Compiler, first_error

SOURCES = Path(__file__).parent

_GUESTS: dict[str, tuple[str, ...]] = {
    "hello": ("entry.S", "hello.c"),
    "proxy": ("proxy_entry.S", "proxy_smm.S", "proxy.c"),
    "loop": ("entry.S", "loop.S"),
    "pc": ("entry.S", "pc_entry.S", "pc.c"),
    "svme": ("entry.S", "svme_entry.S", "svme.c"),
}
"""The sources of each guest; one more line is one more guest."""

_LINKER_SCRIPT = "guest.ld"

_CFLAGS = (
    "-std=gnu11",
    "-O2",
    "-ffreestanding",
    "-mno-red-zone",
    "-mgeneral-regs-only",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-m64",
    "-fno-pic",
    "-fno-pie",
    "-fno-stack-protector",
    "-fno-asynchronous-unwind-tables",
    "-fcf-protection=none",
    "-fno-common",
    "-fno-strict-aliasing",
)

_LDFLAGS = (
    "-nostdlib",
    "-static",
    "-no-pie",
    "-Wl,--build-id=none",
    "-Wl,-z,noexecstack",
    "-Wl,-z,max-page-size=4096",
)

_TIMEOUT_S = 120


class ElfClass(Enum):
    """How an image is wrapped, and with it where it is entered."""

    ELF64 = "entry64"
    """Entered in 64-bit mode, with the vCPU's index in RDI."""
    ELF32 = "entry32"
    """The same program as multiboot loaders want it, entered in protected mode."""


class ImageBuildError(HostError):
    """A guest could not be built, for another reason than the compiler's; one line says why."""


def guest_names() -> list[str]:
    """Return the names that `build` knows."""
    return list(_GUESTS)


def build(name: str, elf_class: ElfClass = ElfClass.ELF64, cache: Path | None = None) -> Path:
    """Return the path of a built image, compiling it unless the cache holds it.

    Args:
        name: one of `guest_names()`.
        elf_class: 64-bit image, or the 32-bit ELF for multiboot loaders.
        cache: directory of images; by default `nsvm/images` in the user's cache.

    Raises ImageBuildError: no such guest, no objcopy, or nowhere to write.
    Raises CompilerError: no compiler, or it refused a file.

    """
    if name not in _GUESTS:
        raise ImageBuildError(f"no guest image named {name!r}; there are {', '.join(_GUESTS)}")
    compiler = Compiler()
    directory = (cache or cache_dir() / "images") / _cache_key(compiler.version)
    image = directory / f"{name}{'.elf' if elf_class is ElfClass.ELF64 else '.elf32'}"
    if not image.exists():
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=directory, prefix=".build-") as work:
                os.replace(_build_in(Path(work), compiler, name, elf_class), image)
        except OSError as e:
            raise ImageBuildError(f"guest {name}: cannot write {directory}: {e.strerror}") from e
    return image


def build_all(cache: Path | None = None) -> dict[str, Path]:
    """Build every guest in both classes and return the paths by file name."""
    paths = [build(name, kind, cache) for name in _GUESTS for kind in ElfClass]
    return {path.name: path for path in paths}


def image_hash(image: Path) -> str:
    """Return the SHA-256 of an image, as recorded with results."""
    return hashlib.sha256(image.read_bytes()).hexdigest()


def _cache_key(compiler_version: str) -> str:
    digest = hashlib.sha256()
    for part in _key_parts(compiler_version):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()[:24]


def _key_parts(compiler_version: str) -> Iterable[bytes]:
    yield compiler_version.encode()
    yield repr((_GUESTS, _CFLAGS, _LDFLAGS, linker_symbols())).encode()
    yield generated_header().encode()
    for source in sorted(SOURCES.iterdir()):
        if source.suffix in (".c", ".S", ".h", ".ld"):
            yield source.name.encode()
            yield source.read_bytes()


def _build_in(work: Path, compiler: Compiler, name: str, elf_class: ElfClass) -> Path:
    (work / HEADER_NAME).write_text(generated_header())
    # Object names end up in no image, but keep them the same in every build all the same.
    objects = [_compile(work, compiler, source) for source in _GUESTS[name]]
    linked = work / "linked"
    symbols = [f"-Wl,--defsym={k}={v:#x}" for k, v in linker_symbols().items()]
    script = ["-T", str(SOURCES / _LINKER_SCRIPT), f"-Wl,-e,{elf_class.value}"]
    compiler.run(
        [*_LDFLAGS, *symbols, *script, "-o", linked.name, *objects], work, f"linking guest {name}"
    )
    return linked if elf_class is ElfClass.ELF64 else _as_elf32(work, linked)


def _compile(work: Path, compiler: Compiler, source: str) -> str:
    target = f"{source}.o"
    # Run next to the sources with a relative name: paths then leave no trace in the object.
    arguments = [*_CFLAGS, "-I", str(work), "-c", source, "-o", str(work / target)]
    compiler.run(arguments, SOURCES, source)
    return target


def _as_elf32(work: Path, linked: Path) -> Path:
    """Rewrap as ELF32: multiboot loaders (QEMU's too) refuse 64-bit files."""
    objcopy = shutil.which("objcopy")
    if objcopy is None:
        raise ImageBuildError("no objcopy found (binutils), multiboot images need it")
    target = work / "linked32"
    command = [objcopy, "-I", "elf64-x86-64", "-O", "elf32-i386", str(linked), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
    if done.returncode:
        raise ImageBuildError(f"objcopy: {first_error(done.stderr)}")
    return target
