"""In which order the parts of a vCPU are restored: what tools do, and what else is possible."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
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


_TRIES: Final = 12
"""Orders that each of `covering` is the best of."""

Fact = tuple[str, int | str]
"""Of an order: a part and its place, or a part and one that comes after it."""


def covering() -> list[tuple[str, ...]]:
    """Return few orders in which every part has every place that the constraints leave to it.

    And of every two parts each is the first one somewhere, unless a constraint says which it is.
    They keep all constraints, and are the same ones every time.
    """
    chance = random.Random(0)
    missing, found = _possible(), list[tuple[str, ...]]()
    while missing:
        part, what = min(missing, key=str)
        # Where it is as early as can be, all others come after it that may.
        place = what if isinstance(what, int) else _places(part).start
        tries = [_with(part, place, chance) for _ in range(_TRIES)]
        found.append(max(tries, key=lambda order: len(missing & _facts(order))))
        missing -= _facts(found[-1])
    return found


def breaking() -> Iterator[tuple[Constraint, tuple[str, ...]]]:
    """Yield for each constraint, but that CPUID comes first, an order that does not keep it.

    It is the default one with one part in another place, and breaks as little else as can be.
    """
    for constraint in CONSTRAINTS:
        if constraint.first != "cpuid":
            orders = [*moved(constraint.first), *moved(constraint.second)]
            broken = [order for order in orders if constraint in broken_by(order)]
            yield constraint, min(broken, key=lambda order: len(broken_by(order)))


def _possible() -> set[Fact]:
    """Return what is so in any order that keeps the constraints."""
    parts = DEFAULT[1:]
    places: set[Fact] = {(part, place) for part in parts for place in _places(part)}
    return places | {(a, b) for a in parts for b in parts if a != b and b not in _before(a)}


def _facts(order: Sequence[str]) -> set[Fact]:
    pairs = {(a, b) for at, a in enumerate(order) for b in order[at + 1 :]}
    return pairs | set(zip(order, range(len(order)), strict=False))


@cache
def _before(part: str) -> frozenset[str]:
    """Return the parts that must be restored before one, CPUID included."""
    first = frozenset(c.first for c in CONSTRAINTS if c.second == part)
    return first.union(*map(_before, first))


def _places(part: str) -> range:
    """Return the places where a part may be."""
    after = sum(part in _before(other) for other in DEFAULT)
    return range(len(_before(part)), len(DEFAULT) - after)


def _with(part: str, place: int, chance: random.Random) -> tuple[str, ...]:
    """Return any order that keeps the constraints and has a part in a place."""
    order: list[str] = []
    while len(order) < len(DEFAULT):
        ready = [it for it in DEFAULT if it not in order and _before(it) <= {*order}]
        needed = _before(part) - {*order}
        if len(order) == place:
            ready = [part]
        elif len(order) < place:
            ready = [it for it in ready if it != part]
            if len(needed) == place - len(order):
                ready = [it for it in ready if it in needed]
        order.append(chance.choice(ready))
    return tuple(order)
