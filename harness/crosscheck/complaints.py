"""What kernels are known to complain of in their log, and which operations make them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from harness.model import layout
from harness.model.operations import (
    Execute,
    Instruction,
    Operation,
    SetNestedState,
    SetSlot,
    StepRsm,
)
from kvm_ioctl.asm_kvm import NestedStateFlags

_MAPPED: Final = (layout.VMCB_A_GPA, layout.VMCB_B_GPA)


@dataclass(frozen=True)
class Complaint:
    """A WARN, or an oops, that has a name."""

    id: str
    what: str
    source: str
    line: str
    """An expression that is found in the first line of what the kernel says, or in its console."""
    provoked_by: Callable[[Operation], bool]
    """Tells an operation without which it would be another one."""


def _takes_vmcb12_away(operation: Operation) -> bool:
    if isinstance(operation, SetSlot):
        return operation.what in ("vmcb_a", "vmcb_b") and not operation.present
    return isinstance(operation, SetNestedState) and operation.vmcb_pa not in _MAPPED


def _restores_guest_mode(operation: Operation) -> bool:
    guest_mode = NestedStateFlags.KVM_STATE_NESTED_GUEST_MODE
    return isinstance(operation, SetNestedState) and bool(operation.flags & guest_mode)


def _executes_rsm(operation: Operation) -> bool:
    rsm = isinstance(operation, Execute) and operation.instruction is Instruction.RSM
    return rsm or isinstance(operation, StepRsm)


COMPLAINTS: Final = (
    Complaint(
        "warn-vmcb12-away-at-smi",
        "WARN when an SMI ends L2 and vmcb12 has no memory: a #GP is queued while events are"
        " injected",
        "kvm_check_and_inject_events(), nested_svm_vmexit() (6.12): exception.pending",
        r"WARNING: .* kvm_check_and_inject_events\+",
        _takes_vmcb12_away,
    ),
    Complaint(
        "warn-gp-intercept-of-l1-kept",
        "WARN at a #GP that L1 does not intercept, after KVM_SET_NESTED_STATE in guest mode",
        "svm_set_nested_state() of 5.10 keeps vmcb's control area as L0's own before it leaves L2:"
        " L1's intercepts are L0's from then on, and gp_interception() has none to expect",
        r"WARNING: .* gp_interception\+",
        _restores_guest_mode,
    ),
    Complaint(
        "warn-failed-rsm-ends-l2",
        "WARN when RSM has entered L2 and then fails, and L1 intercepts the shutdown",
        "svm_leave_smm() sets nested_run_pending, emulator_leave_smm() asks for a triple fault,"
        " nested_svm_vmexit() warns of a #VMEXIT before the entry",
        r"WARNING: .* nested_svm_vmexit\+",
        _executes_rsm,
    ),
)
"""All that are known."""

DEATHS: Final = (
    Complaint(
        "host-lost-without-nested-mmu",
        "the host jumps to address 0 after KVM_SET_NESTED_STATE for L2 with nested paging",
        "svm_set_nested_state() of 5.10 leaves walk_mmu->gva_to_gpa unset, which"
        " kvm_fetch_guest_virt() calls when KVM decodes or skips an instruction of L2",
        r"RIP: 0010:0x0\n(?s:.*)\bkvm_fetch_guest_virt\+",
        _restores_guest_mode,
    ),
)
"""What ends the whole host, by its console; its sequence is as good as done."""


def known_death(console: str, operations: Sequence[Operation]) -> Complaint | None:
    """Return what a host died of in a sequence, or None: a finding."""
    return next(
        (
            each
            for each in DEATHS
            if re.search(each.line, console) and any(map(each.provoked_by, operations))
        ),
        None,
    )


def known_complaint(lines: Sequence[str], operations: Sequence[Operation]) -> Complaint | None:
    """Return what a kernel complained of in a sequence, or None: a finding."""
    for each in COMPLAINTS:
        if all(re.search(each.line, line) for line in lines) and any(
            map(each.provoked_by, operations)
        ):
            return each
    return None
