"""What can be seen of a vCPU and its guest between two operations, by name.

`LEFT_OUT` says what a machine shows that is not predicted, and why.
"""

from __future__ import annotations

from typing import Final

from harness.model.areas import SMRAM_64, VMCB
from harness.model.crs import in_real_mode
from harness.model.memory import UNKNOWN
from harness.model.nested_state import flags, is_offered, saved_l1, size_bytes
from harness.model.operations import Value
from harness.model.state import State
from harness.svm.smram import SMRAM_STATE_OFFSET
from kvm_ioctl.asm_kvm import NestedFormat

LEFT_OUT: Final = {
    "nested.save.{fs,gs,ldtr,tr,star,...}": "VMLOAD/VMSAVE state: the CPU's, never vmcb12's",
    "nested.save.{cr2,dr6,dr7,g_pat,...}": "what vmcb01 happens to hold; KVM neither sets nor "
    "reads it there",
    "nested.save.*dtr.{selector,attrib}": "no meaning; the CPU writes what it likes",
    "rip in a handler, in SMM and at CPL 3": "belongs to the machine's code, not to the layout",
    "rax and others after CPUID and most MSRs": "the host's CPU",
    "exit_info_1, exit_info_2 of exceptions and I/O": "the CPU's; undefined for most exceptions",
    "smram.{fs,gs,ldtr,tr}": "VMLOAD/VMSAVE state",
    "smram in its 32-bit form": "a machine shows the area in its 64-bit form only",
    "the fields that VMSAVE writes": "VMLOAD/VMSAVE state",
}
"""What is not predicted, and why."""

STALE_ROOT: Final = "stale_root"
"""Predicted where L1 goes on by a root of page tables that may not serve it, see `roots`."""

_REGISTERS: Final = ("efer", "cr0", "cr3", "cr4", "rax")


def seen(s: State) -> dict[str, Value]:
    """Return all that is predicted to be seen now; of a dead VM, only the guest's memory."""
    found: dict[str, Value] = {}
    if not s.dead:
        found |= {name: s.regs[name] for name in _REGISTERS}
        if not in_real_mode(s):
            found["rip"] = s.regs["rip"]
        found |= {"smm": s.smm, "smi_pending": s.smi_pending, "init_pending": s.init_pending}
        found["nested_bytes"] = s.nested.nested_bytes
        if is_offered(s):
            found |= _nested_state(s)
    if s.stale_root:
        # No machine shows it. It is why one that hangs has a name (`harness.crosscheck`).
        found[STALE_ROOT] = True
    return {name: value for name, value in found.items() if value != UNKNOWN} | _memory(s)


def _nested_state(s: State) -> dict[str, Value]:
    found: dict[str, Value] = {
        "gif": s.gif,
        "guest_mode": s.guest_mode,
        "run_pending": s.run_pending,
        "vmcb_pa": s.vmcb12_gpa if s.guest_mode else 0,
        "nested.flags": flags(s),
        "nested.format": int(NestedFormat.KVM_STATE_NESTED_FORMAT_SVM),
        "nested.size": size_bytes(s),
    }
    if s.guest_mode:
        found |= {f"nested.control.{name}": value for name, value in s.control.items()}
        found |= {f"nested.save.{name}": value for name, value in saved_l1(s).items()}
    return found


def _memory(s: State) -> dict[str, Value]:
    found: dict[str, Value] = {}
    for slot in ("vmcb_a", "vmcb_b", "hsave"):
        found |= s.memory.shown(slot, VMCB)
    if s.smram_is_64:
        found |= s.memory.shown("smram", SMRAM_64, SMRAM_STATE_OFFSET)
    if not s.facts.npt_on_l0:
        # svm_set_efer() then runs L1 with EFER.NX set, and an SMI in L2 saves what L1 runs with.
        found.pop("hsave.save.efer", None)
    return found
