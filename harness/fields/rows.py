"""What a cell came to, beside what was predicted; plain data on both sides of the host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, Self

ENTERED: Final = "entered"
EARLY: Final = "refused"
"""By KVM's checks, before anything of L2 is loaded."""
LATE: Final = "refused late"
"""When L2's state was loaded: by KVM, or by the CPU that was to run vmcb02."""
STOPPED: Final = "stopped"
"""It passed the checks, and nothing came back to L1."""
LOST: Final = "host lost"
"""The host died of it, or fell silent."""

TAKEN: Final = "ok"
"""What KVM_SET_NESTED_STATE answers when it takes a state; else it is an errno's name."""


@dataclass(frozen=True)
class Predicted:
    """What the model, and the manual, say of one vmcb12."""

    vmrun: str
    """ENTERED, EARLY, LATE or STOPPED."""
    why: tuple[str, ...]
    """The checks that refuse it, or what stops it."""
    set_state: str
    """TAKEN or `EINVAL`."""
    apm: tuple[str, ...]
    """Why a CPU must refuse it, by the manual; nothing: the manual does not say that it must."""


@dataclass(frozen=True)
class Row:
    """One cell."""

    field: str
    value: str
    changes: Mapping[str, int]
    predicted: Predicted
    vmrun: str
    """ENTERED, EARLY, LATE, STOPPED or LOST."""
    how: str
    """The exit code in words, or how KVM_RUN ended."""
    set_state: str
    late_is_told: bool = True
    """This kernel lets EARLY and LATE be told apart; else both are EARLY in `vmrun`."""

    @property
    def refused(self) -> bool:
        """VMRUN gave VMEXIT_INVALID."""
        return self.vmrun in (EARLY, LATE)

    @property
    def expected(self) -> str:
        """What `vmrun` is if the model is right."""
        late = self.predicted.vmrun == LATE
        return EARLY if late and not self.late_is_told else self.predicted.vmrun

    def differences(self) -> list[str]:
        """Return in words where the kernel did something else than the model says."""
        found = []
        if self.vmrun != self.expected:
            why = f" ({', '.join(self.predicted.why)})" if self.predicted.why else ""
            found.append(f"VMRUN: expected {self.expected}{why}, saw {self.vmrun} ({self.how})")
        if self.set_state != self.predicted.set_state:
            found.append(
                f"KVM_SET_NESTED_STATE: expected {self.predicted.set_state}, saw {self.set_state}"
            )
        return found

    def from_the_manual(self) -> str | None:
        """Return in words how the kernel, with its CPU, departs from the manual; None: it does not.

        What the kernel refuses and the manual does not speak of counts too.
        """
        must, why = ", ".join(self.predicted.apm), ", ".join(self.predicted.why)
        if must and not self.refused:
            ended = "" if self.vmrun == ENTERED else f", and L1 does not go on ({why or self.how})"
            return f"must be refused: {must}{ended}"
        if self.refused and not must:
            return f"is refused: {why or self.how}"
        return None if self.vmrun == ENTERED or must else f"ends L1: {why or self.how}"

    def shown(self) -> str:
        """Return field, value and the numbers that were written."""
        written = ", ".join(f"{name}={value:#x}" for name, value in self.changes.items())
        return f"{self.field}, {self.value} [{written}]"

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Return what `to_json` gave."""
        said = data["predicted"]
        predicted = Predicted(
            said["vmrun"], tuple(said["why"]), said["set_state"], tuple(said["apm"])
        )
        return cls(**{**data, "predicted": predicted})
