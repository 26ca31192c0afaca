"""Facts about a host: one read-only question each, answered with its evidence.

Standard library only: scenarios ask inside the host, `nsvm doctor` on this machine. A question is
put to the CPU, the module parameter or the device itself, never to a kernel version: distributions
backport. A host that refuses the question raises `HostError`, which is not "no".
"""

from __future__ import annotations

import errno
import os
import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from harness.errors import HostError
from harness.probe.memcg import mount_point
from harness.probe.tracefs import TRACEFS
from kvm_ioctl.capabilities import Cap
from kvm_ioctl.linux_kvm import KVM_API_VERSION
from kvm_ioctl.system import Kvm

KVM_DEVICE = "/dev/kvm"
KERNEL_LOG = "/dev/kmsg"

_ON = ("1", "Y")
_OFF = ("0", "N")
_EMULATED = "use the emulated host (--host emulated)"


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
        for line in (self.read("/proc/cpuinfo") or "").splitlines():
            if line.startswith("flags"):
                return frozenset(line.partition(":")[2].split())
        return frozenset()

    @cached_property
    def architecture(self) -> str:
        """``uname -m``."""
        return os.uname().machine

    def read(self, path: str | Path) -> str | None:
        """Return a file's text; None if there is no such file.

        Raises:
            HostError: it is there and cannot be read.
        """
        try:
            return Path(path).read_text(errors="replace")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as e:
            raise HostError(f"{path}: {e.strerror}") from e

    def param(self, module: str, name: str) -> str | None:
        """Return a module parameter's value; None if there is no such module or parameter."""
        value = self.read(f"/sys/module/{module}/parameters/{name}")
        return None if value is None else value.strip()

    def kvm_modules(self) -> list[str]:
        """Return the modules that stand behind /dev/kvm: ``kvm_amd``, ``kvm_intel``, others."""
        return sorted(path.name for path in Path("/sys/module").glob("kvm_*"))

    def open_errno(self, path: str, flags: int = os.O_RDWR) -> int:
        """Return 0 if `path` can be opened with `flags`, else the errno."""
        try:
            os.close(os.open(path, flags | os.O_CLOEXEC))
        except OSError as e:
            return e.errno or errno.EIO
        return 0

    def writable(self, path: str | Path) -> bool:
        """Say whether this process may write to a file or into a directory."""
        return os.access(path, os.W_OK)

    def kvm_api_version(self) -> int:
        """Return what KVM_GET_API_VERSION answers."""
        with _open_kvm() as kvm:
            return kvm.api_version

    def check_extension(self, cap: Cap) -> int:
        """Return what KVM_CHECK_EXTENSION answers on the system fd."""
        with _open_kvm() as kvm:
            return kvm.check_extension(cap)

    def memory_hierarchy(self) -> tuple[Path, int] | None:
        """Return where the cgroup memory controller is mounted, and the cgroup version."""
        try:
            return mount_point()
        except HostError:
            return None


FactFunction = Callable[[HostView], Fact]


def _open_kvm() -> Kvm:
    try:
        return Kvm(KVM_DEVICE)
    except OSError as e:
        raise HostError(str(e)) from e


def x86_64(host: HostView) -> Fact:
    """The machine is an x86-64 one: guests are compiled for that."""
    holds = host.architecture == "x86_64"
    return Fact(holds, host.architecture, "" if holds else "use an x86-64 machine")


# KVM and the CPU


def kvm_device(host: HostView) -> Fact:
    """/dev/kvm is there and ours to use."""
    error = host.open_errno(KVM_DEVICE)
    if error == 0:
        return Fact(True, f"{KVM_DEVICE} opens for reading and writing")
    if error in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
        return Fact(False, f"{KVM_DEVICE}: {os.strerror(error)}", f"load kvm_amd, or {_EMULATED}")
    # A device that is there and refuses is a broken lab, not an answer.
    raise HostError(f"{KVM_DEVICE}: {os.strerror(error)} (run as root, or join the device's group)")


def kvm_api(host: HostView) -> Fact:
    """KVM_GET_API_VERSION is the one version that there is."""
    device = kvm_device(host)
    if not device.holds:
        return device
    seen = host.kvm_api_version()
    holds = seen == KVM_API_VERSION
    return Fact(holds, f"KVM_GET_API_VERSION={seen}", "" if holds else _EMULATED)


def kvm_amd(host: HostView) -> Fact:
    """The module behind /dev/kvm is kvm_amd."""
    modules = host.kvm_modules()
    evidence = f"modules: {' '.join(modules) or '(none of KVM)'}"
    if "kvm_amd" in modules:
        return Fact(True, evidence)
    return Fact(False, evidence, f"modprobe kvm_amd on an AMD machine, or {_EMULATED}")


def svm(host: HostView) -> Fact:
    """The CPU has SVM."""
    if "svm" in host.cpu_flags:
        return Fact(True, "cpu flag svm")
    # Firmware that disables SVM (VM_CR.SVMDIS) makes Linux drop the flag.
    mend = f"enable SVM in the firmware of an AMD machine, or {_EMULATED}"
    return Fact(False, "no cpu flag svm", mend)


def nested_svm(host: HostView) -> Fact:
    """/dev/kvm is kvm_amd's, with nested SVM offered to guests."""
    value = host.param("kvm_amd", "nested")
    if value is None:
        return kvm_amd(host)
    if value not in _ON:
        mend = "reload it: modprobe -r kvm_amd && modprobe kvm_amd nested=1"
        return Fact(False, f"kvm_amd.nested={value}", mend)
    device = kvm_device(host)
    return Fact(True, f"kvm_amd.nested={value}") if device.holds else device


def nested_svm_off(host: HostView) -> Fact:
    """kvm_amd is loaded with nested=0."""
    value = host.param("kvm_amd", "nested")
    if value is None:
        return Fact(False, "no module kvm_amd", _EMULATED)
    return Fact(value in _OFF, f"kvm_amd.nested={value}", "" if value in _OFF else _EMULATED)


def npt(host: HostView) -> Fact:
    """Nested paging is offered by the CPU and enabled in kvm_amd."""
    return _cpu_and_param(host, "npt", "npt")


def vgif(host: HostView) -> Fact:
    """Virtual GIF is offered by the CPU and enabled in kvm_amd."""
    return _cpu_and_param(host, "vgif", "vgif")


def nrip_save(host: HostView) -> Fact:
    """NRIP save on #VMEXIT is offered by the CPU and enabled in kvm_amd."""
    return _cpu_and_param(host, "nrip_save", "nrips")


def _cpu_and_param(host: HostView, flag: str, param: str) -> Fact:
    in_cpu, value = flag in host.cpu_flags, host.param("kvm_amd", param)
    holds = in_cpu and value in _ON
    mend = ""
    if not in_cpu:
        mend = "a CPU that has it"
    elif not holds:
        mend = f"modprobe kvm_amd {param}=1"
    shown = "(no such parameter)" if value is None else value
    return Fact(holds, f"cpu flag {flag}={int(in_cpu)}, kvm_amd.{param}={shown}", mend)


def nested_state(host: HostView) -> Fact:
    """KVM can save and restore nested state (KVM_CAP_NESTED_STATE)."""
    return _capability(host, Cap.KVM_CAP_NESTED_STATE)


def smm(host: HostView) -> Fact:
    """KVM has system management mode (KVM_CAP_X86_SMM)."""
    return _capability(host, Cap.KVM_CAP_X86_SMM)


def dirty_rings(host: HostView) -> Fact:
    """KVM can queue dirty pages per vCPU (KVM_CAP_DIRTY_LOG_RING, which 5.10 has not)."""
    return _capability(host, Cap.KVM_CAP_DIRTY_LOG_RING)


def _capability(host: HostView, cap: Cap) -> Fact:
    device = kvm_device(host)
    if not device.holds:
        return device
    value = host.check_extension(cap)
    return Fact(value > 0, f"{cap.name}={value}", "" if value > 0 else _EMULATED)


# What the memory probes measure with


def memory_controller(host: HostView) -> Fact:
    """A cgroup memory controller, of either version, can be used by this process."""
    found = host.memory_hierarchy()
    if found is None:
        mend = "boot with cgroup v2 (systemd.unified_cgroup_hierarchy=1), without cgroup_disable"
        return Fact(False, "no memory controller in /proc/self/mounts", mend)
    root, version = found
    evidence = f"cgroup v{version} at {root}"
    control = root / "cgroup.subtree_control"
    if version == 2:
        enabled = (host.read(control) or "").split()
        evidence += f", {control.name}: {' '.join(enabled) or '(none)'}"
        if "memory" not in enabled:
            return Fact(False, evidence, f"echo +memory > {shlex.quote(str(control))}")
    if not host.writable(root):
        raise HostError(f"{root}: no permission to make a cgroup (root needed)")
    return Fact(True, evidence)


def memory_counters(host: HostView) -> Fact:
    """The memory controller counts kernel memory page by page."""
    found = host.memory_hierarchy()
    if found is None:
        return memory_controller(host)
    root, version = found
    name, line = ("memory.kmem.usage_in_bytes", "") if version == 1 else ("memory.stat", "kernel")
    text = host.read(root / name)
    if text is None:
        return Fact(False, f"no {root / name}", "measure on a newer kernel, 6.1 for one")
    holds = not line or any(row.split(" ")[0] == line for row in text.splitlines())
    if holds:
        return Fact(True, f"{root / name}{': ' + line if line else ''}")
    mend = "memory.current is used instead, to 4 pages; a newer kernel, 6.1 for one, has it"
    return Fact(False, f"no line {line!r} in {root / name}", mend)


def tracefs(host: HostView) -> Fact:
    """Trace instances can be made by this process."""
    mounts = (host.read("/proc/self/mounts") or "").splitlines()
    if not any(line.split()[1:3] == [str(TRACEFS), "tracefs"] for line in mounts):
        kernel_has_it = "tracefs" in (host.read("/proc/filesystems") or "").split()
        if kernel_has_it:
            mend = f"mount -t tracefs tracefs {TRACEFS}"
            return Fact(False, f"not mounted at {TRACEFS}", mend)
        return Fact(False, "this kernel has no tracefs", "a kernel with CONFIG_TRACING")
    if not host.writable(TRACEFS / "instances"):
        raise HostError(f"{TRACEFS}: no permission to make a trace instance (root needed)")
    return Fact(True, f"tracefs at {TRACEFS}")


def kprobe_events(host: HostView) -> Fact:
    """The kernel has kprobe events, with which functions are traced by name."""
    mounted = tracefs(host)
    if not mounted.holds:
        return mounted
    path = TRACEFS / "kprobe_events"
    # Root may write it wherever it exists.
    if host.writable(path):
        return Fact(True, str(path))
    return Fact(False, f"no {path}", "a kernel with CONFIG_KPROBE_EVENTS")


def kernel_log(host: HostView) -> Fact:
    """The kernel log can be read, where a WARN during a scenario is found."""
    error = host.open_errno(KERNEL_LOG, os.O_RDONLY | os.O_NONBLOCK)
    if error == 0:
        return Fact(True, f"{KERNEL_LOG} opens for reading")
    if error in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
        mend = f"mknod {KERNEL_LOG} c 1 11, or run outside the container"
        return Fact(False, f"{KERNEL_LOG}: {os.strerror(error)}", mend)
    raise HostError(
        f"{KERNEL_LOG}: {os.strerror(error)} (run as root, or sysctl kernel.dmesg_restrict=0)"
    )


# Asking many


@dataclass(frozen=True)
class Answer:
    """A fact's answer under its name.

    `holds` is None if the host could not say; `evidence` then says why.
    """

    name: str
    holds: bool | None
    evidence: str
    mend: str = ""


KVM_FACTS: tuple[FactFunction, ...] = (
    x86_64,
    kvm_device,
    kvm_api,
    kvm_amd,
    svm,
    nested_svm,
    nested_state,
    smm,
    npt,
    vgif,
    nrip_save,
)

PROBE_FACTS: tuple[FactFunction, ...] = (
    memory_controller,
    memory_counters,
    tracefs,
    kprobe_events,
    kernel_log,
)


def ask(name: str, question: Callable[[], Fact]) -> Answer:
    """Return the answer to one question; a refusal is one too."""
    try:
        fact = question()
    except (HostError, OSError) as e:
        return Answer(name, None, str(e))
    return Answer(name, fact.holds, fact.evidence, "" if fact.holds else fact.mend)


def ask_host(questions: tuple[FactFunction, ...], host: HostView) -> tuple[Answer, ...]:
    """Return the host's answers in the order of `questions`."""
    return tuple(ask(function.__name__, partial(function, host)) for function in questions)


def ask_here(emit: Callable[..., None]) -> list[dict[str, Any]]:
    """Return all answers of the host that this runs in, as JSON takes them: called by the agent."""
    answers = ask_host(KVM_FACTS + PROBE_FACTS, HostView())
    return [asdict(answer) for answer in answers]
