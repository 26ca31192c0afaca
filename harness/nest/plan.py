"""What a tower of Linux levels shall be like: sizes and deadlines, one plan for all levels."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Final

ENOUGH: Final = "enough\n"
"""What the level that is migrated reads when that is over: its proxy works until then."""

PROXY_LAUNCHED: Final = "proxy launched"
"""The stage that the proxy's innermost level reports."""


READY: Final = "ready"
"""The stage of a level whose agent answers."""


class Inner(StrEnum):
    """The guest of the innermost level that `depth` counts."""

    PROXY = "proxy"
    LINUX = "linux"


_OWN_MIB: Final = 224
"""What a Linux level needs for itself: kernel, initrd, Python."""
_GUEST_MIB: Final = 32
"""And besides its guest's memory, for having one."""
_HOST_MIB: Final = 512

_WORK_S: Final = 120.0
_SLOWER: Final = 6.0
"""A level deeper, everything takes so many times longer at most."""
_SILENCE_S: Final = 60.0
_BOOT_S: Final = 90.0


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
    """So many times slower time passes from L2 on: see `clock_options`."""
    moves: int = 0
    """So often L1 is migrated while the proxy in it works, and that one works for as long."""

    @property
    def linux_levels(self) -> int:
        """How many levels run Linux, the host not counted."""
        return self.depth + (self.inner is Inner.LINUX)

    def works_until_told(self, level: int) -> bool:
        """Tell whether a level's proxy works on after its steps, until `ENOUGH` comes."""
        return self.moves > 0 and level == 1

    @property
    def moves_from(self) -> str:
        """The stage of a deeper level from which on L1 is migrated."""
        return PROXY_LAUNCHED if self.inner is Inner.PROXY else READY

    @property
    def fewest_moves(self) -> int:
        """How many moves there must have been: only a proxy right in L1 waits for all of them."""
        waits = self.linux_levels == 1 and self.inner is Inner.PROXY
        return self.moves if waits else min(self.moves, 1)

    def memory_mib(self, level: int) -> int:
        """Return what Linux at this level gets."""
        deeper = self.linux_levels - level
        return _OWN_MIB + (_OWN_MIB + _GUEST_MIB) * deeper

    @property
    def host_mib(self) -> int:
        """What the emulated host needs."""
        return _HOST_MIB + self.memory_mib(1)

    def boot_s(self, level: int) -> float:
        """Return the seconds that Linux at this level may take to boot."""
        return self._scaled(_BOOT_S, level - 1)

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
        """Return what makes a level's kernel take its TSC for faster than it is.

        Where a timer tick costs more than the time between two of them, a kernel gets nowhere. On
        emulated silicon that is so from L2 on; with time passing slower there, ticks are rarer.
        Deeper levels inherit it: what KVM tells of the TSC is what its own kernel believes.

        Args:
            level: of the guest.
            tsc_khz: as KVM tells it (KVM_GET_TSC_KHZ).

        """
        if self.slow_clock == 1 or level != 2 or not tsc_khz:
            return ""
        return f"no-kvmclock tsc_early_khz={tsc_khz * self.slow_clock}"

    def to_json(self) -> dict[str, Any]:
        """Return it for the way into a host."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Plan:
        """Return the plan that `to_json` was asked of."""
        return cls(**{**data, "inner": Inner(data["inner"])})
