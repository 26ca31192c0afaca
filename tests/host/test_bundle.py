"""The tree's code as one archive: what is in it, and when it is another one."""

import shutil
import sys
import zipfile
from pathlib import Path

import pytest

from harness.errors import HostError
from harness.host import bundle


@pytest.fixture
def built(tmp_path, monkeypatch):
    """Build from a copy of the tree that tests may change; the userland's Python is ours."""
    root = tmp_path / "tree"
    for source in bundle.carried_sources(bundle.tree_root()):
        (root / source).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle.tree_root() / source, root / source)
    image = tmp_path / "image"
    image.write_bytes(b"an image")
    userland = tmp_path / "userland"
    userland.mkdir()
    (userland / "usr").symlink_to(sys.base_prefix)
    python = str(Path(sys.base_prefix, "bin", f"python3.{sys.version_info.minor}"))
    monkeypatch.setenv("NSVM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(bundle, "tree_root", lambda: root)
    monkeypatch.setattr(bundle.guest_images, "build_all", lambda: {"svme.elf64": image})
    monkeypatch.setattr("harness.host.initrd.native_python", lambda userland: [python])

    def build():
        return bundle.build_bundle(userland)

    build.root, build.image = root, image
    return build


def test_the_name_changes_with_the_content_and_only_then(built):
    first = built()
    assert built() == first
    (built.root / "harness/inside.py").write_text("changed = 1\n")
    second = built()
    built.image.write_bytes(b"another image")
    third = built()
    assert len({first.name, second.name, third.name}) == 3
    assert {first.path.exists(), second.path.exists(), third.path.exists()} == {True}


def test_what_is_carried_is_compiled_and_importable(built, monkeypatch):
    (built.root / "harness/inside.py").write_text("def where():\n    return __file__\n")
    code = built()
    with zipfile.ZipFile(code.path) as archive:
        names = archive.namelist()
    assert "harness/inside.pyc" in names
    assert "guest_images/svme.elf64" in names
    assert "kvm_ioctl/abi.json" in names
    assert not [name for name in names if name.endswith(".py")]


def test_code_that_does_not_compile_is_an_error_and_leaves_nothing(built, tmp_path):
    (built.root / "harness/inside.py").write_text("def f(:\n")
    with pytest.raises(HostError, match="compiling /tree for the host"):
        built()
    assert list((tmp_path / "cache/bundles").iterdir()) == []
