"""Process 1 of the emulated host: mounts, modules, the channel; then it becomes the agent.

Carried in the initrd beside `agent.py`; both import the standard library only and nothing of the
tree, since the tree's own code arrives over the channel, or for a slow one beside them.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import termios
import time
from pathlib import Path

import agent  # type: ignore[import-not-found]  # beside it in the initrd

#: finit_module(2), asm/unistd_64.h; the C library has no wrapper for it.
_SYS_FINIT_MODULE = 313
_PORT_NAME = "nsvm"
_PORT_DEADLINE_S = 10.0
#: The tree's own code, where it comes with the initrd and not over the channel.
_CODE = Path("/nsvm/code.zip")

_PCI_DEVICES = Path("/sys/bus/pci/devices")

_MOUNTS = (
    ("proc", "/proc"),
    ("sysfs", "/sys"),
    ("devtmpfs", "/dev"),
    ("tmpfs", "/run"),
    ("cgroup2", "/sys/fs/cgroup"),
    ("debugfs", "/sys/kernel/debug"),
    ("tracefs", "/sys/kernel/tracing"),
)

_libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Set the machine up and serve; a failure is printed to the console and powers off."""
    try:
        for kind, where in _MOUNTS:
            _mount(kind, where)
        # Controllers are on only where a parent cgroup says so.
        Path("/sys/fs/cgroup/cgroup.subtree_control").write_text("+memory")
        for module in json.loads(Path("/modules/order.json").read_text()):
            if _is_of_use(module["name"]):
                _insert(module["name"], module["options"])
        channel = _open_channel()
        if _CODE.exists():
            sys.path.insert(0, str(_CODE))
        # One idle VM for the life of the host: creating the first and destroying the last VM patch
        # the kernel's text, which multi-threaded TCG does not always survive.
        idle = agent.open_idle_vm()
        agent.serve(channel, channel, hold=idle)
    except BaseException as e:
        print(f"nsvm-init: {type(e).__name__}: {e}", file=sys.stderr, flush=True)
    agent.power_off()


def _mount(kind: str, where: str) -> None:
    Path(where).mkdir(parents=True, exist_ok=True)
    if _libc.mount(kind.encode(), where.encode(), kind.encode(), 0, None) < 0:
        errno = ctypes.get_errno()
        raise OSError(errno, f"mount {kind} on {where}: {os.strerror(errno)}")


def _is_of_use(name: str) -> bool:
    """Tell whether a module may find a device: at a deeper level each costs a second or two."""
    return not name.startswith("virtio") or any(_PCI_DEVICES.iterdir())


def _insert(name: str, options: str) -> None:
    with open(f"/modules/{name}.ko", "rb") as image:
        if _libc.syscall(_SYS_FINIT_MODULE, image.fileno(), options.encode(), 0) < 0:
            errno = ctypes.get_errno()
            raise OSError(errno, f"module {name} {options}: {os.strerror(errno)}")


def _open_channel() -> int:
    """Open what the kernel command line says (`nsvm.channel=ttyS1`), else the virtio port."""
    words = (word.partition("=") for word in Path("/proc/cmdline").read_text().split())
    device = dict((name, value) for name, _, value in words).get("nsvm.channel")
    return _open_serial(f"/dev/{device}") if device else _open_port(_PORT_NAME)


def _open_serial(path: str) -> int:
    """Open a serial port for bytes as they are: no echo, no line editing, no signals."""
    fd = os.open(path, os.O_RDWR | os.O_NOCTTY)
    settings = termios.tcgetattr(fd)
    settings[:4] = 0, 0, termios.CS8 | termios.CREAD | termios.CLOCAL, 0
    settings[6][termios.VMIN], settings[6][termios.VTIME] = 1, 0
    termios.tcsetattr(fd, termios.TCSANOW, settings)
    return fd


def _open_port(name: str) -> int:
    deadline = time.monotonic() + _PORT_DEADLINE_S
    while time.monotonic() < deadline:
        for entry in Path("/sys/class/virtio-ports").glob("*/name"):
            if entry.read_text().strip() == name:
                return os.open(f"/dev/{entry.parent.name}", os.O_RDWR)
        time.sleep(0.01)
    raise TimeoutError(
        f"no virtio port {name!r} within {_PORT_DEADLINE_S:.0f} s: the kernel needs virtio_pci and"
        " virtio_console, built in or as modules"
    )
