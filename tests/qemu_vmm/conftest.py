"""A small Linux for this machine's own QEMU: busybox, and a script for an agent.

Its processor is emulated: what is tested is how QEMU is handled, and that is the same with KVM.
"""

import contextlib
import stat

import pytest

from harness.errors import HostError
from harness.host.initrd import Entry, cpio
from harness.host.userland import BUSYBOX, userland
from harness.qemu_vmm.installation import find_installation
from harness.qemu_vmm.pc import QemuPc
from harness.qemu_vmm.process import PcOptions

COUNTS = """#!/bin/busybox sh
/bin/busybox mkdir /dev /proc
/bin/busybox mount -t devtmpfs none /dev
/bin/busybox mount -t proc none /proc
/bin/busybox stty -F /dev/ttyS1 raw -echo
n=0
while :; do
    n=$((n + 1))
    echo "$n" > /dev/ttyS1
    [ $((n % 50)) = 0 ] && echo "said $n"
done
"""
"""Says numbers, each once, for as long as it lives."""

LIFE_S = 120.0
OPTIONS = (
    "console=ttyS0 panic=-1 tsc=reliable no_timer_check mitigations=off 8250.nr_uarts=2 loglevel=3"
)


def boot_files(directory, image, script):
    """Return what QEMU boots, with `script` as /init; None: no initrd that could be unpacked."""
    entries = [Entry("bin", stat.S_IFDIR | 0o755)]
    if script is not None:
        entries += [
            Entry("bin/busybox", stat.S_IFREG | 0o755, (userland() / BUSYBOX).read_bytes()),
            Entry("init", stat.S_IFREG | 0o755, script.encode()),
        ]
    initrd = directory / "initrd"
    initrd.write_bytes(b"".join(cpio(entries)))
    return PcOptions("max", 1, 128, image, initrd, OPTIONS, accel="tcg")


@pytest.fixture
def boot(one_kernel, tmp_path):
    """Boot a guest whose process 1 is a script."""
    image = one_kernel.kernel.vmlinux or one_kernel.kernel.bzimage
    with contextlib.ExitStack() as stack:

        def booted(script=COUNTS, on_console=lambda text: None, life_s=LIFE_S):
            try:
                installation = find_installation()
            except HostError as e:
                pytest.fail(f"{e}: `make test` installs it")
            options = boot_files(tmp_path, image, script)
            pc = QemuPc(installation, options, on_console=on_console, life_s=life_s)
            stack.callback(pc.close)
            return pc

        yield booted
