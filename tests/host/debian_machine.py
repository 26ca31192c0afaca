"""A whole Debian, with apt, systemd, sudo and OpenSSH, as an emulated machine of a lab."""

import hashlib
import os
import shutil
import socket
import subprocess
from pathlib import Path

from harness.host.apt import source_line
from harness.host.apt_sources import machine_mirrors
from harness.host.archive import Archive, unpack
from harness.host.emulated import CPU
from harness.host.lab_file import LabHost
from harness.host.qemu import QEMU
from harness.host.ssh_connection import connect

BOOT_S = 300
_MAKE_S = 600

#: What a small installation has.
PACKAGES = (
    "systemd-sysv", "udev", "dbus", "openssh-server", "python3", "python3-apt", "iproute2", "kmod",
    "linux-image-amd64", "initramfs-tools",
)  # fmt: skip
#: What apt finds there: with Debian's own lists, each question to apt takes a minute under TCG.
TO_BE_HAD = ("sudo",)
_REPOSITORY = "srv/packages"
#: Only what this machine needs: unpacking an initramfs takes long, too.
_INITRAMFS = {
    "etc/initramfs-tools/conf.d/small": "MODULES=list\nCOMPRESS=gzip\n",
    "etc/initramfs-tools/modules": "virtio_pci\nvirtio_blk\next4\ncrc32c_generic\n",
}
_APT_CONF = 'Acquire::Check-Valid-Until "false";\nAcquire::Languages "none";\n'
_NETWORK = "[Match]\nType=ether\n[Network]\nAddress=10.0.2.15/24\nGateway=10.0.2.2\n"


class DebianMachine:
    """A context manager; `lab` is its entry in a lab.toml. Making it needs root."""

    def __init__(self, here, name="debian1"):
        self.here, self.name = here, name
        self.root, self.console = here / "root", here / "console"
        with socket.create_server(("127.0.0.1", 0)) as taken:
            self.port = taken.getsockname()[1]

    def __enter__(self):
        self._make()
        with (self.here / "qemu.log").open("wb") as log:
            self.process = subprocess.Popen(
                self._command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        try:
            with connect(self.lab, BOOT_S) as connection:
                connection.run("systemctl", "is-system-running", "--wait", timeout_s=BOOT_S)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait(30)

    @property
    def lab(self):
        return LabHost(
            self.name,
            "127.0.0.1",
            self.port,
            key=self.here / "client",
            agent=False,
            known_hosts=self.here / "known",
            connect_s=30,
        )

    def _make(self):
        unpack(Archive().fetch("mmdebstrap"), self.here / "tool")
        self._bootstrap()
        self._offer()
        self._configure()
        disk = self.here / "disk"
        with disk.open("wb") as file:
            file.truncate(4 << 30)
        _run("mkfs.ext4", "-q", "-d", self.root, disk)

    def _bootstrap(self):
        mirrors = machine_mirrors()
        sources = self.here / "sources.list"
        suites = {"bookworm": mirrors.main, "bookworm-security": mirrors.security}
        sources.write_text("".join(source_line(mirror, name) for name, mirror in suites.items()))
        files = self.here / "files"
        for name, text in _INITRAMFS.items():
            (files / name).parent.mkdir(parents=True, exist_ok=True)
            (files / name).write_text(text)
        _run(
            "perl", self.here / "tool/usr/bin/mmdebstrap", "--mode=root", "--variant=apt",
            "--format=directory", "--skip=check/qemu",
            *(f"--aptopt={line}" for line in _APT_CONF.splitlines()),
            "--aptopt=APT::Install-Recommends \"false\";",
            f"--essential-hook=cp -r {files}/etc \"$1\"/",
            f"--include={','.join(PACKAGES)}",
            "bookworm", self.root, sources,
        )  # fmt: skip

    def _offer(self):
        """Make a repository of packages that are not installed, in place of Debian's archive."""
        here = self.root / _REPOSITORY
        here.mkdir()
        index = ""
        for deb in Archive().fetch_all(TO_BE_HAD):
            shutil.copyfile(deb, here / deb.name)
            data = deb.read_bytes()
            control = _run("dpkg-deb", "-f", deb).strip()
            digest = hashlib.sha256(data).hexdigest()
            where = f"Filename: ./{deb.name}\nSize: {len(data)}\nSHA256: {digest}"
            index += f"{control}\n{where}\n\n"
        (here / "Packages").write_text(index)
        sources = self.root / "etc/apt/sources.list.d"
        for path in sources.iterdir():
            path.unlink()
        (self.root / "etc/apt/sources.list").unlink(missing_ok=True)
        (sources / "lab.list").write_text(f"deb [trusted=yes] file:/{_REPOSITORY} ./\n")

    def _configure(self):
        etc = self.root / "etc"
        client = self.here / "client"
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", client)
        keys = self.root / "root/.ssh"
        keys.mkdir(mode=0o700, exist_ok=True)
        shutil.copyfile(f"{client}.pub", keys / "authorized_keys")
        _run("ssh-keygen", "-A", "-f", self.root)
        key = (etc / "ssh/ssh_host_ed25519_key.pub").read_text().split()[:2]
        (self.here / "known").write_text(f"[127.0.0.1]:{self.port} {' '.join(key)}\n")
        for name, text in {
            "hostname": f"{self.name}\n",
            "hosts": f"127.0.0.1 localhost {self.name}\n",
            "fstab": "/dev/vda / ext4 defaults 0 0\n",
            "systemd/network/lab.network": _NETWORK,
            "apt/apt.conf.d/lab": _APT_CONF,
        }.items():
            (etc / name).unlink(missing_ok=True)
            (etc / name).write_text(text)
        _run("chroot", self.root, "systemctl", "enable", "systemd-networkd", "ssh")

    def _command(self):
        [kernel] = (self.root / "boot").glob("vmlinuz-*")
        [initrd] = (self.root / "boot").glob("initrd.img-*")
        options = "root=/dev/vda rw console=ttyS0 mitigations=off no_timer_check quiet"
        return [
            "setpriv", "--pdeathsig", "KILL",
            QEMU, "-nodefaults", "-no-user-config", "-display", "none",
            "-machine", "q35,smm=on", "-accel", "tcg", "-cpu", CPU, "-smp", "1", "-m", "1536",
            "-kernel", kernel, "-initrd", initrd, "-append", options,
            "-drive", f"file={self.here / 'disk'},if=virtio,format=raw,cache=unsafe",
            "-netdev", f"user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:{self.port}-:22",
            "-device", "virtio-net-pci,netdev=net,romfile=",
            "-serial", f"file:{self.console}",
        ]  # fmt: skip


def _run(*words):
    done = subprocess.run(
        list(map(str, words)),
        env={**os.environ, "LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=_MAKE_S,
    )
    assert done.returncode == 0, f"{Path(str(words[0])).name}: {done.stdout[-4000:]}"
    return done.stdout
