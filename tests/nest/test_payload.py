"""The image of Linux: what the outer side packs is what a host finds."""

import tarfile
from dataclasses import replace

import pytest

from harness.errors import HostError
from harness.host import guest_payload
from harness.host.bundle import Bundle
from harness.host.kernels import Kernel, KernelError
from harness.machine.linux_pc import SHARED_GPA
from harness.nest.payload import Source, find_source, members

KERNEL = Kernel("6.1.0", "#1", "forged", "key", None, None, None)


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    monkeypatch.setenv("NSVM_CACHE", str(tmp_path / "cache"))
    initrd = tmp_path / "initrd.cpio"
    initrd.write_bytes(b"initrd" * 1000)
    code = Bundle("code", tmp_path / "code.zip")
    monkeypatch.setattr(guest_payload, "userland", lambda: tmp_path)
    monkeypatch.setattr(guest_payload.bundle, "build_bundle", lambda userland: code)
    monkeypatch.setattr(guest_payload, "build_initrd", lambda *arguments: initrd)
    image = tmp_path / "vmlinux"
    image.write_bytes(b"kernel" * 1000)
    return replace(KERNEL, vmlinux=image)


def test_what_is_packed_is_found(kernel, monkeypatch):
    monkeypatch.setenv("NSVM_PAYLOAD", str(guest_payload.build_payload(kernel)))
    source = find_source()
    assert source.size_bytes % 4096 == 0
    with source.map() as image:
        found = {name: bytes(data) for name, data in members(memoryview(bytes(image))).items()}
    assert found == {"kernel": b"kernel" * 1000, "initrd": b"initrd" * 1000}


def test_a_copy_to_be_shown_is_the_same(tmp_path):
    data = bytes(range(256)) * (3 << 12)
    (tmp_path / "image").write_bytes(data)
    with Source(tmp_path / "image", 0, len(data)).copy(SHARED_GPA) as copy:
        assert copy[:] == data


def test_it_is_built_once(kernel):
    path = guest_payload.build_payload(kernel)
    before = path.stat().st_mtime_ns
    assert guest_payload.build_payload(kernel) == path
    assert path.stat().st_mtime_ns == before


def test_an_older_one_goes_and_that_of_another_kernel_stays(kernel):
    old = guest_payload.build_payload(kernel)
    other = guest_payload.build_payload(replace(kernel, release="7.3", key="other"))
    new = guest_payload.build_payload(replace(kernel, key="changed"))
    assert sorted(old.parent.iterdir()) == sorted([new, other])


def test_a_kernel_without_an_image_is_refused():
    with pytest.raises(KernelError, match=r"kernel 6\.1\.0: no image"):
        guest_payload.build_payload(KERNEL)


def tar_of(tmp_path, **files):
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    path = tmp_path / "image.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name in files:
            tar.add(tmp_path / name, name)
    return path.read_bytes()


def test_an_image_that_lacks_something_is_named(tmp_path):
    with pytest.raises(HostError, match="no initrd in it"):
        members(memoryview(tar_of(tmp_path, kernel=b"k")))


def test_an_image_that_is_cut_off_is_named(tmp_path):
    whole = tar_of(tmp_path, kernel=b"k" * 5000, initrd=b"i")
    with pytest.raises(HostError, match="'kernel' ends behind it"):
        members(memoryview(whole[:4096]))


def test_a_host_without_an_image_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("NSVM_PAYLOAD", str(tmp_path / "none"))
    with pytest.raises(HostError, match="this host has no image of Linux"):
        find_source()
    with pytest.raises(HostError, match="none at 0x0, 4096 bytes: No such file"):
        Source(tmp_path / "none", 0, 4096).map()
