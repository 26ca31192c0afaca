"""What a tower of Linux levels shall be like: sizes and deadlines, one plan for all levels."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Final

from harness.qemu_vmm.over import Over

ENOUGH: Final = "enough\n"
"""What the level that is disturbed reads when that is over: its proxy works until then."""

PROXY_LAUNCHED: Final = "proxy launched"
"""The stage that the proxy's innermost level reports."""

ENTERED: Final = "entered"
"""The stage of a level whose kernel is about to boot."""

ROUND: Final = "round"
"""What the stages of a level's own work begin with."""

READY: Final = "ready"
"""The stage of a level whose agent answers."""


class Inner(StrEnum):
    """The guest of the innermost level that `depth` counts."""

    PROXY = "proxy"
    LINUX = "linux"


class Vmm(StrEnum):
    """Who runs L1; deeper levels have none but the harness's own."""

    OWN = "own"
    QEMU = "qemu"


_OWN_MIB: Final = 224
"""What a Linux level needs for itself: kernel, initrd, Python."""
_GUEST_MIB: Final = 32
"""And besides its guest's memory, for having one."""
_SHOWN_MIB: Final = 112
"""The image that a guest is shown for guests of its own."""
_HOST_MIB: Final = 480
_QEMU_MIB: Final = 640
"""QEMU itself, what it boots as files, L1 a second time when it moves, and a file to move over."""

_WORK_S: Final = 120.0
_SLOWER: Final = 6.0
"""A level deeper, everything takes so many times longer at most."""
_SILENCE_S: Final = 60.0
_BOOT_S: Final = 90.0
_MOVE_S: Final = 150.0
_FIRMWARE_SLOWER: Final = 2.0
"""With a BIOS, ACPI and PCI before it, and all of QEMU's devices, a boot takes longer."""


@dataclass(frozen=True)
class Plan:
    """One tower."""

    depth: int = 1
    inner: Inner = Inner.PROXY
    vcpus: int = 1
    steps: int = 24
    """Of the proxy's work."""
    rounds: int = 3
    """Of each Linux level's own work."""
    options: str = "loglevel=3"
    """More of the kernels' command lines."""
    patience: float = 1.0
    """All deadlines are multiplied by it."""
    slow_clock: int = 1
    """So many times slower time passes in all guests: see `clock_options`."""
    moves: int = 0
    """So often L1 is migrated while the guests in it work; a proxy works for as long."""
    smis: int = 0
    """So many SMIs L1 gets meanwhile."""
    seed: int = 0
    """Decides about the moments."""
    vmm: Vmm = Vmm.OWN
    move_over: Over = Over.UNIX
    """What QEMU sends L1 over when it migrates it."""

    @property
    def linux_levels(self) -> int:
        """How many levels run Linux, the host not counted."""
        return self.depth + (self.inner is Inner.LINUX)

    @property
    def transcripts(self) -> list[tuple[str, str]]:
        """Which level reports which transcript: ("L1", "rounds"), ... None of them is empty."""
        own = [(f"L{number}", "rounds") for number in range(1, self.linux_levels + 1)]
        has_proxy = self.inner is Inner.PROXY and self.steps
        return [*own, *([(f"L{self.linux_levels}", "proxy")] if has_proxy else [])]

    @property
    def disturbed(self) -> bool:
        """Whether L1 is migrated, or gets SMIs."""
        return self.moves > 0 or self.smis > 0

    def works_until_told(self, level: int) -> bool:
        """Tell whether a level's proxy works on after its steps, until `ENOUGH` comes."""
        return self.disturbed and level == 1

    @property
    def disturbed_from(self) -> str:
        """The stage of a deeper level from which on L1 is disturbed."""
        return PROXY_LAUNCHED if self.inner is Inner.PROXY else ENTERED

    def fewest(self, wanted: int) -> int:
        """Return how many of the moves, or SMIs, there must have been.

        Only a proxy right in L1 waits for all of them.
        """
        waits = self.linux_levels == 1 and self.inner is Inner.PROXY
        return wanted if waits else min(wanted, 1)

    def memory_mib(self, level: int) -> int:
        """Return what Linux at this level gets."""
        if level == self.linux_levels:
            return _OWN_MIB
        return _OWN_MIB + self._guests_mib(level + 1)

    @property
    def host_mib(self) -> int:
        """What the emulated host needs."""
        more = _QEMU_MIB if self.vmm is Vmm.QEMU else 0
        return _HOST_MIB + more + self._guests_mib(1)

    def _guests_mib(self, level: int) -> int:
        """Return what a guest of this level costs its host."""
        shown = _SHOWN_MIB if level < self.linux_levels else 0
        return _GUEST_MIB + self.memory_mib(level) + shown

    def boot_s(self, level: int) -> float:
        """Return the seconds that Linux at this level may take to boot."""
        slower = _FIRMWARE_SLOWER if level == 1 and self.vmm is Vmm.QEMU else 1.0
        return slower * self._scaled(_BOOT_S, level - 1)

    @property
    def move_s(self) -> float:
        """The seconds that a migration of L1 may take."""
        return self._scaled(_MOVE_S, 0)

    def silence_s(self, level: int) -> float:
        """Return the seconds for which its agent may say nothing."""
        return self._scaled(_SILENCE_S, level - 1)

    def call_s(self, level: int) -> float:
        """Return the seconds that all that happens at this level and deeper may take."""
        deeper = range(level + 1, self.linux_levels + 1)
        return self._scaled(_WORK_S, level) + sum(
            self.boot_s(n) + self._scaled(_WORK_S, n) for n in deeper
        )

    def _scaled(self, seconds: float, times: int) -> float:
        return seconds * _SLOWER**times * self.patience

    def clock_options(self, level: int, tsc_khz: int) -> str:
        """Return what makes L1's kernel take its TSC for faster than it is.

        A timer tick of a guest costs exits, at each level some times more; where the silicon is
        emulated they eat up the time between two of them. With time passing slower in L1, ticks
        are rarer. Deeper levels inherit it: what KVM tells of the TSC is what its kernel believes.
        More than some 34 GHz cannot be: the APIC timer's frequency, an eighth of it in Hz, is told
        to clockevents_config_and_register() in 32 bits.

        Args:
            level: of the guest.
            tsc_khz: as KVM tells it (KVM_GET_TSC_KHZ).

        """
        if self.slow_clock == 1 or level != 1 or not tsc_khz:
            return ""
        return f"no-kvmclock tsc_early_khz={tsc_khz * self.slow_clock}"

    def to_json(self) -> dict[str, Any]:
        """Return it for the way into a host."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Plan:
        """Return the plan that `to_json` was asked of."""
        kinds = {"inner": Inner, "vmm": Vmm, "move_over": Over}
        return cls(**{**data, **{name: kind(data[name]) for name, kind in kinds.items()}})
