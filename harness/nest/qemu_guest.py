"""A Linux guest under QEMU, as its host sees it: what `LinuxGuest` is for the harness's own VMM."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Self

from harness.errors import HarnessError, HostError, HostLost, ScenarioFailure, Unsupported
from harness.host.session import Session
from harness.machine.linux_pc import LINUX_OPTIONS
from harness.machine.smi_counter import Way
from harness.machine.xsetbv import has_xsave
from harness.nest.payload import INITRD_MEMBER, KERNEL_MEMBER, members
from harness.nest.running import CHANNEL_OPTIONS, LinuxSpec, tsc_khz
from harness.qemu_vmm.installation import Installation
from harness.qemu_vmm.over import Over
from harness.qemu_vmm.pc import QemuPc
from harness.qemu_vmm.process import PcOptions
from kvm_ioctl.handles import Kvm

_NO_FIRMWARE: Final = frozenset({"acpi=off", "pci=off", "reboot=t"})
"""Of LINUX_OPTIONS: what is so only under the harness's own VMM."""

_WITHOUT_XSAVE: Final = "-xsave,-avx,-f16c,-fma,-avx2,-pku,-vaes,-vpclmulqdq"
"""What `harness.machine.xsetbv.hide_xsave` hides, in QEMU's words."""


class QemuGuest:
    """A Linux under QEMU; it moves from one QEMU to the next."""

    def __init__(
        self,
        kvm: Kvm,
        spec: LinuxSpec,
        on_console: Callable[[str], None],
        installation: Installation,
        *,
        over: Over,
        move_s: float,
    ) -> None:
        """Start QEMU and let it boot.

        Args:
            kvm: an open /dev/kvm.
            spec: what is wanted.
            on_console: gets what it prints on its console, line by line.
            installation: QEMU.
            over: what it moves over.
            move_s: seconds that a move may take.

        Raises HostError: no such image, or QEMU cannot be started.

        """
        self.name = spec.name
        self._over, self._move_s = over, move_s
        self._files = tempfile.TemporaryDirectory(prefix="nsvm-boot-")
        try:
            options = _options(kvm, spec, Path(self._files.name))
            self._pc = QemuPc(installation, options, on_console=on_console, life_s=spec.life_s)
        except BaseException:
            self._files.cleanup()
            raise
        self.session = Session(self._pc.channel, self._why_dead, spec.silence_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def last_words(self) -> str:
        """The end of its console."""
        return self._pc.console.last_words

    def move(self) -> dict[str, Any]:
        """Migrate it to a new QEMU; return figures.

        Raises ScenarioFailure: QEMU could not; the guest is where it was, or lost.
        Raises HostError: it was not done in time, or refused.
        """
        try:
            return self._pc.move(self._over, self._move_s)
        except ScenarioFailure as e:
            raise ScenarioFailure(f"{self.name}: {e}") from e
        except HostError as e:
            raise HostError(f"{self.name}: {e}") from e

    def smi(self, index: int, way: Way, timeout_s: float) -> dict[str, Any]:
        """Refuse: QMP has no command for it."""
        raise Unsupported("QEMU sends no SMI from outside the guest")

    def counts(self) -> dict[str, int]:
        """Return KVM's statistics of it; empty where there are none."""
        return self._pc.counts()

    def close(self) -> None:
        """End it."""
        self._pc.close()
        self._files.cleanup()

    def _why_dead(self, reason: str) -> HostLost:
        return self._pc.why_dead(self.name, reason)


def _options(kvm: Kvm, spec: LinuxSpec, directory: Path) -> PcOptions:
    """Return what QEMU is to run; kernel and initrd, which it wants as files, go to `directory`."""
    files = members(memoryview(spec.source.map()))
    for name in (KERNEL_MEMBER, INITRD_MEMBER):
        (directory / name).write_bytes(files[name])
    if spec.shows_source and spec.source.offset:
        raise HarnessError(f"{spec.name}: QEMU cannot show a guest {spec.source}")
    common = (word for word in LINUX_OPTIONS.split() if word not in _NO_FIRMWARE)
    return PcOptions(
        cpu="host" if has_xsave(kvm) else f"host,{_WITHOUT_XSAVE}",
        vcpus=spec.vcpus,
        memory_mib=spec.memory_mib,
        kernel=directory / KERNEL_MEMBER,
        initrd=directory / INITRD_MEMBER,
        command_line=" ".join((*common, CHANNEL_OPTIONS, spec.options(tsc_khz(kvm)))),
        disk=spec.source.path if spec.shows_source else None,
    )
