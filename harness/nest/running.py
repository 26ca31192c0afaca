"""A `LinuxPc` at work in threads: made from a description, its channel a descriptor."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from harness.machine.linux_boot import LinuxBoot
from harness.machine.linux_pc import SHARED_GPA, LinuxPc
from harness.machine.pc_run import PcEnd, PcRunner
from harness.machine.smi_counter import CountedSmi, Way, send_smi
from harness.nest.payload import INITRD_MEMBER, KERNEL_MEMBER, PARAMETER, Source, members
from kvm_ioctl.handles import Kvm
from kvm_ioctl.request import ClosedError, KvmError
from kvm_ioctl.stats import StatsFd

CHANNEL_OPTIONS: Final = "nsvm.channel=ttyS1"
_STOP_S: Final = 20.0
_NEWLINE: Final = 0x0A


@dataclass(frozen=True)
class LinuxSpec:
    """What Linux is wanted as a guest."""

    name: str
    """For messages, as "L1"."""
    source: Source
    """Kernel and initrd."""
    shows_source: bool
    """Whether the guest can read them too, for guests of its own."""
    vcpus: int
    memory_mib: int
    options: Callable[[int], str]
    """Returns more of the kernel command line for a TSC of so many kHz."""
    life_s: float
    """So many seconds it may run at most."""
    silence_s: float
    """So many seconds without a word from its agent, and it counts as lost."""
    smm: bool = False
    """Whether it gets SMIs."""


class ChannelLines:
    """Takes the bytes that a guest sends, writes them to a descriptor line by line."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._line = bytearray()

    def take(self, value: int) -> None:
        """Take a byte."""
        self._line.append(value)
        if value == _NEWLINE:
            self.flush()

    def flush(self) -> None:
        """Write what is there, though the line has no end yet."""
        data, self._line = bytes(self._line), bytearray()
        while data:
            data = data[os.write(self._fd, data) :]


def build_pc(kvm: Kvm, spec: LinuxSpec, on_channel: Callable[[int], None]) -> LinuxPc:
    """Return a machine that is about to boot.

    Raises HostError: no such image.
    Raises ImageError: no kernel in it that can be loaded.
    Raises KvmError: KVM refused something.
    """
    image = spec.source.copy(SHARED_GPA) if spec.shows_source else spec.source.map()
    files = members(memoryview(image))
    shown = f"{PARAMETER}={spec.source.size_bytes:#x} " if spec.shows_source else ""
    command_line = f"{CHANNEL_OPTIONS} {shown}{spec.options(tsc_khz(kvm))}"
    return LinuxPc(
        kvm,
        LinuxBoot(files[KERNEL_MEMBER], files[INITRD_MEMBER], command_line, spec.name),
        vcpus=spec.vcpus,
        memory_mib=spec.memory_mib,
        on_channel=on_channel,
        shared=image if spec.shows_source else None,
        smm=spec.smm,
    )


class RunningPc:
    """A machine that runs until it ends or is stopped."""

    def __init__(
        self,
        pc: LinuxPc,
        life_s: float,
        on_text: Callable[[str], None],
        on_end: Callable[[], None],
    ) -> None:
        """Let it run.

        Args:
            pc: the machine.
            life_s: seconds that it may run.
            on_text: gets what it prints on its console.
            on_end: called when it runs no more, by whatever.

        """
        self.pc = pc
        self.end: PcEnd | None = None
        """How the machine ended, if it did."""
        self.error: BaseException | None = None
        self._on_end = on_end
        self._stats = _open_stats(pc)
        self._runner = PcRunner(pc, on_text)
        self._thread = threading.Thread(target=self._run, args=(life_s,), name="pc", daemon=True)
        self._thread.start()

    @property
    def why_ended(self) -> str:
        """In words; empty: it runs."""
        if self.error is not None:
            return f"{type(self.error).__name__}: {self.error}"
        return str(self.end.text) if self.end is not None else ""

    def join(self, timeout_s: float) -> None:
        """Wait for the end, so many seconds at most."""
        self._thread.join(timeout_s)

    def stop(self) -> bool:
        """End the run; tell whether that worked."""
        self._runner.stop()
        self._thread.join(_STOP_S)
        return not self._thread.is_alive()

    def close(self) -> None:
        """End the run, and the machine if nothing uses it any more."""
        if self.stop():
            self.pc.close()

    def smi(self, index: int, way: Way, timeout_s: float) -> CountedSmi:
        """Send an SMI, see `send_smi`."""
        return send_smi(
            self.pc, index, way, timeout_s=timeout_s, ended=lambda: not self._thread.is_alive()
        )

    def counts(self) -> dict[str, int]:
        """Return KVM's statistics of the VM, the vCPUs' added up; empty where there are none."""
        found: Counter[str] = Counter()
        # A VM that moved away has none any more.
        with suppress(ClosedError, OSError):
            for stats in self._stats:
                found.update({k: v for k, v in stats.read().items() if isinstance(v, int)})
        return dict(found)

    def _run(self, life_s: float) -> None:
        try:
            self.end = self._runner.run(life_s)
        except BaseException as e:  # told by why_ended
            self.error = e
        finally:
            self._on_end()


def _open_stats(pc: LinuxPc) -> list[StatsFd]:
    """Open KVM's statistics of a VM and its vCPUs; empty before Linux 5.14, which has none.

    To be called while no vCPU runs: KVM_GET_STATS_FD waits for the vCPU's mutex (kvm_vcpu_ioctl),
    which KVM_RUN holds until there is something for user space; an idle vCPU may have nothing for
    minutes. What is open can be read at any time (kvm_vcpu_stats_read).
    """
    with suppress(KvmError):
        return [pc.vm.stats(), *(runner.vcpu.stats() for runner in pc.vcpus)]
    return []


def tsc_khz(kvm: Kvm) -> int:
    """Return how fast the TSC of this host's guests is; 0 if KVM does not know."""
    with kvm.create_vm() as vm, vm.create_vcpu(0) as vcpu:
        khz: int = vcpu.get_tsc_khz()
        return khz
