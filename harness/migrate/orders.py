"""In which order the parts of a vCPU are restored: what tools do, and what else is possible."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

DEFAULT: Final = (
    "cpuid", "tsc_khz", "sregs", "lapic", "msrs", "xcrs", "xsave", "events", "mp_state",
    "debugregs", "regs", "nested",
)  # fmt: skip
"""CPUID first, for all checks use it; SREGS before the LAPIC (APIC base) and before nested state
(EFER.SVME); the LAPIC before MSRs (TSC deadline); events before nested state, for a changed SMM
flag leaves L2 (kvm_vcpu_ioctl_x86_set_vcpu_events)."""

SELFTESTS: Final = (
    "cpuid", "tsc_khz", "sregs", "msrs", "xcrs", "xsave", "events", "mp_state", "debugregs",
    "regs", "lapic", "nested",
)  # fmt: skip
"""As vcpu_load_state() of tools/testing/selftests/kvm has it (7.3), which knows no LAPIC."""

SELFTESTS_OLD: Final = (
    "cpuid", "tsc_khz", "xsave", "xcrs", "sregs", "msrs", "events", "mp_state", "debugregs",
    "regs", "lapic", "nested",
)  # fmt: skip
"""The same of 5.10."""

QEMU: Final = (
    "cpuid", "lapic", "sregs", "nested", "tsc_khz", "regs", "xsave", "xcrs", "msrs", "events",
    "mp_state", "debugregs",
)  # fmt: skip
"""As kvm_arch_put_registers() of QEMU 7.2 has it: nested state right after SREGS. The LAPIC is put
earlier, when its device is loaded (kvm_apic_post_load)."""

NAMED: Final = {
    "default": DEFAULT,
    "selftests": SELFTESTS,
    "selftests-5.10": SELFTESTS_OLD,
    "qemu": QEMU,
}
"""Orders by name, for `--order`."""


def moved(name: str, order: tuple[str, ...] = DEFAULT) -> Iterator[tuple[str, ...]]:
    """Yield every order that differs from one in the place of one part; CPUID stays first."""
    rest = [part for part in order if part not in (name, "cpuid")]
    for at in range(len(rest) + 1):
        changed = ("cpuid", *rest[:at], name, *rest[at:])
        if changed != order:
            yield changed
