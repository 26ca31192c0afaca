"""An emulated machine of a lab: a real kernel with its kvm_amd, an SSH server, and nothing else."""

import os
import shutil
import socket
import stat
import subprocess
from pathlib import Path

from nsvm_process import wait_until

from harness.host.archive import Archive, unpack
from harness.host.emulated import CPU, KERNEL_OPTIONS
from harness.host.initrd import Entry, Module, cpio, entries
from harness.host.kernels import module_closure, read_module
from harness.host.lab_file import LabHost
from harness.host.qemu import QEMU
from harness.host.userland import BUSYBOX, PYTHON, userland

HERE = Path(__file__).parent
SSH_PACKAGES = ("dropbear-bin", "libtomcrypt1", "libtommath1", "libgmp10", "libcrypt1")
MODULES = ("virtio_pci", "virtio_net", "kvm_amd")
_MODPROBE = b"""#!/usr/bin/python3.11 -ISB
import sys
sys.path.insert(0, "/nsvm")
import init
init.modprobe()
"""
BOOT_S = 120


class LabMachine:
    """A context manager; `lab` is its entry in a lab.toml. A panic is a reboot, as in a lab.

    With `reboots` False a panic is its end, as of a machine whose power supply has gone.
    """

    def __init__(self, kernel, here, name="emulated1", *, reboots=True):
        self._reboots = reboots
        self.here = here / name
        self.here.mkdir()
        self.name, self._kernel = name, kernel
        with socket.create_server(("127.0.0.1", 0)) as taken:
            self.port = taken.getsockname()[1]
        self.console = self.here / "console"

    def __enter__(self):
        command = self._command(self._initrd())
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        try:
            self.wait_for_boot(1)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait(30)

    def wait_for_boot(self, number):
        def is_up():
            assert self.process.poll() is None, self.text
            return self.text.count("the SSH server is up") >= number

        wait_until(is_up, f"boot {number}", BOOT_S)

    @property
    def text(self):
        return self.console.read_text(errors="replace") if self.console.exists() else ""

    @property
    def lab(self):
        return LabHost(
            self.name,
            "127.0.0.1",
            self.port,
            key=self.here / "client",
            agent=False,
            known_hosts=self.here / "known",
            python=f"/{PYTHON}",
            connect_s=30,
            boot_s=BOOT_S,
        )

    def _command(self, initrd):
        forward = f"user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:{self.port}-:22"
        return [
            "setpriv", "--pdeathsig", "KILL",
            QEMU, "-nodefaults", "-no-user-config", "-display", "none",
            "-machine", "q35,smm=on", "-accel", "tcg", "-cpu", CPU, "-smp", "1", "-m", "768",
            "-kernel", str(self._kernel.vmlinux or self._kernel.bzimage),
            "-initrd", str(initrd), "-append", KERNEL_OPTIONS,
            "-netdev", forward, "-device", "virtio-net-pci,netdev=net,romfile=",
            "-serial", f"file:{self.console}",
            *([] if self._reboots else ["-no-reboot"]),
        ]  # fmt: skip

    def _initrd(self):
        root, agent = self.here / "root", self.here / "agent"
        for deb in Archive().fetch_all(SSH_PACKAGES):
            unpack(deb, root)
        agent.mkdir()
        shutil.copyfile(HERE / "lab_init.py", agent / "init.py")
        modules = [
            Module(
                path.stem.split(".")[0].replace("-", "_"),
                read_module(path),
                "nested=1" if path.name.startswith("kvm-amd.") else "",
            )
            for path in module_closure(self._kernel, MODULES)
        ]
        made = {e.name: e for e in entries(userland(), agent, modules)}
        made.update((e.name, e) for e in self._files(root))
        path = self.here / "initrd"
        with path.open("wb") as out:
            # Directories before what is in them.
            for piece in cpio(sorted(made.values(), key=lambda entry: entry.name)):
                out.write(piece)
        return path

    def _files(self, root):
        for name in ("bin", "sbin", "etc", "etc/dropbear", "root", "root/.ssh"):
            yield Entry(name, stat.S_IFDIR | (0o700 if name.startswith("root") else 0o755))
        yield Entry("bin/busybox", stat.S_IFREG | 0o755, (userland() / BUSYBOX).read_bytes())
        yield Entry("sbin/modprobe", stat.S_IFREG | 0o755, _MODPROBE)
        yield Entry("etc/passwd", stat.S_IFREG | 0o644, b"root:x:0:0::/root:/bin/sh\n")
        yield Entry("etc/shells", stat.S_IFREG | 0o644, b"/bin/sh\n")
        server = root / "usr/sbin/dropbear"
        yield Entry("sbin/dropbear", stat.S_IFREG | 0o755, server.read_bytes())
        for library in root.glob("**/lib/x86_64-linux-gnu/*.so.*"):
            name = f"lib/x86_64-linux-gnu/{library.name}"
            yield Entry(name, stat.S_IFREG | 0o755, library.read_bytes())
        yield Entry("etc/dropbear/host", stat.S_IFREG | 0o600, self._keys(root))

        client = (self.here / "client.pub").read_bytes()
        yield Entry("root/.ssh/authorized_keys", stat.S_IFREG | 0o600, client)

    def _keys(self, root):
        """Make a key for each side; return the machine's, which outlives its boots."""
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.here / "client"]
        subprocess.run(command, check=True, timeout=30)
        libraries = {str(library.parent) for library in root.glob("**/lib*.so*")}
        done = subprocess.run(
            [root / "usr/bin/dropbearkey", "-t", "ed25519", "-f", self.here / "host"],
            env={**os.environ, "LD_LIBRARY_PATH": ":".join(libraries)},
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        )
        [line] = [line for line in done.stdout.splitlines() if line.startswith("ssh-ed25519")]
        key = " ".join(line.split()[:2])
        (self.here / "known").write_text(f"[127.0.0.1]:{self.port} {key}\n")
        return (self.here / "host").read_bytes()
