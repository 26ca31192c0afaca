"""What a cross-check does, and what comes of it: the words that the model and a machine share.

An operation is done by the host (an ioctl, a write to the guest's memory), or it is an instruction
that the vCPU executes wherever it is: in L1, in L2 or in SMM. The guest holds no program of its
own. Before an `Execute` the host points RIP at the instruction, which is followed by a report to
the host (OUT); exceptions go to handlers that report their vector. So every sequence of operations
is a legal one, whatever state the ones before have left.

Every operation and every observation is plain data: it can be written as JSON and repeated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Final


class Instruction(Enum):
    """What a vCPU can be told to execute; registers are those that the instruction reads."""

    NOP = "nop"
    CPUID = "cpuid"
    RDMSR = "rdmsr"
    WRMSR = "wrmsr"
    VMRUN = "vmrun"
    VMMCALL = "vmmcall"
    VMLOAD = "vmload"
    VMSAVE = "vmsave"
    STGI = "stgi"
    CLGI = "clgi"
    HLT = "hlt"
    RSM = "rsm"
    UD2 = "ud2"


@dataclass(frozen=True)
class Execute:
    """One instruction in the current context, at CPL 0 unless `user`; with RFLAGS.TF if `trap`."""

    instruction: Instruction
    rax: int = 0
    rcx: int = 0
    rdx: int = 0
    user: bool = False
    trap: bool = False


@dataclass(frozen=True)
class Resume:
    """KVM_RUN where the vCPU stands; with `immediate` it returns before the guest is entered."""

    immediate: bool = False


@dataclass(frozen=True)
class SetMsr:
    """KVM_SET_MSRS of one MSR."""

    index: int
    value: int


@dataclass(frozen=True)
class SetSregs:
    """KVM_SET_SREGS of what KVM_GET_SREGS gave, with some registers changed.

    `efer`, `cr4`, ..., and `cs.attrib` as the VMCB packs it.
    """

    changes: Mapping[str, int]


@dataclass(frozen=True)
class SetCpuid:
    """KVM_SET_CPUID2 with a feature of the guest taken away or given back: `svm`, `lm`, `npt`."""

    feature: str
    on: bool


@dataclass(frozen=True)
class GetNestedState:
    """KVM_GET_NESTED_STATE with a buffer of `size` bytes."""

    size: int = 4224


@dataclass(frozen=True)
class SetNestedState:
    """KVM_SET_NESTED_STATE.

    The data is the template's: a legal control area and L1's save area, with fields changed by the
    names of the VMCB (`control.asid`, `save.cr0`); in place of it `kept` gives back what the last
    KVM_GET_NESTED_STATE gave.
    """

    flags: int
    format: int = 1
    size: int = 4224
    vmcb_pa: int = 0
    changes: Mapping[str, int] = field(default_factory=dict)
    kept: bool = False


@dataclass(frozen=True)
class SetSmm:
    """KVM_SET_VCPU_EVENTS of what KVM_GET_VCPU_EVENTS gave, with `smi.smm` changed."""

    on: bool


@dataclass(frozen=True)
class Smi:
    """KVM_SMI. It is delivered by the next KVM_RUN, if then."""


@dataclass(frozen=True)
class Init:
    """INIT comes: KVM_SET_VCPU_EVENTS with `smi.latched_init`. The next KVM_RUN takes it, if then.

    It needs a local APIC in the kernel, which a machine has if its sequence has one of these; HLT
    does not end KVM_RUN there.
    """


@dataclass(frozen=True)
class WriteVmcb:
    """The host writes fields of a vmcb12 in the guest's memory."""

    vmcb: str
    """`a` or `b`."""
    changes: Mapping[str, int]


@dataclass(frozen=True)
class WriteSaveArea:
    """The host writes fields of the SMRAM state save area, by the names of `harness.svm.smram`."""

    changes: Mapping[str, int]
    legacy: bool = False
    """Of the legacy form (`kvm_smram_state_32`), which a guest without long mode has."""


@dataclass(frozen=True)
class WriteHostSave:
    """The host writes fields of the page at the layout's `hsave`, by the names of the VMCB."""

    changes: Mapping[str, int]


@dataclass(frozen=True)
class StepRsm:
    """RSM in SMM, and nothing that would come after it: KVM_GUESTDBG_SINGLESTEP stops there.

    The result is `stepped`, also where RSM has failed and what comes of that is still pending. Then
    `Outcome.seen` has the registers that RSM has loaded, as `after.rip`, `after.cs.attributes`, ...
    """


@dataclass(frozen=True)
class SetSlot:
    """KVM_SET_USER_MEMORY_REGION: a part of memory is taken away or put back.

    Its content is kept. `what` is a name of the layout: `vmcb_a`, `hsave`, `msrpm`, `smram`...
    """

    what: str
    present: bool


Operation = (
    Execute
    | Resume
    | SetMsr
    | SetSregs
    | SetCpuid
    | GetNestedState
    | SetNestedState
    | SetSmm
    | Smi
    | Init
    | WriteVmcb
    | WriteSaveArea
    | WriteHostSave
    | StepRsm
    | SetSlot
)

OPERATIONS: Final[tuple[type, ...]] = Operation.__args__
"""Every kind of operation."""

Value = int | str | bool | None


@dataclass(frozen=True)
class Outcome:
    """What an operation answered, and all that can be seen after it."""

    result: str
    """`ok`; an ioctl's errno (`EINVAL`); how KVM_RUN ended: `report` (the instruction was executed
    and the guest reported), `#GP`... (a handler reported), `shutdown`, `hlt`, `internal error`,
    `intr` (immediate_exit), `fail entry`, `run: ENOMEM` (its errno), `hang` (its deadline). A model
    also says `unknown` (it cannot tell; nothing is predicted from there on) and `over` (the vCPU
    cannot be run any more)."""
    seen: Mapping[str, Value] = field(default_factory=dict)
    """By name: `efer`, `gif`, `guest_mode`, `run_pending`, `vmcb_pa`, `smm`, `smi_pending`,
    `nested_bytes`, `rip`..., `nested.control.asid`, `vmcb_a.control.exit_code`, ... A model leaves
    out what it cannot know; only what both have is compared."""
