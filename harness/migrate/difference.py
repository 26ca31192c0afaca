"""Two machines that should be the same: where they are not."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Final

from harness.machine.machine import Machine
from harness.machine.memory import PAGE_SIZE
from harness.migrate.fields import Fields, Value, state_fields
from harness.migrate.memory_image import not_zero, populated
from harness.migrate.msrs_part import AFTER_RESET
from harness.migrate.shape import backings_of
from harness.migrate.state import MachineState

TIME: Final[Mapping[str, str]] = {
    r"vcpu\d+\.msrs\.0x10": "MSR_IA32_TSC goes on while a machine is moved",
    r"vcpu\d+\.msrs\.0x3b": "MSR_IA32_TSC_ADJUST follows writes of the TSC",
    r"vcpu\d+\.msrs\.0x6e0": "MSR_IA32_TSC_DEADLINE is a TSC value",
    r"vcpu\d+\.lapic\.0x390": "the APIC timer's current count is time",
    r"clock\.(clock|flags|realtime|host_tsc)": "the kvmclock is time",
    r"pit\.channels\[\d\]\.count_load_time": "when the PIT was loaded is time",
    r"vcpu\d+\.msrs\.0x400000[12]0": "HV_X64_MSR_VP_RUNTIME and TIME_REF_COUNT are time",
}
"""Time counters, by expressions for whole names: what may differ between twins, and why."""

_L1_STATE: Final = (
    r"[ecsd]s\.\w+", r"[gi]dtr\.\w+", "rflags", "efer", "cr0", "cr3", "cr4", "rax", "rsp", "rip",
    "cpl",
)  # fmt: skip


def is_l1_state(name: str) -> bool:
    """Tell whether a field of vmcb01's save area, segments being one each, is L1's state."""
    expression = "|".join(_L1_STATE)
    return any(re.fullmatch(expression, field) for field in (name, f"{name}.base"))


NO_STATE: Final[Mapping[str, str]] = {
    rf"vcpu\d+\.nested\.vmcb12\.save\.(?!({'|'.join(_L1_STATE)})$).*": (
        "of vmcb01's save area only what VMRUN saves is L1's (svm_copy_vmrun_state); the rest is "
        "whatever was there"
    ),
    r"vcpu\d+\.nested\.vmcb12\.reserved_tail.*": "never written",
}
"""What is read but means nothing, and why."""

EXCUSED: Final[Mapping[str, str]] = {**TIME, **NO_STATE}
"""The whole list of justified exceptions."""

BETWEEN_KERNELS: Final[Mapping[str, str]] = {
    r"vcpu\d+\.events\.flags": "says which fields of the events this kernel fills in",
    r"vcpu\d+\.xsave\.\[0x1d0\]": "of FXSAVE, free for software: newer kernels say XFEATURES there",
}
"""What may differ besides where the two ran on different kernels, and why."""


@dataclass(frozen=True)
class Difference:
    """One value that is not the same."""

    what: str
    one: Value | None
    """None: it is not there at all."""
    other: Value | None

    def __str__(self) -> str:
        return f"{self.what}: {_shown(self.one)}, the other has {_shown(self.other)}"


def _shown(value: Value | None) -> str:
    if value is None:
        return "nothing"
    return hex(value) if isinstance(value, int) else value


def state_differences(
    one: MachineState, other: MachineState, excused: Iterable[str] = tuple(EXCUSED)
) -> list[Difference]:
    """Return where two states differ, but for names that an expression in `excused` matches.

    What only one kernel knows, an MSR or PDPTRs, is the same where it is as after reset.
    """
    left, right = (_without_idle_events(state_fields(state)) for state in (one, other))
    found = field_differences(left, right, excused)
    return [difference for difference in found if not _is_as_after_reset(difference)]


def _is_as_after_reset(difference: Difference) -> bool:
    """Tell whether a value that only one of two has is what the other one has untold."""
    if difference.one is not None and difference.other is not None:
        return False
    value = difference.other if difference.one is None else difference.one
    names = {f".msrs.{index:#x}": reset for index, reset in AFTER_RESET.items()}
    return value == next((v for end, v in names.items() if difference.what.endswith(end)), 0)


_EVENT_DETAILS: Final = {
    "exception": ("nr", "has_error_code", "error_code"),
    "interrupt": ("nr", "soft"),
}


def _without_idle_events(fields: Fields) -> Fields:
    """Leave out what an exception or interrupt is that is neither pending nor injected.

    KVM keeps the last one's number and error code (struct kvm_queued_exception).
    """
    idle = {
        f"{path}.{detail}"
        for event, details in _EVENT_DETAILS.items()
        for path in _paths_ending_in(f".events.{event}", fields)
        if not fields[f"{path}.injected"] and not fields.get(f"{path}.pending")
        for detail in details
    }
    return {name: value for name, value in fields.items() if name not in idle}


def _paths_ending_in(end: str, fields: Fields) -> Iterator[str]:
    last = f"{end}.injected"
    for name in fields:
        if name.endswith(last):
            yield name.removesuffix(".injected")


def field_differences(one: Fields, other: Fields, excused: Iterable[str] = ()) -> list[Difference]:
    """Return where two sets of values differ, by name, in the order of the first."""
    excuse = re.compile("|".join(f"(?:{expression})" for expression in excused) or r"(?!)")
    names = list(dict.fromkeys((*one, *other)))
    return [
        Difference(name, one.get(name), other.get(name))
        for name in names
        if one.get(name) != other.get(name) and not excuse.fullmatch(name)
    ]


def memory_differences(one: Machine, other: Machine, most: int = 16) -> list[Difference]:
    """Return the first 8-byte words of memory that differ, by guest-physical address."""
    found: list[Difference] = []
    slots = {id(slot.backing): slot for slot in reversed(one.memory.all_slots())}
    for mine, theirs in zip(backings_of(one), backings_of(other), strict=True):
        pages = sorted({*not_zero(mine, populated(mine)), *not_zero(theirs, populated(theirs))})
        slot = slots[id(mine)]
        for page in pages:
            at = page * PAGE_SIZE
            left, right = mine[at : at + PAGE_SIZE], theirs[at : at + PAGE_SIZE]
            if left != right:
                found += _words(slot.gpa + at, slot.as_id, left, right)
            if len(found) >= most:
                return found[:most]
    return found


def _words(gpa: int, as_id: int, one: bytes, other: bytes) -> Iterator[Difference]:
    space = " in SMRAM" if as_id else ""
    pairs = zip_longest(memoryview(one).cast("Q"), memoryview(other).cast("Q"))
    for number, (left, right) in enumerate(pairs):
        if left != right:
            yield Difference(f"memory at {gpa + 8 * number:#x}{space}", left, right)
