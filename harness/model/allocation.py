"""When nested state is allocated, and how much: the first slice of the model.

The unit is one vCPU. Sizes are those of the page allocator's blocks; slab objects do not change
with EFER.SVME. Sources: arch/x86/kvm/svm `svm_set_efer`, `svm_allocate_nested`, `svm_free_nested`;
the two series' posts for what came before and in between.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

PAGE_SIZE = 4096


class Policy(Enum):
    """The knob `allocation`: which design the kernel follows."""

    #: Up to 5.9: all of it with the vCPU, whether the guest ever nests or not.
    EAGER = "eager"
    #: Series v1: on EFER.SVME, with one more page that caches all of vmcb12.
    ON_DEMAND_V1 = "on-demand v1"
    #: 5.10 and later (series v5, commit 2fcf4876ada8): on EFER.SVME.
    ON_DEMAND = "on-demand"


@dataclass(frozen=True)
class Block:
    """One block of the page allocator: 4096 << order bytes."""

    what: str
    order: int

    @property
    def size_bytes(self) -> int:
        """Size in bytes."""
        return PAGE_SIZE << self.order


#: hsave page up to 5.10, vmcb02 from 5.13 on: the same size in the same place.
_VMCB = Block("vmcb02 (5.10: hsave page)", 0)
_MSRPM = Block("nested MSR permission map", 1)
_VMCB12_CACHE = Block("vmcb12 cache", 0)

NESTED_BLOCKS: dict[Policy, tuple[Block, ...]] = {
    Policy.EAGER: (_VMCB, _MSRPM),
    Policy.ON_DEMAND_V1: (_VMCB, _MSRPM, _VMCB12_CACHE),
    Policy.ON_DEMAND: (_VMCB, _MSRPM),
}


@dataclass(frozen=True)
class VcpuState:
    """One vCPU, as far as allocation goes. `allocated` is KVM's `nested.initialized`."""

    policy: Policy
    allocated: bool
    svme: bool = False
    smm: bool = False

    @property
    def nested_bytes(self) -> int:
        """Bytes of nested state that this vCPU holds now."""
        blocks = NESTED_BLOCKS[self.policy] if self.allocated else ()
        return sum(block.size_bytes for block in blocks)


def created(policy: Policy) -> VcpuState:
    """KVM_CREATE_VCPU: the eager design pays here."""
    return VcpuState(policy, allocated=policy is Policy.EAGER)


def set_svme(s: VcpuState, svme: bool, *, memory: bool = True) -> tuple[VcpuState, bool]:
    """Write EFER.SVME by any path; return the new state and whether the write took effect.

    Set: allocates unless that was done, and without `memory` changes nothing. Cleared: frees, but
    not in SMM, where entry clears SVME and RSM brings it back. Source: `svm_set_efer`.
    """
    if svme == s.svme:
        return s, True
    if svme:
        if not s.allocated and not memory:
            return s, False
        return replace(s, svme=True, allocated=True), True
    keep = s.policy is Policy.EAGER or s.smm
    return replace(s, svme=False, allocated=s.allocated and keep), True


def delta_bytes(policy: Policy) -> int:
    """Bytes per vCPU that setting EFER.SVME adds."""
    off = created(policy)
    on, _ = set_svme(off, True)
    return on.nested_bytes - off.nested_bytes


def policy_of(delta: int) -> Policy | None:
    """Return the policy whose delta this is; None is a finding: no known design fits."""
    return next((policy for policy in Policy if delta_bytes(policy) == delta), None)
