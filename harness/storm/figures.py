"""A migration in numbers, for reports."""

from __future__ import annotations

from typing import Any

from harness.migrate.live import Sent
from harness.migrate.state import Parts
from kvm_ioctl.asm_kvm import NestedStateFlags, kvm_nested_state


def figures(sent: Sent) -> dict[str, Any]:
    """Return what a move took (seconds, bytes), and how many vCPUs it caught doing what."""
    flags = [_nested_flags(parts) for parts in sent.state.vcpus]
    return {
        "downtime_s": sent.downtime_s,
        "bytes": sent.size_bytes,
        "rounds": len(sent.rounds),
        "in_guest_mode": sum(NestedStateFlags.KVM_STATE_NESTED_GUEST_MODE in f for f in flags),
        "run_pending": sum(NestedStateFlags.KVM_STATE_NESTED_RUN_PENDING in f for f in flags),
    }


def _nested_flags(vcpu: Parts) -> NestedStateFlags:
    """Return the flags of a vCPU's nested state; none where KVM has no such state."""
    data = vcpu.get("nested")
    return NestedStateFlags(kvm_nested_state.from_bytes(data).flags if data else 0)
