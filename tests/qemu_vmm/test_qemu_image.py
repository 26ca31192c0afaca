"""QEMU as an image for hosts: what is in it, and where a host has it."""

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from harness.errors import HostError
from harness.host import qemu_payload
from harness.host.emulated import Hardware
from harness.host.initrd import native_python
from harness.host.qemu_payload import PYTHON_PACKAGES, ROMS, build_qemu_payload, shared_libraries
from harness.host.userland import userland
from harness.qemu_vmm import installation
from harness.qemu_vmm.installation import find_installation


@pytest.fixture(scope="module")
def image():
    return build_qemu_payload()


@pytest.fixture
def host(image, tmp_path, monkeypatch):
    """A host that has the image as its disk, and no QEMU of its own."""
    monkeypatch.setattr(installation, "_DISK", image)
    monkeypatch.setattr(installation, "_TREE", tmp_path / "tree")
    monkeypatch.setattr(installation.shutil, "which", lambda name: None)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path / "tree"


def test_all_that_qemu_needs_is_there(image):
    with tarfile.open(image) as tar:
        names = set(tar.getnames())
    wanted = {f"lib/{library.name}" for library in shared_libraries(Path(sys.executable))}
    assert "lib/libc.so.6" in wanted
    assert {"bin/qemu", "lib/libc.so.6", *(f"roms/{name}" for name in ROMS)} <= names
    packages = (name.replace(".", "/") for name in (*PYTHON_PACKAGES, "asyncio"))
    assert {f"python/{package}/__init__.pyc" for package in packages} <= names
    # A disk has whole sectors; mapped, whole pages.
    assert image.stat().st_size % 4096 == 0


def test_the_carried_qemu_runs_by_its_own_libraries(host):
    command = find_installation().command
    assert command[0] == str(host / "lib/ld-linux-x86-64.so.2")
    said = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60)
    assert "QEMU emulator version" in said.stdout
    # Once unpacked it stays.
    assert find_installation().command == command


def test_what_drives_qemu_is_importable_by_the_hosts_python(host):
    find_installation()
    stand_in = "import sys, types; sys.modules['ssl'] = types.ModuleType('ssl');"
    code = (
        f"import sys; sys.path.append({str(host / 'python')!r}); import asyncio;"
        f"{stand_in} sys.modules['ssl'].SSLContext = object;"
        "import qemu.qmp, pexpect.fdpexpect; print(qemu.qmp.QMPClient.__name__)"
    )
    done = subprocess.run(
        [*native_python(userland()), "-SBc", code],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PYTHONHOME": str(userland() / "usr")},
    )
    assert done.stdout == "QMPClient\n", done.stderr


def test_a_damaged_disk_is_told_in_one_line(host, tmp_path, monkeypatch):
    (tmp_path / "disk").write_bytes(bytes(1000) + b"x")
    monkeypatch.setattr(installation, "_DISK", tmp_path / "disk")
    with pytest.raises(HostError, match="cannot unpack QEMU"):
        find_installation()


def test_a_host_without_qemu_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(installation, "_DISK", tmp_path / "none")
    monkeypatch.setattr(installation.shutil, "which", lambda name: None)
    with pytest.raises(HostError, match="this host has no qemu-system-x86_64"):
        find_installation()


def test_this_machines_own_qemu_comes_first(monkeypatch, image):
    monkeypatch.setattr(installation, "_DISK", image)
    monkeypatch.setattr(installation.shutil, "which", lambda name: f"/somewhere/{name}")
    assert find_installation().command == ("/somewhere/qemu-system-x86_64",)


def test_a_library_that_is_missing_is_named(monkeypatch):
    said = subprocess.CompletedProcess([], 0, "\tlibmissing.so.1 => not found\n", "")
    monkeypatch.setattr(qemu_payload.subprocess, "run", lambda *_, **__: said)
    with pytest.raises(HostError, match=r"libmissing\.so\.1 => not found"):
        shared_libraries(Path("/bin/qemu"))


def test_a_rom_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(qemu_payload, "_ROM_DIRECTORIES", ("/nowhere",))
    with pytest.raises(HostError, match=r"QEMU's pvh\.bin is in none of /nowhere"):
        qemu_payload._rom("pvh.bin")


def test_the_disks_come_in_the_order_that_the_host_counts_on(tmp_path):
    linux, qemu = tmp_path / "linux.tar", tmp_path / "qemu.tar"
    assert Hardware(disk=linux, qemu_disk=qemu).disks == (linux, qemu)
    assert Hardware().disks == ()
