"""Facts about a host: one read-only question each, answered with its evidence.

Standard library only: scenarios ask inside the host, `nsvm doctor` on this machine. A question is put to
the CPU, the module parameter or the device itself, never to a kernel version: distributions backport.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from harness.errors import HostError

KVM_DEVICE = "/dev/kvm"


@dataclass(frozen=True)
class Fact:
    """An answer. `evidence` carries the values seen, `mend` what to do about a no."""

    holds: bool
    evidence: str
    mend: str = ""


class HostView:
    """What facts look at; tests hand them another one."""

    @cached_property
    def cpu_flags(self) -> frozenset[str]:
        """Flags of the first CPU in /proc/cpuinfo."""
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return frozenset(line.partition(":")[2].split())
        return frozenset()

    def param(self, module: str, name: str) -> str | None:
        """Return a module parameter's value; None if there is no such module or parameter."""
        try:
            return Path(f"/sys/module/{module}/parameters/{name}").read_text().strip()
        except FileNotFoundError:
            return None
        except OSError as e:
            raise HostError(f"{module}.{name}: {e.strerror}") from e

    def open_errno(self, path: str) -> int:
        """Return 0 if `path` can be opened for reading and writing, else the errno."""
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        except OSError as e:
            return e.errno or errno.EIO
        return 0


FactFunction = Callable[[HostView], Fact]


def kvm_device(host: HostView) -> Fact:
    """/dev/kvm is there and ours to use."""
    error = host.open_errno(KVM_DEVICE)
    if error == 0:
        return Fact(True, f"{KVM_DEVICE} opens for reading and writing")
    if error in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
        return Fact(
            False,
            f"{KVM_DEVICE}: {os.strerror(error)}",
            "load kvm_amd, or use the emulated host (--host emulated)",
        )
    # A device that is there and refuses is a broken lab, not an answer.
    raise HostError(f"{KVM_DEVICE}: {os.strerror(error)} (run as root, or join the device's group)")


def svm(host: HostView) -> Fact:
    """The CPU has SVM."""
    if "svm" in host.cpu_flags:
        return Fact(True, "cpu flag svm")
    return Fact(False, "no cpu flag svm", "use an AMD host, or --host emulated")


def nested_svm(host: HostView) -> Fact:
    """/dev/kvm is kvm_amd's, with nested SVM offered to guests."""
    device = kvm_device(host)
    if not device.holds:
        return device
    value = host.param("kvm_amd", "nested")
    if value is None:
        return Fact(
            False,
            "no module kvm_amd (/dev/kvm belongs to another one)",
            "modprobe kvm_amd on an AMD host, or use --host emulated",
        )
    holds = value in ("1", "Y")
    mend = "" if holds else "reload it: modprobe -r kvm_amd && modprobe kvm_amd nested=1"
    return Fact(holds, f"kvm_amd.nested={value}", mend)


def nested_svm_off(host: HostView) -> Fact:
    """kvm_amd is loaded with nested=0."""
    value = host.param("kvm_amd", "nested")
    if value is None:
        return Fact(False, "no module kvm_amd", "use --host emulated")
    return Fact(value in ("0", "N"), f"kvm_amd.nested={value}", "use --host emulated")


def memory_controller(host: HostView) -> Fact:
    """A cgroup v2 memory controller can be used by this process."""
    controllers = Path("/sys/fs/cgroup/cgroup.subtree_control")
    try:
        enabled = controllers.read_text().split()
    except FileNotFoundError:
        return Fact(False, f"no {controllers}", "boot with cgroup v2 (unified hierarchy)")
    return Fact("memory" in enabled, f"{controllers}: {' '.join(enabled) or '(none)'}")
