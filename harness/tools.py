"""Facts about this machine's tools: what building guests and the emulated host take.

The counterpart of `harness.facts` for the outer side. Nothing of this is carried into a host.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

import guest_images
from guest_images import ElfClass
from harness.errors import HostError
from harness.facts import Fact
from harness.host.apt_sources import DEBIAN_KEYRING
from harness.host.cache import cache_dir
from harness.host.debian_kernels import cached_kernels
from harness.host.emulated import CPU, Hardware
from harness.host.qemu import QEMU, qemu_version
from harness.setup_machine import OLDEST, install_command, is_there, package_of

#: One kernel unpacked, its ELF image, two initrds, the userland, package lists and warm states.
CACHE_MIB = 1536

#: What QEMU takes beside the emulated machine's own memory.
QEMU_OVERHEAD_MIB = 256

_TIMEOUT_S = 30
_MIB = 1 << 20


class Tools:
    """What these facts look at; tests hand them another one."""

    @property
    def python_version(self) -> tuple[int, ...]:
        """Version of the interpreter that runs this."""
        return tuple(sys.version_info[:3])

    def is_there(self, what: str) -> bool:
        """Say whether a command is in the path, or a file, if it begins with a slash, exists."""
        return is_there(what)

    def run(self, command: Sequence[str], text: str = "") -> tuple[int, str]:
        """Give a command `text` to read; return its status and the lines of stderr.

        Raises:
            HostError: it does not start, or does not end in time.
        """
        try:
            done = subprocess.run(
                command,
                input=text,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_TIMEOUT_S,
            )
        except subprocess.TimeoutExpired as e:
            raise HostError(f"{command[0]} did not end within {_TIMEOUT_S} s") from e
        except OSError as e:
            raise HostError(f"{command[0]}: {e.strerror}") from e
        return done.returncode, done.stderr

    def qemu_version(self) -> str:
        """Return QEMU's version."""
        return qemu_version()

    def build_guest(self) -> None:
        """Build one guest in both forms, and leave nothing of it behind.

        Raises:
            HostError: it cannot be built.
        """
        with tempfile.TemporaryDirectory(prefix="nsvm-doctor-") as scratch:
            for elf_class in ElfClass:
                guest_images.build("hello", elf_class, Path(scratch))

    def cached_kernels(self) -> list[str]:
        """Return the releases of the kernels in the cache."""
        return [offer.release for offer in cached_kernels()]

    def has_cached_userland(self) -> bool:
        """Say whether a userland of the emulated host is in the cache."""
        return any((cache_dir() / "userland").glob("*"))

    def cache_free_mib(self) -> tuple[Path, int]:
        """Return the cache's directory, and what is free where it lies."""
        root = cache_dir()
        if not os.access(root, os.W_OK):
            raise HostError(f"cache directory {root}: not writable (set NSVM_CACHE)")
        return root, shutil.disk_usage(root).free // _MIB

    def memory_free_mib(self) -> int:
        """Return what can be had without swapping, in MiB."""
        return psutil.virtual_memory().available // _MIB


ToolFunction = Callable[[Tools], Fact]


def python(tools: Tools) -> Fact:
    """Python is new enough."""
    holds = tools.python_version >= OLDEST
    evidence = f"{platform.python_implementation()} {'.'.join(map(str, tools.python_version))}"
    oldest = ".".join(map(str, OLDEST))
    return Fact(holds, evidence, "" if holds else f"make a new .venv with Python {oldest} or newer")


def qemu(tools: Tools) -> Fact:
    """QEMU for x86-64 is installed."""
    if not tools.is_there(QEMU):
        return Fact(False, f"{QEMU} not found", _install(QEMU))
    return Fact(True, f"{QEMU} {tools.qemu_version()}")


def qemu_svm(tools: Tools) -> Fact:
    """QEMU's TCG emulates a CPU with SVM, nested paging and virtual GIF."""
    installed = qemu(tools)
    if not installed.holds:
        return installed
    # "enforce": QEMU ends with an error instead of leaving out what TCG lacks. -S: nothing runs.
    status, errors = tools.run(
        [
            QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-S", "-m", "32",
            "-machine", "q35,smm=on", "-accel", "tcg", "-cpu", f"{CPU},enforce",
            "-monitor", "stdio",
        ],
        "quit\n",
    )  # fmt: skip
    if status == 0:
        return Fact(True, f"TCG takes -cpu {CPU}")
    why = next(iter(errors.strip().splitlines()), f"status {status}")
    return Fact(False, why.removeprefix(f"{QEMU}: "), "a QEMU of version 7.2 or newer, with TCG")


def setpriv(tools: Tools) -> Fact:
    """The command that makes QEMU end with the harness, however that ends, is there."""
    if tools.is_there("setpriv"):
        return Fact(True, "setpriv is in the path")
    return Fact(False, "setpriv not found", _install("setpriv"))


def guest_compiler(tools: Tools) -> Fact:
    """The C compiler and binutils can build guests."""
    try:
        tools.build_guest()
    except HostError as e:
        return Fact(False, str(e), _install("cc", "objcopy"))
    return Fact(True, "guest hello builds, ELF64 and ELF32")


def debian_packages(tools: Tools) -> Fact:
    """Kernels and the userland can be fetched from Debian's archive: apt, dpkg, Debian's key."""
    wanted = ("apt-get", "dpkg-deb", str(DEBIAN_KEYRING))
    missing = [what for what in wanted if not tools.is_there(what)]
    if missing:
        return Fact(False, f"not there: {', '.join(missing)}", _install(*missing))
    return Fact(True, "apt-get, dpkg-deb and the archive's keyring are there")


def kernels_cached(tools: Tools) -> Fact:
    """A kernel for the emulated host is in the cache: it starts without the network."""
    releases = tools.cached_kernels()
    if not releases:
        return Fact(False, "none", "the first run on the emulated host fetches one")
    return Fact(True, " ".join(releases))


def cache_space(tools: Tools) -> Fact:
    """The cache has room for a kernel and what is made from it."""
    root, free = tools.cache_free_mib()
    holds = free >= CACHE_MIB
    evidence = f"{free} MiB free in {root}, {CACHE_MIB} MiB wanted"
    return Fact(holds, evidence, "" if holds else "make room, or set NSVM_CACHE")


def memory_space(tools: Tools) -> Fact:
    """The machine has the memory to run the emulated host."""
    free, wanted = tools.memory_free_mib(), Hardware().memory_mib + QEMU_OVERHEAD_MIB
    holds = free >= wanted
    evidence = f"{free} MiB available, {wanted} MiB wanted"
    return Fact(holds, evidence, "" if holds else "end something else that runs here")


def _install(*wanted: str) -> str:
    return " ".join(install_command(sorted({package_of(what) for what in wanted})))
