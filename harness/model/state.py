"""The state of one vCPU and its guest, as far as nested SVM goes.

It is changed in place, by the functions of the modules beside; `Model` copies it where that counts.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field
from typing import Final

from harness.model import layout
from harness.model.allocation import Policy, VcpuState, created
from harness.model.areas import CONTROL, SEG, VMRUN_STATE
from harness.model.errors import ModelBug
from harness.model.facts import CpuFacts
from harness.model.knobs import Knobs
from harness.model.memory import UNKNOWN, Memory
from harness.svm.intercepts import Intercept
from harness.svm.msrs import Cr0, Cr4, Efer
from harness.svm.smram import DEFAULT_SMBASE

NO_GPA: Final = 0xFFFF_FFFF_FFFF_FFFF
"""The kernel's INVALID_GPA."""

IOIO_EXIT: Final = 0x7B
"""The exit code that a report leaves in vmcb02 (SVM_EXIT_IOIO)."""

_IN_VMCB: Final = (*SEG, "gdtr.base", "gdtr.limit", "idtr.base", "idtr.limit", "rflags")
"""Registers that live in the current VMCB: after a forced leave they are vmcb01's."""


@dataclass
class Kept:
    """The data that the last KVM_GET_NESTED_STATE gave."""

    control: dict[str, int] = field(default_factory=dict)
    save: dict[str, int] = field(default_factory=dict)


@dataclass
class State:
    """Everything about one vCPU; `regs` are those of the current context, L1, L2 or SMM."""

    knobs: Knobs
    facts: CpuFacts
    memory: Memory
    regs: dict[str, int]
    nested: VcpuState
    """Allocation, EFER.SVME and SMM. `nested.allocated` is KVM's `nested.initialized`."""

    gif: bool = True
    l1_gif: bool = True
    """GIF when guest mode was entered by VMRUN or KVM_SET_NESTED_STATE."""
    guest_mode: bool = False
    run_pending: bool = False
    pages_pending: bool = False
    smi_pending: bool = False
    init_pending: bool = False
    triple_fault: bool = False
    vmcb12_gpa: int = 0
    anchor: int = NO_GPA
    """`last_vmcb12_gpa`: the vmcb12 whose clean bits are believed."""
    hsave_msr: int = 0
    smbase: int = DEFAULT_SMBASE
    control: dict[str, int] = field(default_factory=dict)
    """The control area of vmcb12 as KVM has it cached."""
    save_cache: dict[str, int] = field(default_factory=dict)
    """Series v1: the save area of vmcb12 as KVM has it cached."""
    l1: dict[str, int] = field(default_factory=dict)
    """L1's state while L2 runs: vmcb01's save area, or the hsave page."""
    vmcb02: dict[str, int] = field(default_factory=dict)
    """What vmcb02 holds of L2 while L1 runs: what clean bits leave there."""
    next_rip_given: bool = False
    """A next_rip other than 0 has come into guest mode without VMRUN."""
    l1_shadow: bool = False
    """RSM has put L1 into an interrupt shadow, which its next instruction ends."""
    shadow_by_rsm: int | None = None
    """L2's interrupt shadow where RSM has set another one than vmcb12's, until L2 runs."""
    recalc_pending: bool = True
    """The next entry computes KVM's own intercepts of L1 anew (KVM_REQ_RECALC_INTERCEPTS)."""
    stgi_open: bool = False
    """KVM has dropped its intercept of STGI, though EFER.SVME may be clear."""
    l2_exit_code: int = UNKNOWN
    """The exit code of L2's last exit to KVM."""
    kept: Kept = field(default_factory=Kept)
    after_run: dict[str, int] = field(default_factory=dict)
    """Registers that the next entry of the guest changes by itself."""
    tr_serves: bool = True
    """Whether TR still is the layout's, so that exceptions at CPL 3 find a stack."""
    smram_is_64: bool = True
    """Which form the save area in SMRAM has."""
    l1_root: bool = False
    """vmcb01 has a root of page tables that lives and maps L1's code, see `roots`."""
    stale_root: bool = False
    """L1 goes on by another root than that, and may do so for ever."""
    ran: bool = False
    dead: bool = False
    """The VM is dead: EIO from everything."""
    over: str = ""
    """Why the vCPU cannot be run any more; empty if it can."""

    def copy(self) -> State:
        """Return an independent state."""
        other = copy(self)
        other.memory = self.memory.copy()
        for name in ("regs", "control", "save_cache", "l1", "vmcb02", "after_run"):
            setattr(other, name, dict(getattr(self, name)))
        return other

    @property
    def smm(self) -> bool:
        """Whether the vCPU is in SMM."""
        return self.nested.smm

    @property
    def svme(self) -> bool:
        """EFER.SVME."""
        return bool(Efer(self.regs["efer"]).SVME)

    @property
    def allocated(self) -> bool:
        """Whether nested state is allocated."""
        return self.nested.allocated

    @property
    def paging(self) -> bool:
        """CR0.PG."""
        return bool(Cr0(self.regs["cr0"]).PG)

    @property
    def long_mode(self) -> bool:
        """EFER.LMA."""
        return bool(Efer(self.regs["efer"]).LMA)

    @property
    def pae_paging(self) -> bool:
        """CR0.PG and CR4.PAE outside of long mode, as KVM sees it (`is_pae_paging()`)."""
        return self.paging and bool(Cr4(self.regs["cr4"]).PAE) and not self.long_mode

    def l1_intercepts(self, intercept: Intercept) -> bool:
        """Tell whether L1 intercepts something in L2, by the cached vmcb12."""
        return bool(self.control.get(f"intercepts.{int(intercept.word)}", 0) & intercept.mask)

    def l1_intercepts_exception(self, vector: int) -> bool:
        """Tell whether L1 intercepts an exception in L2."""
        return bool(self.control.get("intercepts.2", 0) >> vector & 1)

    @property
    def l2_int_state(self) -> int:
        """int_state of vmcb02."""
        given = self.shadow_by_rsm
        return self.control["int_state"] if given is None else given

    def keep_vmcb02(self) -> None:
        """Note what L2 leaves in vmcb02."""
        self.vmcb02 = {name: self.regs[name] for name in (*_IN_VMCB, "dr7")}

    def switch_to_vmcb01(self) -> None:
        """Make what lives in a VMCB L1's (`svm_switch_vmcb()`)."""
        self.keep_vmcb02()
        self.regs |= {name: self.l1.get(name, self.regs[name]) for name in _IN_VMCB}

    def check(self) -> None:
        """Check the invariants.

        Raises ModelBug: one does not hold.
        """
        broken = [what for what, holds in self._invariants() if not holds]
        if broken:
            raise ModelBug(f"the model's state is impossible: {'; '.join(broken)}")

    def _invariants(self) -> list[tuple[str, bool]]:
        eager = self.nested.policy is Policy.EAGER
        # An RSM that checks little can go into an L2 whose EFER has not got it.
        strict = self.knobs.smm_checks in ("svme", "svme and vmcb12")
        checked = strict and self.knobs.rsm_checks != "lenient"
        return [
            ("EFER.SVME is what allocation thinks", self.svme == self.nested.svme),
            ("SVME without nested state", self.allocated or not self.svme),
            ("eager, but nothing allocated", self.allocated or not eager),
            ("guest mode without SVME", self.svme or not self.guest_mode or not checked),
            ("guest mode in SMM", not (self.guest_mode and self.smm)),
            ("a VMRUN in flight without guest mode", self.guest_mode or not self.run_pending),
            ("pages are wanted without guest mode", self.guest_mode or not self.pages_pending),
            ("an anchor without nested state", self.allocated or self.anchor == NO_GPA),
            ("guest mode without a control area", bool(self.control) or not self.guest_mode),
        ]


def fresh(knobs: Knobs, facts: CpuFacts) -> State:
    """Return a vCPU as it stands before the first operation, in 64-bit mode."""
    first = layout.l1_save()
    others = {"cpl": 0, "cr2": 0, "rax": 0, "rbx": 0, "rcx": 0, "rdx": UNKNOWN}
    others["arch_dr7"] = layout.DR7_RESET
    return State(
        knobs=knobs,
        facts=facts,
        memory=Memory(),
        regs=others | {name: first.get(name, 0) for name in VMRUN_STATE} | first,
        nested=created(knobs.allocation),
        control=dict.fromkeys(CONTROL, 0),
    )
