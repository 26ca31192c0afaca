import os

import forging
import pytest

from harness.host.archive import Archive
from harness.host.userland import PACKAGES, make_links_relative, userland


def test_absolute_links_come_to_stay_inside_the_tree(tmp_path):
    (tmp_path / "lib/x86").mkdir(parents=True)
    (tmp_path / "lib/x86/ld.so").write_bytes(b"ours")
    (tmp_path / "lib64").mkdir()
    (tmp_path / "lib64/ld.so").symlink_to("/lib/x86/ld.so")
    (tmp_path / "lib64/near.so").symlink_to("ld.so")
    make_links_relative(tmp_path)
    assert os.readlink(tmp_path / "lib64/ld.so") == "../lib/x86/ld.so"
    assert os.readlink(tmp_path / "lib64/near.so") == "ld.so"
    assert (tmp_path / "lib64/near.so").read_bytes() == b"ours"


@pytest.mark.skipif(forging.needs_apt, reason="apt-get or dpkg-deb is not installed")
def test_the_tree_is_built_once_and_serves_without_apt(tmp_path, monkeypatch):
    monkeypatch.setenv("NSVM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "archive").mkdir()
    forged = forging.ForgedArchive(tmp_path / "archive")
    for name in PACKAGES:
        forged.add("bookworm", name, files=[(f"usr/share/doc/{name}/copyright", b"")])
    for suite in ("bookworm-security", "bookworm-updates"):
        forged.add(suite, "unrelated")
    tree = userland(Archive(forged.mirrors))
    assert {p.name for p in (tree / "usr/share/doc").iterdir()} == set(PACKAGES)
    monkeypatch.setenv("PATH", "/nonexistent")
    assert userland() == tree
