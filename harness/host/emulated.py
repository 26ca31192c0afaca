"""The emulated host: a virtual AMD machine on which a real kernel runs its own `kvm_amd`.

QEMU's TCG emulates SVM, nested paging and SMM. A cold boot takes seconds; at its end the whole
machine, agent running, is saved to a file (a *warm state*), and later machines start from that in a
fraction of a second. A warm state is keyed by everything that went into it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import HarnessError, HostError, HostLost
from harness.host import bundle, kvm_parameters
from harness.host.cache import cache_dir, locked
from harness.host.guest_payload import payload_release
from harness.host.initrd_build import build_initrd
from harness.host.kernels import Kernel
from harness.host.monitor import shell_quoted
from harness.host.qemu import QEMU, QemuMachine, qemu_version
from harness.host.session import Event, Host, Session
from harness.host.userland import userland

#: What the channel and KVM need, in any order; built-in ones are skipped.
WANTED_MODULES = ("virtio_pci", "virtio_console", "kvm_amd")

#: Features KVM's nested SVM uses and TCG has. `max` brings the rest.
CPU = "max,+svm,+npt,+vgif"

# Each saves boot time under TCG or noise in a measurement. `no_timer_check`: without it a boot has
# panicked ("IO-APIC + timer doesn't work!"). `panic=-1` with QEMU's -no-reboot ends the process.
# `damon_stat`: Debian's 7.3 has CONFIG_DAMON_STAT_ENABLED_DEFAULT, which looks at all memory every
# 5 ms, has KVM age its pages for that (kvm_rmap_age_gfn_range), and with it at every level.
KERNEL_OPTIONS = (
    "console=ttyS0 loglevel=4 panic=-1 oops=panic mitigations=off tsc=reliable no_timer_check "
    "cryptomgr.notests rcupdate.rcu_expedited=1 audit=0 nowatchdog random.trust_cpu=on "
    "8250.nr_uarts=1 cgroup.memory=nosocket apparmor=0 damon_stat.enabled=0"
)

COLD_BOOT_S = 120.0
WARM_START_S = 10.0


@dataclass(frozen=True)
class Hardware:
    """The emulated machine's size."""

    cpus: int = 1
    memory_mib: int = 768
    disk: Path | None = None
    """A read-only image that the host has as its virtio disk."""
    qemu_disk: Path | None = None
    """One more: QEMU, for the host to run (`qemu_payload`)."""

    @property
    def disks(self) -> tuple[Path, ...]:
        """The images, in the order in which the host has them as /dev/vda and so on."""
        return tuple(disk for disk in (self.disk, self.qemu_disk) if disk)


class EmulatedHost(Host):
    """A virtual AMD machine with `kernel`; `params` are kvm_amd's, e.g. ``{"nested": "0"}``.

    Use as a context manager. `start` gives a session with the tree's code loaded; called again, it
    gives a fresh machine, whatever became of the one before. With `keep_spare` the one after is
    started meanwhile, so that it costs next to nothing.
    """

    kind = "emulated"

    def __init__(
        self,
        kernel: Kernel,
        params: Mapping[str, str] | None = None,
        hardware: Hardware | None = None,
        *,
        warm: bool = True,
        keep_spare: bool = False,
        log: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.kernel = kernel
        self.params = {"nested": "1", **(params or {})}
        self.hardware = hardware or Hardware()
        self.version = qemu_version()
        self._warm = warm
        self._keep_spare = keep_spare
        self._log = log
        self._run: QemuMachine | None = None
        #: The next machine, coming up while this one works.
        self._spare: QemuMachine | None = None
        self._scratch = Path(tempfile.mkdtemp(prefix="nsvm-host-"))
        self._starts = 0
        self._hello: Event = {}
        self._code: bundle.Bundle | None = None
        self.started_warm = False

    def describe(self) -> dict[str, Any]:
        """Return what results record of this host."""
        return {
            "kind": self.kind,
            "kernel_release": self._hello.get("release", self.kernel.release),
            "kernel_version": self._hello.get("version", ""),
            "kernel_origin": self.kernel.origin,
            "module_parameters": self._hello.get("params", {}),
            "cpus": self.hardware.cpus,
            "memory_mib": self.hardware.memory_mib,
            "qemu_version": self.version,
            "silicon": f"emulated (QEMU {self.version}, TCG, -cpu {CPU})",
            **payload_release(self.hardware.disk),
        }

    @property
    def console_text(self) -> str:
        """All that the current machine has written to its serial console."""
        return self._run.console_text if self._run else ""

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The QEMU process of the current machine."""
        if self._run is None:
            raise HostError("the emulated host is not running")
        return self._run.process

    def start(self) -> Session:
        """Start a machine with the tree's code loaded in its agent.

        The nearest saved state is taken: one with this very code, else one without any, else none;
        the states that were missing are saved on the way. One that does not come up, twice, is
        forgotten, and the machine booted cold.

        Raises:
            HostError: it does not come up.
        """
        self._stop()
        if self._code is None:
            # Once: all machines of a run have the same code, whatever is edited meanwhile.
            self._code = bundle.build_bundle(userland())
        try:
            for what_next in (self._stop, self._forget):
                try:
                    return self._started(self._code)
                except HostLost as e:
                    if not self.started_warm:
                        raise
                    self._log(f"warm start failed: {e}")
                    what_next()
            return self._started(self._code)
        except HostLost as e:
            raise HostError(f"the emulated host did not come up: {e}\n{e.console}".rstrip()) from e

    def _started(self, code: bundle.Bundle) -> Session:
        session = self._start_with(code)
        self._hello = session.hello(WARM_START_S)
        kvm_parameters.require(self.params, kvm_parameters.of_hello(self._hello["params"]))
        if self._hello["bundle"] != code.name:
            raise HostError(f"the host runs code {self._hello['bundle']}, not {code.name}")
        if self._keep_spare and (ready := self._state_path(code.name)).exists():
            self._spare = self._machine(_incoming(ready))
        return session

    def _forget(self) -> None:
        self._stop()
        self._stop_spare()
        for name in ("base", *([self._code.name] if self._code else [])):
            self._state_path(name).unlink(missing_ok=True)

    def _start_with(self, code: bundle.Bundle) -> Session:
        if not self._warm:
            return self._load(self._boot(), code)
        if self._spare is not None:
            self._run, self._spare = self._spare, None
            return self._run.session
        ready, base = self._state_path(code.name), self._state_path("base")
        if ready.exists():
            return self._resume(ready)
        with locked(base.name):
            if ready.exists():
                return self._resume(ready)
            if base.exists():
                session = self._resume(base)
            else:
                self._log(f"cold boot of {self.kernel.release}")
                session = self._boot()
                self._save(base)
            self._load(session, code)
            self._save(ready)
        return session

    @staticmethod
    def _load(session: Session, code: bundle.Bundle) -> Session:
        session.send_bundle(code.name, code.path.read_bytes())
        session.preload(list(bundle.PRELOAD))
        return session

    def close(self) -> None:
        """End the machine and remove what it left."""
        self._stop()
        self._stop_spare()
        shutil.rmtree(self._scratch, ignore_errors=True)

    # --- starting

    def _boot(self) -> Session:
        self.started_warm = False
        self._run = self._machine([])
        self._run.session.wait_for("ready", COLD_BOOT_S)
        return self._run.session

    def _resume(self, state: Path) -> Session:
        self.started_warm = True
        self._run = self._machine(_incoming(state))
        return self._run.session

    def _machine(self, extra: list[str]) -> QemuMachine:
        self._starts += 1
        return QemuMachine([*self._command(), *extra], self._scratch, self._starts)

    def _stop(self) -> None:
        if self._run is not None:
            run, self._run = self._run, None
            run.stop()

    def _stop_spare(self) -> None:
        if self._spare is not None:
            spare, self._spare = self._spare, None
            spare.stop()

    def _save(self, state: Path) -> None:
        """Save the running machine; without space, say so and go on without."""
        if self._run is None:
            raise HarnessError("no machine to save")
        temporary = state.with_name(f".{state.name}.{os.getpid()}")
        try:
            self._run.monitor.save_machine(temporary)
            _forget_older(state)
            temporary.rename(state)
        except OSError as e:
            # Only the next start will be a slower one.
            self._log(f"warm state not saved: {e.strerror or e}")
        finally:
            temporary.unlink(missing_ok=True)

    def _command(self) -> list[str]:
        """Return the part of the command line that a warm state depends on."""
        return [
            QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
            "-machine", "q35,smm=on", "-accel", "tcg,thread=multi", "-cpu", CPU,
            "-smp", str(self.hardware.cpus), "-m", str(self.hardware.memory_mib),
            "-kernel", str(self.kernel.vmlinux or self.kernel.bzimage),
            "-initrd", str(self._initrd()), "-append", KERNEL_OPTIONS,
            # A state saved from a stopped machine shall start running.
            "-global", "migration.store-global-state=off",
            "-device", "virtio-serial-pci",
            "-device", "virtserialport,chardev=channel,name=nsvm",
            *self._disks(),
            "-serial", "chardev:console",
            "-mon", "chardev=monitor,mode=control",
        ]  # fmt: skip

    def _initrd(self) -> Path:
        extra = ("virtio_blk",) if self.hardware.disks else ()
        return build_initrd(self.kernel, (*WANTED_MODULES, *extra), self.params)

    def _disks(self) -> list[str]:
        found = []
        for number, image in enumerate(self.hardware.disks):
            # The first one's name is part of what older warm states were saved with.
            name = f"disk{number or ''}"
            path = str(image).replace(",", ",,")
            found += [
                "-drive", f"if=none,id={name},format=raw,readonly=on,file={path}",
                "-device", f"virtio-blk-pci,drive={name}",
            ]  # fmt: skip
        return found

    def _state_path(self, code: str) -> Path:
        key = hashlib.sha256(repr((self._command(), self.version, self.kernel.key)).encode())
        params = "-".join(f"{name}{value}" for name, value in sorted(self.params.items()))
        size = f"{self.hardware.cpus}c{self.hardware.memory_mib}m"
        size += "-disk" * len(self.hardware.disks)
        kind = "base" if code == "base" else "ready"
        directory = cache_dir() / "warm"
        directory.mkdir(exist_ok=True)
        name = f"{self.kernel.release}-{params}-{size}-{kind}"
        return directory / f"{name}.{key.hexdigest()[:16]}-{code}"


def _incoming(state: Path) -> list[str]:
    return ["-incoming", f"exec:cat {shell_quoted(state)}"]


def _forget_older(state: Path) -> None:
    """Remove saved states of the same machine made from other inputs; each is large."""
    for other in state.parent.glob(state.name.rsplit(".", 1)[0] + ".*"):
        if other != state:
            other.unlink(missing_ok=True)
