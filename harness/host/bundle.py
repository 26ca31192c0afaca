"""The tree's own code as one archive that a host's Python imports.

The emulated host may have been saved weeks ago; what it runs is always this tree. The archive holds
byte code for exactly the host's interpreter, and the guest images, built from source.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import guest_images
from harness.errors import HarnessError
from harness.host.cache import build_file, cache_dir
from harness.host.initrd import compile_tree

#: What runs inside a host: standard library only. A test imports all of it without site-packages.
CARRIED = (
    "kvm_ioctl",
    "harness/__init__.py",
    "harness/errors.py",
    "harness/facts.py",
    "harness/svm",
    "harness/machine",
    "harness/proxy",
    "harness/migrate",
    "harness/storm",
    "harness/race",
    "harness/model",
    "harness/fields",
    "harness/tamper",
    "harness/identify",
    "harness/host/__init__.py",
    "harness/host/session.py",
    "harness/host/monitor.py",
    "harness/qemu_vmm",
    "harness/nest",
    "harness/probe",
    "harness/crosscheck",
    "harness/repro/__init__.py",
    "harness/repro/inside.py",
    "harness/scenarios",
    "harness/shell",
    "harness/inside.py",
    "harness/bench/__init__.py",
    "harness/bench/crosscheck_loops.py",
    "harness/bench/designs.py",
    "harness/bench/inside.py",
    "harness/bench/loops.py",
    "harness/bench/proxy_loops.py",
    "harness/bench/migrate_load.py",
    "harness/bench/migrate_links.py",
    "harness/bench/migrate_destination.py",
    "harness/bench/migrate_loops.py",
    "harness/bench/migrate_points.py",
)

#: What the agent imports before it forks, so that no call pays for it again.
PRELOAD = (
    "harness.inside",
    "harness.shell.console",
    "harness.scenarios.twins",
    "harness.storm.calls",
    "harness.crosscheck.calls",
    "harness.identify.calls",
    "harness.tamper.calls",
)


@dataclass(frozen=True)
class Bundle:
    """The archive, and a name that changes with its content."""

    name: str
    path: Path


def tree_root() -> Path:
    """Return the directory that holds the packages `kvm_ioctl` and `harness`."""
    spec = find_spec("kvm_ioctl")
    if spec is None or not spec.origin:
        raise HarnessError("the package kvm_ioctl is not importable")
    return Path(spec.origin).parent.parent


def carried_sources(root: Path) -> list[Path]:
    """Return every file of `CARRIED` below `root`, relative and sorted."""
    found: set[Path] = set()
    for name in CARRIED:
        path = root / name
        files = [path] if path.is_file() else [*path.rglob("*.py"), *path.rglob("*.json")]
        found.update(file.relative_to(root) for file in files)
    return sorted(found)


def content_name(seed: str, sources: Iterable[Path], images: Mapping[str, Path]) -> str:
    """Return a name that changes with `seed`, and with these sources and guest images."""
    root = tree_root()
    digest = hashlib.sha256(seed.encode())
    for source in sources:
        digest.update(str(source).encode() + b"\0" + (root / source).read_bytes())
    for name, image in sorted(images.items()):
        digest.update(name.encode() + b"\0" + image.read_bytes())
    return digest.hexdigest()[:16]


def build_images() -> Path:
    """Return the directory that holds all guest images, built if need be."""
    return next(iter(guest_images.build_all().values())).parent


def build_bundle(userland: Path) -> Bundle:
    """Return the archive for this tree, built if there is none for its content yet."""
    root = tree_root()
    sources = carried_sources(root)
    images = guest_images.build_all()
    name = content_name(str(userland), sources, images)

    def write(archive: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="nsvm-bundle-") as scratch:
            tree = Path(scratch)
            for source in sources:
                (tree / source).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(root / source, tree / source)
            compile_tree(userland, tree, "/tree")
            for image_name, image in images.items():
                target = tree / "guest_images" / image_name
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(image, target)
            with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as out:
                for path in sorted(p for p in tree.rglob("*") if p.is_file()):
                    out.writestr(zipfile.ZipInfo(str(path.relative_to(tree))), path.read_bytes())

    return Bundle(name, build_file(cache_dir() / "bundles" / f"{name}.zip", write))
