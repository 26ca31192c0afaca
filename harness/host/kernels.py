"""The kernels that an emulated host can boot: from Debian's archive, this machine's, or a path.

resolve("6.1")                                  the newest 6.1 of Debian's archive
resolve("6.12.117")                             exactly this one
resolve("running")                              what this machine runs
resolve("6.1:eager")                            the archive's 6.1 with a variant of KVM, built here
resolve("bzImage", modules=Path("mods"))        one's own, with the tree of its modules
"""

import hashlib
import logging
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from harness.host.cache import build_file, cache_dir
from harness.host.debian_kernels import (
    SPEC,
    KernelOffer,
    fetch_kernel,
    newest_per_series,
    offered_kernels,
)
from harness.host.kernel_build import build, find_variant
from harness.host.kernel_image import (
    ImageInfo,
    KernelError,
    UnknownCompression,
    extract_vmlinux,
    has_pvh_entry,
    inspect,
)
from harness.host.modules import (
    built_for,
    closure,
    find_modules,
    modinfo,
    read_builtin,
    read_module,
)

__all__ = [
    "Kernel",
    "KernelError",
    "KernelOffer",
    "list_kernels",
    "module_closure",
    "read_module",
    "resolve",
]

log = logging.getLogger(__name__)

RUNNING = "running"

_VARIANT = re.compile(rf"({SPEC.pattern}):(.+)")
"""A kernel of the archive, and the variant of KVM that is to be built for it."""


@dataclass(frozen=True)
class Kernel:
    """One kernel with its modules. At least one of `bzimage` and `vmlinux` is there."""

    release: str
    """uname -r"""
    version: str
    """uname -v"""
    origin: str
    """Where it is from, for people: packages and version, a path, or the running kernel."""
    key: str
    """Changes with the image's content and the module files: what caches are keyed by."""
    bzimage: Path | None
    """The compressed image; None when only an ELF was given."""
    vmlinux: Path | None
    """The uncompressed ELF, when QEMU's -kernel can start it (it has the PVH entry point)."""
    modules_dir: Path | None
    """Its lib/modules/RELEASE directory; None when everything is said to be built in."""

    @cached_property
    def module_files(self) -> dict[str, Path]:
        """Every module file by the module's name."""
        return find_modules(self.modules_dir) if self.modules_dir else {}

    @cached_property
    def builtin(self) -> frozenset[str] | None:
        """Names of the built-in modules, or None when the tree does not say."""
        return read_builtin(self.modules_dir) if self.modules_dir else None


def resolve(spec: str, modules: Path | None = None, *, refresh: bool = False) -> Kernel:
    """Return the kernel that `spec` names, ready to boot.

    `spec` is the beginning of a version in Debian's archive, alone or with a variant of KVM
    (`kernel_build`: built unless it is in the cache), `running`, or the path of a bzImage or
    vmlinux; with a path, `modules` is a tree that holds kernel/ or lib/modules/RELEASE.
    `refresh` asks the archive again for a version resolved before.

    Raises KernelError (no such kernel, no kernel, foreign modules) or ArchiveError (not to be had).
    """
    variant = _VARIANT.fullmatch(spec)
    if spec == RUNNING or SPEC.fullmatch(spec) or variant:
        if modules is not None:
            raise KernelError(f"kernel {spec}: --modules goes with the path of a kernel image only")
        if variant:
            return _with_variant(fetch_kernel(variant[1], refresh=refresh), variant[2])
        return _running() if spec == RUNNING else _from_archive(fetch_kernel(spec, refresh=refresh))
    if not spec or not Path(spec).exists():
        raise KernelError(
            f"kernel {spec}: neither a version (such as 6.1) nor {RUNNING!r} nor an existing file"
        )
    return _from_path(Path(spec).resolve(), modules)


def list_kernels(*, all_versions: bool = False) -> list[KernelOffer]:
    """Return what the archive offers and what is cached, oldest first.

    Of each series (6.1, 6.12, ...) the newest and the cached ones, unless `all_versions`. An
    archive that cannot be reached is a logged warning, and what is cached remains.
    """
    offers = offered_kernels()
    return offers if all_versions else newest_per_series(offers)


def module_closure(
    kernel: Kernel, names: Iterable[str], optional: Iterable[str] = ()
) -> list[Path]:
    """Return the files of `names` and of all they depend on, in the order of insertion.

    Names may be written with - or _. What is built in needs no file; `optional` modules that the
    kernel does not have are left out. Raises KernelError for a missing or foreign module.
    """
    if kernel.modules_dir is None:
        return []
    return closure(kernel.release, kernel.module_files, kernel.builtin, names, optional)


def _from_archive(offer: KernelOffer) -> Kernel:
    image = _image_of(offer)
    tree = _first_existing(offer.tree, (f"lib/modules/{offer.release}",
                                        f"usr/lib/modules/{offer.release}"))  # fmt: skip
    if image is None or tree is None:
        raise KernelError(f"{offer.origin}: no image or no modules in the packages")
    return _bzimage_kernel(image, inspect(image), tree, offer.origin)


def _with_variant(offer: KernelOffer, name: str) -> Kernel:
    image, variant = _image_of(offer), find_variant(offer.series, name)
    if image is None:
        raise KernelError(f"{offer.origin}: no image in the packages")
    origin = f"{offer.origin}, KVM built with {variant.name}"
    return _bzimage_kernel(image, inspect(image), build(offer, variant), origin)


def _image_of(offer: KernelOffer) -> Path | None:
    places = (f"boot/vmlinuz-{offer.release}", f"usr/lib/modules/{offer.release}/vmlinuz")
    return _first_existing(offer.tree, places)


def _running() -> Kernel:
    release = os.uname().release
    image, tree = Path(f"/boot/vmlinuz-{release}"), Path(f"/lib/modules/{release}")
    try:
        info = inspect(image)
    except KernelError as e:
        raise KernelError(f"the running kernel's image cannot be used: {e}") from e
    if not tree.is_dir():
        raise KernelError(f"the running kernel's modules are missing: {tree}")
    return _bzimage_kernel(image, info, tree, f"running kernel of this machine, {image}")


def _from_path(image: Path, modules: Path | None) -> Kernel:
    info = inspect(image)
    tree = _modules_tree(modules, info.release) if modules else None
    origin = f"{image}, modules {tree}" if tree else str(image)
    if not info.is_elf:
        return _bzimage_kernel(image, info, tree, origin)
    if not has_pvh_entry(image):
        raise KernelError(
            f"{image}: an ELF kernel without PVH entry point (CONFIG_PVH); give its bzImage instead"
        )
    return Kernel(info.release, info.version, origin, _key(image, tree), None, image, tree)


def _bzimage_kernel(bzimage: Path, info: ImageInfo, tree: Path | None, origin: str) -> Kernel:
    key = _key(bzimage, tree)
    vmlinux = _extracted(bzimage, info.release)
    return Kernel(info.release, info.version, origin, key, bzimage, vmlinux, tree)


def _extracted(bzimage: Path, release: str) -> Path | None:
    """The ELF inside a bzImage, kept in the cache; None when QEMU would not start it."""
    digest = _file_digest(bzimage)[:16]

    def write(path: Path) -> None:
        path.write_bytes(extract_vmlinux(bzimage))

    try:
        vmlinux = build_file(cache_dir() / "vmlinux" / f"{release}-{digest}", write)
    except UnknownCompression as e:
        log.warning("%s; the bzImage itself will be booted, which takes longer", e)
        return None
    return vmlinux if has_pvh_entry(vmlinux) else None


def _modules_tree(given: Path, release: str) -> Path:
    """The directory that is lib/modules/RELEASE, from what --modules names."""
    if not given.is_dir():
        raise KernelError(f"--modules {given}: no such directory")
    inner = [p for sub in ("lib/modules", "usr/lib/modules") for p in (given / sub).glob("*")]
    trees = [p for p in inner if p.is_dir()]
    if not trees:
        tree = given.resolve()
        _check_modules_release(tree, release)
        return tree
    for tree in trees:
        if tree.name == release:
            return tree.resolve()
    has = ", ".join(sorted(p.name for p in trees))
    raise KernelError(f"--modules {given}: has modules for {has}, the kernel is {release}")


def _check_modules_release(tree: Path, release: str) -> None:
    files = find_modules(tree)
    if not files:
        raise KernelError(f"--modules {tree}: no kernel modules in there")
    first = next(iter(files.values()))
    found = built_for(modinfo(first))
    if found != release:
        raise KernelError(f"--modules {tree}: built for {found}, the kernel is {release}")


def _first_existing(tree: Path, places: Iterable[str]) -> Path | None:
    return next((tree / place for place in places if (tree / place).exists()), None)


def _key(image: Path, tree: Path | None) -> str:
    digest = hashlib.sha256(_file_digest(image).encode())
    for name, path in sorted(find_modules(tree).items()) if tree else ():
        stat = path.stat()
        digest.update(f"\n{name} {stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def _file_digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as e:
        raise KernelError(f"{path}: {e.strerror}") from e
