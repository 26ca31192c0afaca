"""An SSH server of one's own: on a high port of 127.0.0.1, with keys that are thrown away.

It comes from Debian's packages, which are unpacked and not installed, unless there is one. What it
wants of the machine (a user `sshd`, /run/sshd) it gets in a mount namespace of its own.
"""

import contextlib
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

DEADLINE_S = 30
PACKAGES = ("openssh-server", "libwrap0")

_CONFIG = """
ListenAddress 127.0.0.1
Port {port}
HostKey {here}/host
AuthorizedKeysFile {here}/client.pub
PidFile none
UsePAM no
StrictModes no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
"""

_START = """
set -e
mount --bind {here}/passwd /etc/passwd
mount -t tmpfs tmpfs /run
mkdir -m 755 /run/sshd
exec {sshd} -D -e -f {here}/config
"""


class SshServer:
    """A server, and how to log in."""

    def __init__(self, here, port):
        self.here, self.port = here, port

    def login(self, user="root", key="client"):
        """The words of a command that runs another one there."""
        options = ["IdentitiesOnly=yes", "BatchMode=yes", f"UserKnownHostsFile={self.here}/known"]
        words = ["ssh", "-F", "none", "-p", str(self.port), "-i", str(self.here / key)]
        words += [word for option in options for word in ("-o", option)]
        return shlex.join([*words, f"{user}@127.0.0.1"])


@pytest.fixture(scope="session")
def ssh_server(tmp_path_factory):
    if os.geteuid() != 0:
        pytest.skip("an SSH server of one's own needs root, for its mount namespace")
    for tool in ("ssh", "ssh-keygen", "unshare"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} in PATH")
    here = tmp_path_factory.mktemp("ssh")
    sshd, libraries = _server(here)
    port = _free_port()
    _write_files(here, port, sshd)
    command = ["unshare", "--mount", "--propagation", "private", "sh", str(here / "start")]
    environment = {**os.environ, "LD_LIBRARY_PATH": libraries}
    with (
        (here / "log").open("w") as log,
        subprocess.Popen(command, stdout=log, stderr=log, env=environment) as process,
    ):
        try:
            _wait_for(process, port, here / "log")
            yield SshServer(here, port)
        finally:
            process.terminate()


def _server(here):
    found = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    if found is not None:
        return found, os.environ.get("LD_LIBRARY_PATH", "")
    try:
        subprocess.run(
            ["apt-get", "-q", "download", *PACKAGES],
            cwd=here,
            check=True,
            capture_output=True,
            timeout=120,
        )
        for package in here.glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", package, here / "root"], check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as e:
        pytest.skip(f"no sshd here, and {', '.join(PACKAGES)} cannot be had: {e}")
    libraries = {str(library.parent) for library in here.glob("root/**/lib*.so*")}
    return here / "root/usr/sbin/sshd", ":".join(sorted(libraries))


def _write_files(here, port, sshd):
    for name in ("client", "host", "stranger"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", here / name],
            check=True,
            timeout=30,
        )
    host_key = " ".join((here / "host.pub").read_text().split()[:2])
    (here / "known").write_text(f"[127.0.0.1]:{port} {host_key}\n")
    users = Path("/etc/passwd").read_text()
    if "\nsshd:" not in users:
        users += "sshd:x:65000:65534::/run/sshd:/usr/sbin/nologin\n"
    (here / "passwd").write_text(users)
    (here / "config").write_text(_CONFIG.format(here=here, port=port))
    (here / "start").write_text(_START.format(here=here, sshd=sshd))


def _free_port():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def _wait_for(process, port, log):
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            pytest.fail(f"sshd ended with status {process.returncode}: {log.read_text()}")
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        time.sleep(0.05)
    pytest.fail(f"sshd does not listen: {log.read_text()}")


def nsvm_there():
    """`nsvm`, as a command line of somebody who logs in."""
    return shlex.join([sys.executable, "-m", "harness"])
