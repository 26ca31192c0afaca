"""In which order the parts of a vCPU are restored: what tools do, and what else is possible."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

DEFAULT: Final = (
    "cpuid", "tsc_khz", "sregs", "regs", "lapic", "msrs", "xcrs", "xsave", "debugregs", "nested",
    "events", "mp_state",
)  # fmt: skip
"""One that keeps all `CONSTRAINTS`."""

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


@dataclass(frozen=True)
class Constraint:
    """One part must be restored before another."""

    first: str
    second: str
    reason: str
    """The function that makes it so."""

    def __str__(self) -> str:
        return f"{self.first} before {self.second}"


CONSTRAINTS: Final = (
    *(
        Constraint("cpuid", part, "what is valid depends on CPUID (KVM_SET_CPUID2 in api.rst)")
        for part in DEFAULT[1:]
    ),
    Constraint("sregs", "lapic", "the mode of the APIC base decides the layout of the registers "
               "(kvm_apic_state_fixup)"),
    Constraint("lapic", "msrs", "MSR_IA32_TSC_DEADLINE is dropped unless the timer is in that mode "
               "(kvm_set_lapic_tscdeadline_msr)"),
    Constraint("sregs", "nested", "refused without EFER.SVME; clearing it leaves L2 "
               "(svm_set_nested_state, svm_set_efer)"),
    Constraint("sregs", "msrs", "a later KVM_SET_SREGS replaces EFER and the APIC base "
               "(__set_sregs_common)"),
    Constraint("sregs", "events", "its interrupt_bitmap requeues as an external interrupt what "
               "events say of it (__set_sregs); with SREGS2 there is none"),
    Constraint("sregs", "mp_state", "at the reset vector KVM_SET_SREGS makes vCPU 0 runnable "
               "(__set_sregs_common)"),
    Constraint("regs", "events", "KVM_SET_REGS drops a pending exception (__set_regs)"),
    Constraint("nested", "events", "nested state has the interrupt shadow of the last exit, events "
               "that of now; the later one counts (nested_vmcb02_prepare_control)"),
)  # fmt: skip
"""What KVM's code, and where it says so its documentation, asks of an order.

That a changed SMM flag leaves L2 (kvm_vcpu_ioctl_x86_set_vcpu_events) asks for nothing: a vCPU in
SMM is not in guest mode. The selftests have events before nested state nevertheless."""


def broken_by(order: Sequence[str]) -> list[Constraint]:
    """Return the constraints that an order does not keep; [] for one that must work."""
    at = {part: number for number, part in enumerate(order)}
    return [c for c in CONSTRAINTS if at[c.first] > at[c.second]]


def moved(name: str, order: tuple[str, ...] = DEFAULT) -> Iterator[tuple[str, ...]]:
    """Yield every order that differs from one in the place of one part; CPUID stays first."""
    rest = [part for part in order if part not in (name, "cpuid")]
    for at in range(len(rest) + 1):
        changed = ("cpuid", *rest[:at], name, *rest[at:])
        if changed != order:
            yield changed
