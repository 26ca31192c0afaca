"""One cell of the matrix: what is interrupted, what is changed, and the operations that do it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from harness.model import layout
from harness.model.operations import (
    Execute,
    Instruction,
    Operation,
    Resume,
    SetCpuid,
    SetMsr,
    SetNestedState,
    SetSregs,
    Smi,
    StepRsm,
    WriteVmcb,
)
from harness.svm.msrs import Cr0, Efer, Msr
from harness.svm.vmcb import NestedCtl, SegAttrib

EFER_SVME: Final = int(layout.EFER_ON.replace(SVME=1))

_CODE_32: Final = SegAttrib.of(G=1, DB=1, P=1, S=1, TYPE=11)
_GUEST_MODE_AND_GIF: Final = 0x101


class Start(Enum):
    """What the SMI interrupts."""

    PLAIN = "L1 without SVME"
    L1 = "L1"
    L2 = "L2"
    """With shadow paging: `nested_ctl` is 0."""
    L2_NPT = "L2 npt"
    L2_NO_SVM = "L2 without CPUID SVM"
    """Brought there by KVM_SET_NESTED_STATE, for VMRUN would be #UD."""
    LEGACY = "32-bit L1"
    """CPUID without LM, 32-bit protected mode without paging."""
    LEGACY_L2 = "L2 without CPUID LM"


@dataclass(frozen=True)
class Cell:
    """One thing that is changed, in one context."""

    group: str
    start: Start
    what: str
    """The change in words; unique in its group and start."""
    tampering: Sequence[Operation]
    """Done in SMM, before RSM."""
    before: Sequence[Operation] = ()
    """Done first of all: CPUID, vmcb12."""
    stepped: bool = True
    """RSM is stopped behind, see `StepRsm`; without, the guest goes on within the same KVM_RUN."""

    goes_on: bool = True
    """The vCPU is run after a `StepRsm`; not where QEMU 7.2 would abort."""

    @property
    def name(self) -> str:
        """`efer[L2: ^ SVME]`."""
        return f"{self.group}[{self.start.value}: {self.what}]"

    def into_smm(self) -> list[Operation]:
        """Return what leads into SMM."""
        return [*self.before, *_START[self.start], Smi(), Resume()]

    def rsm(self) -> list[Operation]:
        """Return RSM, and what shows where the vCPU is then."""
        if not self.stepped:
            return [_RSM]
        return [StepRsm(), Resume()] if self.goes_on else [StepRsm()]


AFTER_L2: Final = Execute(Instruction.VMMCALL)
"""Done where RSM has come back to L2: #VMEXIT, so that L1's state is used."""
AFTER_L1: Final = Execute(Instruction.NOP)
"""Done where L1 runs, in the end."""

_RSM: Final = Execute(Instruction.RSM)


def _write_efer(value: int) -> Execute:
    return Execute(Instruction.WRMSR, rcx=Msr.MSR_EFER, rax=value & 0xFFFF_FFFF, rdx=value >> 32)


_SVME: Final = (SetMsr(Msr.MSR_VM_HSAVE_PA, layout.HSAVE_GPA), _write_efer(EFER_SVME))
_VMRUN: Final = Execute(Instruction.VMRUN, rax=layout.VMCB_A_GPA)
_NPT: Final = WriteVmcb("a", {"control.nested_ctl": int(NestedCtl.of(NP_ENABLE=1))})
_FORCED_L2: Final = (
    SetMsr(Msr.MSR_VM_HSAVE_PA, layout.HSAVE_GPA),
    SetMsr(Msr.MSR_EFER, EFER_SVME),
    SetNestedState(_GUEST_MODE_AND_GIF, vmcb_pa=layout.VMCB_A_GPA),
)
_TO_32_BIT: Final = SetSregs(
    {"efer": 0, "cr0": int(Cr0.of(PE=1, ET=1, NE=1)), "cr4": 0, "cs.attrib": int(_CODE_32)}
)

_START: Final[dict[Start, Sequence[Operation]]] = {
    Start.PLAIN: (),
    Start.L1: _SVME,
    Start.L2: (*_SVME, _VMRUN),
    Start.L2_NPT: (*_SVME, _NPT, _VMRUN),
    Start.L2_NO_SVM: (SetCpuid("svm", False), *_FORCED_L2),
    Start.LEGACY: (SetCpuid("lm", False), _TO_32_BIT),
    Start.LEGACY_L2: (SetCpuid("lm", False), *_FORCED_L2),
}

EFER_OF: Final = {
    Start.PLAIN: int(layout.EFER_ON),
    Start.L1: EFER_SVME,
    Start.L2: EFER_SVME,
    Start.L2_NPT: EFER_SVME,
    Start.L2_NO_SVM: EFER_SVME,
}
"""EFER that an SMI saves, where there is a field for it."""

LMA: Final = int(Efer.LMA.mask)
