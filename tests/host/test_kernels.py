import gzip
import logging
import os
from types import SimpleNamespace

import forging
import pytest
from forging import RELEASE, UNAME_V, bzimage, module, modules_tree, vmlinux

from harness.host import kernels
from harness.host.archive import Archive
from harness.host.kernels import KernelError, module_closure, resolve

BZIMAGE = bzimage(gzip.compress(vmlinux()))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NSVM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "bzImage"
    path.write_bytes(BZIMAGE)
    return path


@pytest.fixture
def tree(tmp_path):
    return modules_tree(tmp_path / "mods", {"kvm": [], "kvm-amd": ["kvm"]}, ["virtio"])


def test_a_bzimage_with_its_modules(image, tree):
    kernel = resolve(str(image), tree)
    assert (kernel.release, kernel.version) == (RELEASE, UNAME_V)
    assert kernel.bzimage == image
    assert kernel.vmlinux is not None
    assert kernel.vmlinux.read_bytes() == vmlinux()
    assert kernel.modules_dir == tree
    assert kernel.builtin == {"virtio"}
    assert [p.name for p in module_closure(kernel, ["kvm_amd"])] == ["kvm.ko", "kvm-amd.ko"]


def test_a_vmlinux_is_booted_as_it_is(tmp_path, tree):
    path = tmp_path / "vmlinux"
    path.write_bytes(vmlinux())
    kernel = resolve(str(path), tree)
    assert (kernel.release, kernel.bzimage, kernel.vmlinux) == (RELEASE, None, path)


def test_a_vmlinux_that_qemu_cannot_start_is_refused(tmp_path):
    path = tmp_path / "vmlinux"
    path.write_bytes(vmlinux(pvh=False))
    with pytest.raises(KernelError, match="without PVH entry point"):
        resolve(str(path))


def test_a_bzimage_without_pvh_is_booted_as_bzimage(tmp_path):
    path = tmp_path / "bzImage"
    path.write_bytes(bzimage(gzip.compress(vmlinux(pvh=False))))
    kernel = resolve(str(path))
    assert (kernel.bzimage, kernel.vmlinux) == (path, None)


def test_an_unknown_compression_is_a_warning_and_the_bzimage_boots(tmp_path, caplog):
    path = tmp_path / "bzImage"
    path.write_bytes(bzimage(b"\x89LZO" + bytes(64)))
    with caplog.at_level(logging.WARNING):
        assert resolve(str(path)).vmlinux is None
    assert "compressed in a way not known here" in caplog.text


def test_a_damaged_payload_is_an_error(tmp_path):
    path = tmp_path / "bzImage"
    path.write_bytes(bzimage(gzip.compress(vmlinux())[:-20]))
    with pytest.raises(KernelError, match="damaged"):
        resolve(str(path))


def test_without_modules_everything_counts_as_built_in(image):
    kernel = resolve(str(image))
    assert kernel.modules_dir is None
    assert module_closure(kernel, ["kvm_amd"]) == []


@pytest.mark.parametrize("prefix", ["lib/modules", "usr/lib/modules"])
def test_modules_may_be_given_as_an_installation(image, tmp_path, prefix):
    root = tmp_path / "root"
    for release in ("6.0.0-other", RELEASE):
        modules_tree(root / prefix / release, {"kvm": []}, release=release)
    assert resolve(str(image), root).modules_dir == root / prefix / RELEASE


def test_modules_of_another_release_are_refused(image, tmp_path):
    tree = modules_tree(tmp_path / "other", {"kvm": []}, release="6.9.9")
    with pytest.raises(KernelError, match=rf"built for 6\.9\.9, the kernel is {RELEASE}"):
        resolve(str(image), tree)


def test_an_installation_without_the_release_names_what_it_has(image, tmp_path):
    modules_tree(tmp_path / "root/lib/modules/6.9.9", {"kvm": []}, release="6.9.9")
    with pytest.raises(KernelError, match=rf"has modules for 6\.9\.9, the kernel is {RELEASE}"):
        resolve(str(image), tmp_path / "root")


def test_a_modules_directory_without_modules_is_refused(image, tmp_path):
    with pytest.raises(KernelError, match="no kernel modules in there"):
        resolve(str(image), tmp_path)


def test_a_modules_directory_that_is_not_there_is_refused(image, tmp_path):
    with pytest.raises(KernelError, match="no such directory"):
        resolve(str(image), tmp_path / "nothing")


@pytest.mark.parametrize("spec", ["/nonexistent/bzImage", "latest", ""])
def test_a_spec_that_is_nothing_is_one_line(spec):
    with pytest.raises(KernelError) as error:
        resolve(spec)
    assert "neither a version (such as 6.1) nor 'running' nor an existing file" in str(error.value)


@pytest.mark.parametrize("spec", ["6.1", "running"])
def test_modules_go_with_a_path_only(spec, tree):
    with pytest.raises(KernelError, match="with the path of a kernel image only"):
        resolve(spec, tree)


def test_the_key_follows_the_image_and_the_modules(image, tree):
    keys = [resolve(str(image), tree).key, resolve(str(image), tree).key]
    (tree / "updates").mkdir()
    (tree / "updates/kvm.ko").write_bytes(module("kvm"))
    keys.append(resolve(str(image), tree).key)
    image.write_bytes(bzimage(gzip.compress(vmlinux() + b"rebuilt")))
    keys.append(resolve(str(image), tree).key)
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3


def test_a_rebuilt_image_is_not_taken_from_the_cache(image):
    resolve(str(image))
    image.write_bytes(bzimage(gzip.compress(vmlinux() + b"rebuilt")))
    rebuilt = resolve(str(image)).vmlinux
    assert rebuilt is not None
    assert rebuilt.read_bytes().endswith(b"rebuilt")


def running(monkeypatch, release):
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(release=release))


def test_a_running_kernel_whose_image_is_absent_is_one_line(monkeypatch):
    running(monkeypatch, "0.0-none")
    with pytest.raises(KernelError) as error:
        resolve("running")
    assert str(error.value) == (
        "the running kernel's image cannot be used: /boot/vmlinuz-0.0-none: "
        "No such file or directory"
    )


@pytest.mark.skipif(forging.needs_apt, reason="apt-get or dpkg-deb is not installed")
def test_a_kernel_of_the_archive_resolves_whole(tmp_path, monkeypatch):
    (tmp_path / "archive").mkdir()
    forged = forging.ForgedArchive(tmp_path / "archive")
    forged.add_kernel("bookworm-security", RELEASE, "6.1.9-1", ["kvm", "ccp"])
    forged.add("bookworm", "unrelated")
    archive = Archive(forged.mirrors)
    fetch = kernels.fetch_kernel
    monkeypatch.setattr(kernels, "fetch_kernel", lambda s, refresh: fetch(s, archive=archive))
    kernel = resolve("6.1")
    assert kernel.release == RELEASE
    assert kernel.origin == f"Debian linux-image-{RELEASE} 6.1.9-1"
    assert kernel.vmlinux is not None
    assert kernel.vmlinux.read_bytes() == vmlinux()
    assert [p.name for p in module_closure(kernel, ["kvm", "virtio"])] == ["kvm.ko"]
