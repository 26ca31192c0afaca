"""Debian's kernels: which the archive has, choosing one by a version's beginning, fetching it.

Up to 6.18 a kernel is one package, linux-image-RELEASE. Since then linux-image-* only depends on
linux-binary- (the image), linux-modules- and linux-base-RELEASE. Of a version since replaced
the archive may keep one part and not the others: such a one cannot be had.
"""

import json
import logging
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from harness.host.archive import LIST_AGE_S, SUITES, Archive, ArchiveError, Package, unpack
from harness.host.cache import build_dir, cache_dir
from harness.host.debian_version import sort_key
from harness.host.kernel_image import KernelError

log = logging.getLogger(__name__)

SPEC = re.compile(r"\d+\.\d+(?:[.+~-][\w.+~-]*)?")
"""What is taken as the beginning of a kernel's version or release."""

RESOLVED_FOR_S = 7 * 24 * 3600.0
"""For so long a spec stays with the kernel that it was resolved to."""

_SERIES_SUITES = {
    "5.10": ("bullseye-security", "bullseye"),
    "6.1": ("bookworm-security", "bookworm"),
    "6.12": ("trixie-security", "trixie"),
}
"""Where a series is at home. All others come with backports."""

_NEW_SUITES = ("trixie-backports",)

_NAMES = r"linux-(?:image|binary|modules|base)-\d\S*-amd64(?:-unsigned)?"

# Three numbers, perhaps Debian's ABI name, and no flavour (cloud, rt); meta packages have two.
_RELEASE = r"\d+\.\d+\.\d+[\w.+~]*(?:-\d[\w.+~]*)?-amd64"
_IMAGE = re.compile(rf"linux-(image|binary)-({_RELEASE})(-unsigned)?")

_META_BYTES = 100_000
"""A linux-image-* smaller than this is the meta package over a split kernel."""


@dataclass(frozen=True)
class KernelOffer:
    """One kernel that the archive has whole, or that is in the cache."""

    release: str
    version: str
    packages: tuple[Package, ...]

    @property
    def series(self) -> str:
        """The first two numbers of the version: `6.12`."""
        return ".".join(re.split(r"[.~+-]", self.version)[:2])

    @property
    def size_bytes(self) -> int:
        """What there is to download."""
        return sum(p.size_bytes for p in self.packages)

    @property
    def tree(self) -> Path:
        """Where it is unpacked, or will be."""
        return cache_dir() / "kernels" / f"{self.release}_{self.version}"

    @property
    def is_cached(self) -> bool:
        """Whether it needs no download any more."""
        return self.tree.is_dir()

    @property
    def cached_bytes(self) -> int:
        """What it takes up in the cache."""
        return sum(p.lstat().st_size for p in self.tree.rglob("*"))

    @property
    def origin(self) -> str:
        """The packages that it came in, for people."""
        return f"Debian {' + '.join(p.name for p in self.packages)} {self.version}"


def complete_kernels(packages: Iterable[Package]) -> list[KernelOffer]:
    """Return the kernels whose parts are all among `packages`, oldest first."""
    newest = {p.name: p for p in sorted(packages, key=lambda p: sort_key(p.version))}
    found: dict[str, KernelOffer] = {}
    for name, image in newest.items():
        match = _IMAGE.fullmatch(name)
        if match is None or image.size_bytes < _META_BYTES:
            continue
        kind, release, unsigned = match.groups()
        parts = _split_parts(newest, release) if kind == "binary" else ()
        if parts is None or (unsigned and release in found):
            continue
        found[release] = KernelOffer(release, image.version, (image, *parts))
    return sorted(found.values(), key=lambda o: (sort_key(o.version), sort_key(o.release)))


def _split_parts(newest: dict[str, Package], release: str) -> tuple[Package, ...] | None:
    modules = newest.get(f"linux-modules-{release}")
    base = newest.get(f"linux-base-{release}")
    return (modules, base) if modules and base else None


def matching(spec: str, offers: Iterable[KernelOffer]) -> list[KernelOffer]:
    """Return those whose version or release begins with `spec`, at whole numbers."""
    # "6.1" is 6.1.192 and not 6.12.
    pattern = re.compile(re.escape(spec) + (r"(?!\d)" if spec[-1:].isdigit() else ""))
    return [o for o in offers if pattern.match(o.version) or pattern.match(o.release)]


def fetch_kernel(
    spec: str, *, refresh: bool = False, archive: Archive | None = None
) -> KernelOffer:
    """Return the newest kernel that `spec` names, unpacked in the cache.

    A spec resolved in the last week stays with its kernel, without a look at the archive, unless
    `refresh` is asked for. When the archive cannot be reached, a kernel in the cache that fits
    does, with a warning. Raises KernelError or ArchiveError.
    """
    noted = _noted(spec)
    if noted and not refresh and _note_age_s(spec) < RESOLVED_FOR_S:
        return noted
    archive = archive or Archive()
    try:
        chosen = _choose(archive, spec, 0.0 if refresh else LIST_AGE_S)
        _install(archive, chosen)
    except ArchiveError as e:
        fallback = noted or next(reversed(matching(spec, cached_kernels())), None)
        if fallback is None:
            raise ArchiveError(f"kernel {spec} is not in the cache, and {e}") from e
        log.warning("%s; using kernel %s from the cache", e, fallback.release)
        return fallback
    _write_note(spec, chosen)
    return chosen


def cached_kernels() -> list[KernelOffer]:
    """Return the kernels in the cache, oldest first."""
    trees = (cache_dir() / "kernels").glob("*/kernel.json")
    offers = (_read_record(path) for path in trees)
    return sorted((o for o in offers if o), key=lambda o: sort_key(o.version))


def newest_per_series(offers: Iterable[KernelOffer]) -> list[KernelOffer]:
    """Return the last of each series, and all that are in the cache."""
    offers = list(offers)
    newest = {offer.series: offer for offer in offers}
    return [o for o in offers if newest[o.series] == o or o.is_cached]


def offered_kernels(archive: Archive | None = None) -> list[KernelOffer]:
    """Return the kernels in the archive and in the cache, oldest first.

    An archive that cannot be reached is a warning: what is cached remains.
    """
    found = {o.tree: o for o in cached_kernels()}
    try:
        packages = (archive or Archive()).packages(_NAMES, SUITES)
    except ArchiveError as e:
        log.warning("%s", e)
        packages = []
    for offer in complete_kernels(packages):
        found.setdefault(offer.tree, offer)
    return sorted(found.values(), key=lambda o: (sort_key(o.version), sort_key(o.release)))


def _choose(archive: Archive, spec: str, max_age_s: float) -> KernelOffer:
    series = ".".join(re.split(r"[.~+-]", spec)[:2])
    home = _SERIES_SUITES.get(series, _NEW_SUITES)
    offers: list[KernelOffer] = []
    # Elsewhere only when it is not at home: fewer lists to fetch, and one answer per series.
    for suites in (home, tuple(SUITES)):
        offers = complete_kernels(archive.packages(_NAMES, suites, max_age_s))
        if found := matching(spec, offers):
            return found[-1]
    has = ", ".join(sorted({o.series for o in offers}, key=sort_key))
    raise KernelError(f"no kernel {spec} in Debian's archive; it has {has}")


def _install(archive: Archive, chosen: KernelOffer) -> None:
    def fill(tree: Path) -> None:
        for deb in archive.download(chosen.packages):
            unpack(deb, tree)
        record = {
            "release": chosen.release,
            "version": chosen.version,
            "packages": [[p.name, p.version, p.suite, p.size_bytes] for p in chosen.packages],
        }
        (tree / "kernel.json").write_text(json.dumps(record))

    build_dir(chosen.tree, fill)
    for package in chosen.packages:
        archive.drop(package)  # the tree holds all of it


def _read_record(path: Path) -> KernelOffer | None:
    try:
        record = json.loads(path.read_text())
        packages = tuple(Package(*fields) for fields in record["packages"])
        return KernelOffer(record["release"], record["version"], packages)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _note(spec: str) -> Path:
    return cache_dir() / "kernels" / "specs" / spec


def _noted(spec: str) -> KernelOffer | None:
    try:
        tree = cache_dir() / "kernels" / _note(spec).read_text()
    except OSError:
        return None
    return _read_record(tree / "kernel.json")


def _note_age_s(spec: str) -> float:
    try:
        return max(0.0, time.time() - _note(spec).stat().st_mtime)
    except OSError:
        return float("inf")


def _write_note(spec: str, chosen: KernelOffer) -> None:
    note = _note(spec)
    note.parent.mkdir(parents=True, exist_ok=True)
    scratch = note.with_name(f".{note.name}.new")
    scratch.write_text(chosen.tree.name)
    scratch.replace(note)
