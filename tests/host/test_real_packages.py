"""What the archive has today, in the user's own cache: downloads some 500 MB the first time."""

import os
import subprocess

import pytest

from harness.host.kernels import module_closure, read_module, resolve
from harness.host.userland import BUSYBOX, PYTHON, headers, userland

pytestmark = pytest.mark.emulated


@pytest.mark.parametrize("spec", ["5.10", "6.1", "6.12", "7.3"])
def test_debians_kernels_have_a_pvh_image_and_kvm_amd(spec):
    kernel = resolve(spec)
    assert kernel.release.startswith(spec)
    assert kernel.vmlinux is not None
    files = module_closure(kernel, ["kvm_amd", "virtio_pci", "virtio_console"])
    order = [p.name.partition(".")[0] for p in files]
    assert order.index("kvm") < order.index("kvm-amd")
    assert "ccp" in order
    assert all(read_module(p)[:4] == b"\x7fELF" for p in files)


def test_debians_python_runs_on_this_machine_with_its_own_libraries():
    tree = userland()
    program = (
        "import ctypes, fcntl, json, mmap, select, socket, struct, zlib, sys\n"
        "maps = open('/proc/self/maps').read().split()\n"
        "print(sys.version_info[:2], [m for m in maps if m.endswith('/libc.so.6')][0])"
    )
    libraries = f"{tree}/lib/x86_64-linux-gnu:{tree}/usr/lib/x86_64-linux-gnu"
    loader = str(tree / "lib64/ld-linux-x86-64.so.2")
    done = subprocess.run(
        [loader, "--library-path", libraries, str(tree / PYTHON), "-c", program],
        env={"PYTHONHOME": str(tree / "usr")},
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == f"(3, 11) {tree.resolve()}/lib/x86_64-linux-gnu/libc.so.6"
    assert os.access(tree / BUSYBOX, os.X_OK)


def test_the_newest_headers_know_nested_state():
    arch, generic = headers()
    assert "struct kvm_svm_nested_state_data" in (arch / "asm/kvm.h").read_text()
    assert "KVM_GET_NESTED_STATE" in (generic / "linux/kvm.h").read_text()
