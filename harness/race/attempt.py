"""One attempt as it was recorded, and what can be concluded from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from harness.proxy.vmcb_view import place_of
from harness.race.code import RECORD_SIZE, race_record
from harness.svm.exit_codes import ExitCode
from harness.svm.vmcb import VMCB_SIZE

Proof = Callable[["Attempt"], str]
"""Says why an attempt cannot have seen one value throughout; empty: it can."""

_SVM_EXIT_ERR = 0xFFFF_FFFF
"""The low half of VMEXIT_INVALID: kernels before the fix of exit_code_hi leave that 0."""

_WORD = 8


@dataclass(frozen=True)
class Plan:
    """What is done to vmcb12: 8 bytes of it, their legal and their illegal value."""

    offset: int
    legal: int
    illegal: int
    templates: tuple[bytes, bytes]
    """vmcb12 before even attempts, and before odd ones."""
    writes: tuple[int, int]
    """What the writer writes, and what it writes when L2 runs or VMRUN has failed."""
    hidden: int = 0
    """Bits that KVM sets or clears itself, whatever was loaded."""

    @property
    def mask(self) -> int:
        """The bits that tell the two values apart once they are loaded."""
        return (self.legal ^ self.illegal) & ~self.hidden


@dataclass(frozen=True)
class Attempt:
    """An attempt with its plan, and the images of vmcb12 after it and after the one before."""

    plan: Plan
    record: race_record
    image: bytes
    previous: bytes | None = None
    traced_rip: int | None = None
    """RIP of L2 as KVM's event of this VMRUN has it, where events are recorded."""

    @property
    def template(self) -> bytes:
        """What vmcb12 held before this attempt."""
        return self.plan.templates[self.record.seq % 2]

    @property
    def exit_code(self) -> int:
        """The exit code as it was written, 64 bits."""
        return field_of(self.image, "exit_code")

    @property
    def ran(self) -> bool:
        """L2 ran, met the writer and exited of its own accord: nobody wrote after its #VMEXIT."""
        return self.exit_code == ExitCode.SVM_EXIT_VMMCALL and self.reached_l2

    @property
    def reached_l2(self) -> bool:
        """L2 executed its instructions in this attempt."""
        return bool(self.record.here == self.record.seq)

    @property
    def gave_up(self) -> bool:
        """L2 ran and did not hear of the writer, whose CPU was busy elsewhere."""
        return self.exit_code == ExitCode.SVM_EXIT_HLT

    @property
    def refused(self) -> bool:
        """VMRUN failed, at whichever point."""
        return self.exit_code & _SVM_EXIT_ERR == _SVM_EXIT_ERR

    @property
    def refused_early(self) -> bool:
        """VMRUN failed in the checks: L2 was not loaded, so no #VMEXIT saved its state."""
        return self.refused and not self.saved_state

    @property
    def saved_state(self) -> bool:
        """A #VMEXIT wrote the save area: RFLAGS is 0 in the template, and 2 on any CPU."""
        return field_of(self.image, "rflags") != field_of(self.template, "rflags")

    @property
    def word(self) -> int:
        """The 8 bytes that the writer rewrites, as they were after #VMEXIT."""
        return int.from_bytes(self.image[self.plan.offset : self.plan.offset + _WORD], "little")

    def to_json(self) -> dict[str, Any]:
        """Return it as evidence: the numbers, and vmcb12 before and after in hexadecimal."""
        return {
            "attempt": int(self.record.seq),
            "delay": int(self.record.used),
            "exit_code": f"{self.exit_code:#x}",
            "l2_ran": self.reached_l2,
            "l2_saw": f"{self.record.seen:#x}",
            "legal": f"{self.plan.legal:#x}",
            "illegal": f"{self.plan.illegal:#x}",
            "saved": f"{self.word:#x}",
            "traced_rip": None if self.traced_rip is None else f"{self.traced_rip:#x}",
            "vmcb12_before": self.template.hex(),
            "vmcb12_after": self.image.hex(),
        }


def field_of(image: bytes, name: str) -> int:
    """Return a field of a VMCB's image by the names of `VmcbView`."""
    place = place_of(name)
    value = int.from_bytes(image[place.offset : place.offset + place.size], "little")
    return value >> place.shift & place.mask


def attempts_of(plan: Plan, records: bytes) -> list[Attempt]:
    """Return the attempts that the loop recorded, in order."""
    found: list[Attempt] = []
    for at in range(0, len(records), RECORD_SIZE):
        image = records[at : at + VMCB_SIZE]
        record = race_record.from_buffer_copy(records, at + VMCB_SIZE)
        found.append(Attempt(plan, record, image, found[-1].image if found else None))
    return found


# What proves that two parts of one VMRUN saw different values


def l2_read_it(attempt: Attempt) -> str:
    """L2 read the illegal value from the register itself."""
    mask = attempt.plan.mask
    if attempt.reached_l2 and attempt.record.seen & mask == attempt.plan.illegal & mask:
        return f"L2 ran and read {attempt.record.seen:#x}"
    return ""


def exit_saved_it(attempt: Attempt) -> str:
    """#VMEXIT saved the illegal value, after the writer had written the legal one back."""
    mask = attempt.plan.mask
    if attempt.ran and attempt.word & mask == attempt.plan.illegal & mask:
        return f"L2 ran and its #VMEXIT saved {attempt.word:#x}"
    return ""


def refused_late(attempt: Attempt) -> str:
    """VMRUN passed the checks and failed afterwards: the state of L2 was loaded and saved again."""
    if attempt.refused and attempt.saved_state:
        return f"VMRUN failed after the checks, RFLAGS {field_of(attempt.image, 'rflags'):#x} saved"
    return ""


def third_value_saved(attempt: Attempt) -> str:
    """VMRUN failed after the checks: the field holds what neither writer nor template wrote."""
    mask = attempt.plan.mask | ~0xFFF & (1 << 52) - 1
    values = {attempt.plan.legal & mask, attempt.plan.illegal & mask}
    if attempt.refused and attempt.word & mask not in values:
        return f"VMRUN failed after the checks, which saved L1's value {attempt.word:#x}"
    return ""
