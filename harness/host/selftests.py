"""The kernel's own selftests for KVM, built from the source package of an archive kernel.

They are programs of tools/testing/selftests/kvm, linked statically so that they need nothing of
the host that runs them. Their headers are those of linux-libc-dev of the kernel's own version.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from harness.host.archive import Archive, unpack
from harness.host.cache import build_dir, cache_dir
from harness.host.compiler import Compiler, first_error
from harness.host.debian_kernels import KernelOffer
from harness.host.kernel_build import kernel_source, suites_of
from harness.host.kernel_image import KernelError

log = logging.getLogger(__name__)

_KVM = "tools/testing/selftests/kvm"
_PARTS = (
    "scripts",
    "tools/arch",
    "tools/build",
    "tools/include",
    "tools/lib",
    "tools/scripts",
    "tools/testing/selftests",
)
_X86 = ("x86", "x86_64")
"""Where x86's own tests are; the first name since 6.14."""
_TOOLS = ("make", "strip", "tar", "xz")
_BUILD_TIMEOUT_S = 1200.0

#: Programs that need VMX, which no AMD CPU has, or that are a part of another test.
_NOT_FOR_SVM = re.compile(r"^(?:vmx_|evmcs_|hyperv_evmcs|nx_huge_pages_)")


@dataclass(frozen=True)
class Selftests:
    """What was built."""

    programs: dict[str, Path]
    """By name, such as ``smm_test``."""
    unbuilt: dict[str, str]
    """Those that the compiler refused, and why."""


def build_selftests(offer: KernelOffer, archive: Archive | None = None) -> Selftests:
    """Return x86's selftests of a kernel that an AMD CPU can run, built if need be.

    Raises:
        KernelError: a tool is missing, or nothing could be built.
        ArchiveError: a package is not to be had.
    """
    compiler = Compiler()
    key = hashlib.sha256("\n".join((offer.version, compiler.version)).encode()).hexdigest()[:16]
    place = cache_dir() / "selftests" / f"{offer.series}_{key}"

    def fill(temporary: Path) -> None:
        if missing := [tool for tool in _TOOLS if shutil.which(tool) is None]:
            raise KernelError(f"building selftests needs {', '.join(missing)}: not installed")
        packages = archive or Archive()
        source = kernel_source(packages, offer, "-selftests", _PARTS)
        _build(source, _headers(packages, offer), compiler, temporary)

    built = build_dir(place, fill)
    unbuilt = (line.split("\t", 1) for line in (built / "unbuilt").read_text().splitlines())
    programs = {path.name: path for path in sorted((built / "programs").iterdir())}
    return Selftests(programs, {name: why for name, why in unbuilt})


def _headers(archive: Archive, offer: KernelOffer) -> Path:
    deb = archive.fetch("linux-libc-dev", offer.version, suites_of(offer))
    tree = build_dir(archive.root / "headers" / deb.stem, lambda tree: unpack(deb, tree))
    return tree / "usr/include"


def _build(source: Path, headers: Path, compiler: Compiler, place: Path) -> None:
    """Build into `place`: ``programs/NAME``, and ``unbuilt``, a line for each that failed."""
    kvm, objects = source / _KVM, place / "objects"
    [x86] = [name for name in _X86 if (kvm / name).is_dir()]
    names = sorted(path.stem for path in (kvm / x86).glob("*.c"))
    names = [name for name in names if not _NOT_FOR_SVM.match(name)]
    log.info("building %d selftests", len(names))
    said = _make(kvm, objects, headers, compiler, [f"{x86}/{name}" for name in names])
    (place / "programs").mkdir()
    unbuilt = []
    for name in names:
        program = objects / x86 / name
        if program.is_file():
            shutil.move(program, place / "programs" / name)
        else:
            unbuilt.append(f"{name}\t{_why_not(said, f'{x86}/{name}')}\n")
    shutil.rmtree(objects)
    if len(unbuilt) == len(names):
        raise KernelError(f"no selftest could be built: {first_error(said)}")
    (place / "unbuilt").write_text("".join(unbuilt))


def _make(kvm: Path, objects: Path, headers: Path, compiler: Compiler, targets: list[str]) -> str:
    """Run make; return what it said, whatever it came to."""
    include = f"-isystem {headers} -isystem {headers / 'x86_64-linux-gnu'}"
    command = [
        "nice", "make", "-k", "--no-print-directory", f"-j{len(os.sched_getaffinity(0))}",
        "-C", str(kvm),
        f"OUTPUT={objects}", f"CC={compiler.path}", f"LINUX_HDR_PATH={headers}/",
        f"KHDR_INCLUDES={include}", *(f"{objects}/{target}" for target in targets),
    ]  # fmt: skip
    objects.mkdir()
    try:
        # LDFLAGS by the environment: the Makefile adds to it, which an argument would forbid.
        return subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", timeout=_BUILD_TIMEOUT_S,
            env={**os.environ, "LC_ALL": "C", "LDFLAGS": "-static -s"},
        ).stdout  # fmt: skip
    except subprocess.TimeoutExpired as e:
        raise KernelError(f"building selftests took over {_BUILD_TIMEOUT_S:.0f} s") from e


def _why_not(said: str, target: str) -> str:
    lines = [line for line in said.splitlines() if target in line and "error:" in line]
    return lines[0] if lines else "not built"
