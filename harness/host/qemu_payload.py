"""What the emulated host needs to run QEMU itself: this machine's own QEMU, as one read-only image.

An uncompressed tar archive, the host's second virtio disk; `harness.qemu_vmm.installation` unpacks
it there. It holds the program with its shared libraries and loader, the few ROMs that a PC without
display and network loads, and the pure Python that drives it (qemu.qmp, pexpect) as byte code.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from harness.errors import HostError
from harness.host.cache import build_file, cache_dir
from harness.host.initrd import STDLIB, compile_tree
from harness.host.qemu import QEMU, qemu_version
from harness.host.userland import userland

ROMS: Final = ("bios-256k.bin", "kvmvapic.bin", "linuxboot_dma.bin", "pvh.bin")
"""SeaBIOS, KVM's TPR patching, and what `-kernel` takes for a bzImage and for an ELF image."""

PYTHON_PACKAGES: Final = ("qemu.qmp", "pexpect", "ptyprocess")
"""Pure Python, from where this harness has them."""

_STDLIB_PACKAGES: Final = ("asyncio",)
"""Not in the host's initrd, where nothing else needs them."""

_ROM_DIRECTORIES: Final = ("/usr/share/seabios", "/usr/share/qemu", "/usr/local/share/qemu")
_PAGE = 4096


def build_qemu_payload() -> Path:
    """Return the image, built if there is none of this QEMU yet.

    Raises HostError: QEMU or a part of it is not on this machine.
    """
    program = shutil.which(QEMU)
    if program is None:
        raise HostError(f"{QEMU} not found (Debian: apt-get install qemu-system-x86)")
    files = {f"lib/{library.name}": library for library in shared_libraries(Path(program))}
    files["bin/qemu"] = Path(program)
    files.update({f"roms/{name}": _rom(name) for name in ROMS})
    digest = hashlib.sha256(f"{qemu_version()} {userland()} {__file__}".encode())
    digest.update(Path(__file__).read_bytes())
    for name, path in sorted(files.items()):
        state = path.stat()
        digest.update(f"{name} {path} {state.st_size} {state.st_mtime_ns}".encode())
    target = cache_dir() / "payload" / f"qemu-{digest.hexdigest()[:16]}.tar"

    def write(path: Path) -> None:
        for other in path.parent.glob("qemu-*.tar"):
            # Of an older QEMU, and large. Who has it open keeps it.
            other.unlink(missing_ok=True)
        with tempfile.TemporaryDirectory(prefix="nsvm-qemu-") as scratch:
            libraries = Path(scratch) / "python"
            _copy_python(libraries)
            compile_tree(userland(), libraries, "/qemu/python")
            with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
                for name, source in sorted(files.items()):
                    tar.add(source.resolve(), name)
                tar.add(libraries, "python")
        with path.open("ab") as file:
            file.write(bytes(-file.tell() % _PAGE))

    return build_file(target, write)


def shared_libraries(program: Path) -> list[Path]:
    """Return the shared libraries that `program` is linked with, its loader among them.

    Raises HostError: one is missing, or ld.so cannot tell.
    """
    done = subprocess.run(
        ["ldd", str(program)], capture_output=True, text=True, timeout=60, check=False
    )
    if done.returncode or "not found" in done.stdout:
        said = [line.strip() for line in done.stdout.splitlines() if "not found" in line]
        raise HostError(f"ldd {program}: {(said or [done.stderr.strip()])[0]}")
    words = (line.split() for line in done.stdout.splitlines())
    # "libz.so.1 => /lib/x86_64-linux-gnu/libz.so.1 (0x...)", and for the loader its path only.
    paths = [next((word for word in line if word.startswith("/")), "") for line in words]
    return [Path(path) for path in paths if path]


def _rom(name: str) -> Path:
    for directory in _ROM_DIRECTORIES:
        if (path := Path(directory) / name).exists():
            return path
    raise HostError(f"QEMU's {name} is in none of {', '.join(_ROM_DIRECTORIES)}")


def _copy_python(target: Path) -> None:
    for name in PYTHON_PACKAGES:
        _copy_package(_package_directory(name), target / name.replace(".", os.sep))
    for name in _STDLIB_PACKAGES:
        _copy_package(userland() / STDLIB / name, target / name)


def _package_directory(name: str) -> Path:
    spec = find_spec(name)
    if spec is None or not spec.origin:
        raise HostError(f"the Python package {name} is not installed")
    return Path(spec.origin).parent


def _copy_package(source: Path, target: Path) -> None:
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.sh"))
