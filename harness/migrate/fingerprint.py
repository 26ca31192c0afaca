"""Where a stream comes from, and whether another kernel can take it at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Final

from harness.migrate.errors import Refused, StreamError
from kvm_ioctl.capabilities import Cap
from kvm_ioctl.handles import Kvm

ARCHITECTURE: Final = "x86_64"

CAPABILITIES: Final = (
    Cap.KVM_CAP_NESTED_STATE,
    Cap.KVM_CAP_X86_SMM,
    Cap.KVM_CAP_XSAVE2,
    Cap.KVM_CAP_SREGS2,
    Cap.KVM_CAP_XCRS,
    Cap.KVM_CAP_EXCEPTION_PAYLOAD,
    Cap.KVM_CAP_X86_TRIPLE_FAULT_EVENT,
    Cap.KVM_CAP_TSC_CONTROL,
    Cap.KVM_CAP_VCPU_ATTRIBUTES,
)
"""Those that decide what of a machine can be given and taken."""


def fingerprint(kvm: Kvm) -> dict[str, Any]:
    """Return what the reader of a stream should know of the writer's kernel."""
    return {
        "architecture": os.uname().machine,
        "kernel": os.uname().release,
        "capabilities": {cap.name: kvm.check_extension(cap) for cap in CAPABILITIES},
    }


def check(found: Mapping[str, Any]) -> None:
    """Look whether a stream can be for this machine at all.

    Raises StreamError: malformed.
    Raises Refused: of another architecture.
    """
    if not isinstance(found, dict) or not isinstance(found.get("capabilities"), dict):
        raise StreamError("header: the fingerprint is malformed")
    if found.get("architecture") != ARCHITECTURE:
        raise Refused(f"a machine of architecture {found.get('architecture')!r}")
