"""Process 1 of the emulated lab machine: network, modules, an SSH server. No harness."""

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)
_DELETE_MODULE, _FINIT_MODULE = 176, 313

_MOUNTS = (
    ("proc", "/proc"),
    ("sysfs", "/sys"),
    ("devtmpfs", "/dev"),
    ("devpts", "/dev/pts"),
    ("tmpfs", "/run"),
    ("cgroup2", "/sys/fs/cgroup"),
    ("tracefs", "/sys/kernel/tracing"),
)

_SETUP = """
/bin/busybox --install -s /bin
ip link set lo up
ip link set eth0 up
ip addr add 10.0.2.15/24 dev eth0
"""


def _checked(result, what):
    if result < 0:
        raise OSError(ctypes.get_errno(), what)


def insert(name, options):
    with open(f"/modules/{name}.ko", "rb") as image:
        _checked(_libc.syscall(_FINIT_MODULE, image.fileno(), options.encode(), 0), name)


def modprobe():
    """What modprobe(8) does, as far as the harness needs it."""
    if sys.argv[1] == "-r":
        _checked(_libc.syscall(_DELETE_MODULE, sys.argv[2].encode(), os.O_NONBLOCK), "in use")
    else:
        insert(sys.argv[1], " ".join([*configured(sys.argv[1]), *sys.argv[2:]]))


def configured(name):
    """A module's options in /etc/modprobe.d."""
    found = []
    for path in sorted(Path("/etc/modprobe.d").glob("*.conf")):
        for line in path.read_text().splitlines():
            if line.split()[:2] == ["options", name]:
                found += line.split()[2:]
    return found


def main():
    for kind, where in _MOUNTS:
        Path(where).mkdir(parents=True, exist_ok=True)
        _checked(_libc.mount(kind.encode(), where.encode(), kind.encode(), 0, None), where)
    Path("/sys/fs/cgroup/cgroup.subtree_control").write_text("+memory")
    for module in json.loads(Path("/modules/order.json").read_text()):
        insert(module["name"], module["options"])
    subprocess.run(["/bin/busybox", "sh", "-ec", _SETUP], check=True)
    os.environ["PATH"] = "/sbin:/bin:/usr/bin"
    server = subprocess.Popen(["/sbin/dropbear", "-F", "-E", "-s", "-r", "/etc/dropbear/host"])
    print("lab: the SSH server is up", flush=True)
    while True:
        pid, status = os.wait()
        if pid == server.pid:
            print(f"lab: the SSH server ended: {status}", flush=True)


if __name__ == "__main__":
    modprobe()
