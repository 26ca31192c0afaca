"""Kernels of the archive with another KVM: `kvm` and `kvm-amd` built from its source and a patch.

`6.1:NAME` is the archive's 6.1 with the variant NAME, a patch in `variants/6.1/NAME.patch`;
`6.1:FILE.patch` with a patch of one's own. The source comes from linux-source-*, everything else
that a build needs (configuration, Module.symvers, prepared headers, kbuild's tools) from
linux-headers-* and what that depends on: no configuring, and no tools but make, patch and gcc.
What was built is a tree of modules like the archive's, with the new ones in updates/.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.host.apt import run
from harness.host.archive import Archive, unpack
from harness.host.cache import build_dir, cache_dir
from harness.host.compiler import Compiler, CompilerError, first_error
from harness.host.debian_kernels import KernelOffer
from harness.host.kbuild_tools import make_tools_run
from harness.host.kernel_image import KernelError

log = logging.getLogger(__name__)

VARIANTS = Path(__file__).with_name("variants")
"""Our patches: by the series of kernels that they were made for, then by name."""

_KVM = "arch/x86/kvm"
_AMD = f"{_KVM}/svm/"
_SOURCES = (_KVM, "virt/kvm")
"""What is taken of a kernel's source, and what a patch may touch."""

#: Flags that a configuration asks for, by the symbol that says that the compiler knows them.
_FLAGS = {"-fmin-function-alignment=16": "CONFIG_CC_HAS_MIN_FUNCTION_ALIGNMENT"}

_TOOLS = ("make", "patch", "strip", "tar", "xz")
_EXTRACT_TIMEOUT_S = 600.0
_BUILD_TIMEOUT_S = 1800.0
_PATCH_TIMEOUT_S = 60.0

#: kvm-intel is never wanted; kvm only if something beside kvm-amd's own files is patched.
_INTEL = re.compile(r"^obj-\$\(\w+\)\s*\+=\s*kvm-intel\.o.*$", re.MULTILINE)
_COMMON = re.compile(r"^obj-\$\(\w+\)\s*\+=\s*kvm\.o.*$", re.MULTILINE)


@dataclass(frozen=True)
class Variant:
    """A patch to the KVM of one series of kernels."""

    name: str
    text: str

    @property
    def summary(self) -> str:
        """The first line of what stands before the patch itself."""
        return self.text.partition("\n")[0]

    @property
    def area(self) -> str:
        """What the bug is about that it puts back; empty for a variant that is no bug."""
        found = re.search(r"^Area: (.+)$", self._split[0], re.MULTILINE)
        return found[1] if found else ""

    @property
    def also(self) -> tuple[str, ...]:
        """Series of kernels that it applies to as it is, beside the one that it was made for."""
        found = re.search(r"^Also: (.+)$", self._split[0], re.MULTILINE)
        return tuple(re.split(r",\s*", found[1])) if found else ()

    @property
    def patch(self) -> str:
        """The text without what stands before the patch itself."""
        return self._split[1]

    @property
    def _split(self) -> tuple[str, str]:
        before, dashes, after = self.text.partition("--- a/")
        return before, dashes + after

    @property
    def files(self) -> tuple[str, ...]:
        """The files that it changes, from the top of the kernel's source."""
        return tuple(re.findall(r"^\+\+\+ [^/\s]+/(\S+)", self.text, re.MULTILINE))

    @property
    def amd_only(self) -> bool:
        """Whether kvm-amd alone needs to be built."""
        return all(file.startswith(_AMD) for file in self.files)


def variants(series: str) -> dict[str, Variant]:
    """Return the variants that the harness has for a series, such as ``6.1``, by name.

    Those made for it, and those of other series that apply to it, too.
    """
    found = {}
    for made_for, variant in _all_variants():
        if made_for == series or (series in variant.also and variant.name not in found):
            found[variant.name] = variant
    return dict(sorted(found.items()))


def series_of(name: str) -> list[str]:
    """Return the series that a variant of this name can be built for."""
    found = {
        series
        for made_for, variant in _all_variants()
        if variant.name == name
        for series in (made_for, *variant.also)
    }
    return sorted(found, key=lambda series: [int(part) for part in series.split(".")])


def _all_variants() -> Iterator[tuple[str, Variant]]:
    for path in sorted(VARIANTS.glob("*/*.patch")):
        yield path.parent.name, Variant(path.stem, path.read_text(encoding="utf-8"))


def find_variant(series: str, name: str) -> Variant:
    """Return a variant by its name, or read one from a file ``*.patch``.

    Raises:
        KernelError: there is none, or it is no patch to KVM.
    """
    ours = variants(series)
    if name in ours:
        return ours[name]
    if not name.endswith(".patch"):
        has = ", ".join(ours) or "none"
        raise KernelError(f"no variant {name!r} for {series}; there are: {has}; or a FILE.patch")
    try:
        variant = Variant(Path(name).stem, Path(name).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as e:
        raise KernelError(f"variant {name}: {getattr(e, 'strerror', None) or e}") from e
    if not variant.files:
        raise KernelError(f"variant {name}: no file is changed in it (unified diff, paths a/, b/)")
    for file in variant.files:
        if not file.startswith(tuple(f"{part}/" for part in _SOURCES)):
            raise KernelError(
                f"variant {name}: it changes {file}; only {' and '.join(_SOURCES)} are built"
            )
    return variant


def build(offer: KernelOffer, variant: Variant, archive: Archive | None = None) -> Path:
    """Return the tree of modules (lib/modules/RELEASE) with the variant's, built if need be.

    Raises:
        KernelError: a tool is missing, a hunk does not apply, or a file does not compile.
        ArchiveError: a package is not to be had.
    """
    compiler = Compiler()
    inputs = (offer.release, offer.version, compiler.version, variant.patch)
    key = hashlib.sha256("\n".join(inputs).encode()).hexdigest()[:16]
    place = cache_dir() / "variants" / f"{offer.release}_{variant.name}_{key}"

    def fill(temporary: Path) -> None:
        _require_tools()
        packages = archive or Archive()
        source = kernel_source(packages, offer, "", _SOURCES)
        headers = _headers(packages, offer)
        log.info("building %s for %s", variant.name, offer.release)
        scratch = temporary / "build"
        tree = _lay_out(scratch, source, headers, variant)
        make_tools_run(scratch / "usr/lib", suites_of(offer)[0], packages)
        built = _compile(tree, offer, variant, compiler)
        _link_tree(_modules_of(offer), built, temporary / offer.release)
        shutil.rmtree(scratch)

    return build_dir(place, fill) / offer.release


def _require_tools() -> None:
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        raise KernelError(
            f"building a kernel's modules needs {', '.join(missing)}: not installed"
            " (Debian: make, patch, binutils, tar, xz-utils)"
        )


# What a build is made of


def kernel_source(archive: Archive, offer: KernelOffer, label: str, parts: Sequence[str]) -> Path:
    """Return a tree with some parts of the source package of the kernel's own version.

    Args:
        archive: where packages come from.
        offer: the kernel.
        label: names the tree in the cache; one label, the same parts.
        parts: directories, from the top of the source.

    Raises:
        ArchiveError: the package is not to be had.
        KernelError: it cannot be unpacked.
    """
    name = f"linux-source-{offer.series}"

    def fill(temporary: Path) -> None:
        deb = archive.fetch(name, offer.version, suites_of(offer))
        unpacked = temporary / "deb"
        unpack(deb, unpacked)
        [tarball] = (unpacked / "usr/src").glob(f"{name}.tar.*")
        members = [f"{name}/{part}" for part in parts]
        command = ["tar", "-xf", str(tarball), "-C", str(temporary), "--strip-components=1"]
        run([*command, *members], f"unpack {tarball.name}", _EXTRACT_TIMEOUT_S)
        shutil.rmtree(unpacked)
        deb.unlink()  # 140 MB, of which a few directories are kept

    return build_dir(cache_dir() / "kernel-source" / f"{name}_{offer.version}{label}", fill)


def _headers(archive: Archive, offer: KernelOffer) -> Path:
    """Return a tree with linux-headers-RELEASE and the packages that it needs, as /usr is."""

    def fill(temporary: Path) -> None:
        own = archive.fetch(f"linux-headers-{offer.release}", offer.version, suites_of(offer))
        depends = run(["dpkg-deb", "-f", str(own), "Depends"], f"read {own.name}", 60.0)
        # The compiler package that it also names only depends on a compiler.
        names = re.findall(r"linux-(?:headers|kbuild)-[\w.+~-]+", depends)
        for deb in (own, *archive.fetch_all(names, suites_of(offer))):
            unpack(deb, temporary)

    return build_dir(cache_dir() / "kernel-headers" / f"{offer.release}_{offer.version}", fill)


def suites_of(offer: KernelOffer) -> Sequence[str]:
    """Return the suites of the archive that have a kernel's packages."""
    return tuple(dict.fromkeys(package.suite for package in offer.packages))


def _modules_of(offer: KernelOffer) -> Path:
    for place in ("lib/modules", "usr/lib/modules"):
        if (tree := offer.tree / place / offer.release).is_dir():
            return tree
    raise KernelError(f"{offer.origin}: no modules in the packages")


# Building


@dataclass(frozen=True)
class _Tree:
    """A tree in which kbuild runs."""

    source: Path
    """srctree: the common headers with KVM's source laid in."""
    objects: Path
    """objtree: the configuration, generated headers and Module.symvers."""

    @property
    def kvm(self) -> Path:
        return self.source / _KVM


def _lay_out(scratch: Path, source: Path, headers: Path, variant: Variant) -> _Tree:
    """Make the tree: the packages' files as hard links, what the build may write as copies."""
    own, common = _header_trees(headers)
    # Beside each other as in /usr: the packages link to kbuild's tools by ../../lib.
    tree = _Tree(scratch / "usr/src" / common.name, scratch / "usr/src" / own.name)
    shutil.copytree(common, tree.source, symlinks=True, copy_function=os.link)
    shutil.copytree(own, tree.objects, symlinks=True)
    for kbuild in (headers / "usr/lib").glob("linux-kbuild-*"):
        place = scratch / "usr/lib" / kbuild.name
        shutil.copytree(kbuild, place, symlinks=True, copy_function=os.link)
    for part in _SOURCES:
        shutil.rmtree(tree.source / part, ignore_errors=True)
        shutil.copytree(source / part, tree.source / part, symlinks=True)
    _patch(tree.source, variant)
    makefile = tree.kvm / "Makefile"
    text = _INTEL.sub("", makefile.read_text())
    makefile.write_text(_COMMON.sub("", text) if variant.amd_only else text)
    return tree


def _header_trees(headers: Path) -> tuple[Path, Path]:
    """Return the release's own headers, and the common ones."""
    trees = sorted((headers / "usr/src").glob("linux-headers-*"))
    common = [tree for tree in trees if tree.name.endswith("-common")]
    own = [tree for tree in trees if (tree / "Module.symvers").is_file()]
    if len(common) != 1 or len(own) != 1:
        raise KernelError(f"{headers}: not the headers of one kernel: {[t.name for t in trees]}")
    return own[0], common[0]


def _patch(source: Path, variant: Variant) -> None:
    command = [
        "patch",
        "-p1",
        "--fuzz=0",
        "--forward",
        "--batch",
        "--reject-file=-",
        "-d",
        str(source),
    ]
    done = _run(command, _PATCH_TIMEOUT_S, variant.text)
    if done.returncode:
        raise KernelError(f"variant {variant.name}: {failed_hunk(done.stdout)}")


def failed_hunk(output: str) -> str:
    """Return the file and the hunk that patch(1) could not apply, from what it said."""
    file = ""
    for line in output.splitlines():
        if match := re.match(r"(?:checking|patching) file (.+)", line):
            file = match[1].strip("'")
        elif match := re.match(r"Hunk #(\d+) FAILED at (\d+)", line):
            return f"{file}: hunk {match[1]} does not apply at line {match[2]}"
        elif "can't find file to patch" in line:
            return "a file that it changes is not there"
        elif "previously applied" in line:
            return f"{file}: hunk 1 does not apply, or all of it is applied already"
    lines = [line for line in output.splitlines() if line.strip()]
    return f"{file}: {lines[-1] if lines else 'patch said nothing'}".removeprefix(": ")


def _compile(tree: _Tree, offer: KernelOffer, variant: Variant, compiler: Compiler) -> list[Path]:
    """Return the modules, stripped."""
    jobs = len(os.sched_getaffinity(0))
    command = [
        "nice", "make", "--no-print-directory", f"-j{jobs}",
        "-C", str(tree.objects), "-f", str(tree.source / "Makefile"),
        f"M={tree.kvm}", f"KBUILD_OUTPUT={tree.objects}", f"CC={compiler.path}",
        *_without_unknown_flags(compiler),
        # Modules load without BTF, and making it takes pahole.
        "CONFIG_DEBUG_INFO_BTF_MODULES=", "modules",
    ]  # fmt: skip
    done = _run(command, _BUILD_TIMEOUT_S)
    built = sorted(tree.kvm.glob("kvm*.ko"))
    wanted = {"kvm-amd.ko"} if variant.amd_only else {"kvm-amd.ko", "kvm.ko"}
    if done.returncode or not wanted <= {module.name for module in built}:
        raise KernelError(
            f"variant {variant.name} for {offer.release}: {first_error(done.stdout)}".replace(
                f"{tree.source}/", ""
            )
        )
    for module in built:
        run(["strip", "--strip-debug", str(module)], f"strip {module.name}", 60.0)
    return built


def _without_unknown_flags(compiler: Compiler) -> list[str]:
    """Return what make is told of flags that the packages' compiler had and this one lacks."""
    told = []
    for flag, symbol in _FLAGS.items():
        try:
            compiler.run([flag, "-E", "-x", "c", os.devnull], Path.cwd(), flag)
        except CompilerError:
            told.append(f"{symbol}=")
    return told


def _run(
    command: Sequence[str], timeout_s: float, text: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run a command; both streams are its output."""
    try:
        return subprocess.run(
            command, input=text, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", timeout=timeout_s, env={**os.environ, "LC_ALL": "C"},
        )  # fmt: skip
    except subprocess.TimeoutExpired as e:
        raise KernelError(f"{command[0]} took over {timeout_s:.0f} s") from e


def _link_tree(archive_tree: Path, built: Iterable[Path], tree: Path) -> None:
    """Make a tree of modules: links to the archive's, and what was built in updates/."""
    for path in archive_tree.rglob("*"):
        if path.is_file() and (".ko" in path.name or path.name.startswith("modules.")):
            link = tree / path.relative_to(archive_tree)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    (tree / "updates").mkdir()
    for module in built:
        shutil.copy2(module, tree / "updates" / module.name)
