"""Where a stream comes from, and whether another kernel can take it at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Final

from harness.migrate.errors import Refused, StreamError
from harness.migrate.offers import offers
from harness.migrate.sections import shortened
from kvm_ioctl.handles import Kvm

ARCHITECTURE: Final = "x86_64"


def fingerprint(kvm: Kvm) -> dict[str, Any]:
    """Return what the reader of a stream should know of the writer's kernel."""
    return {
        "architecture": os.uname().machine,
        "kernel": os.uname().release,
        "capabilities": {cap.name: value for cap, value in offers(kvm).capabilities.items()},
    }


def check(found: object) -> Mapping[str, Any]:
    """Look whether a stream can be for this machine at all; return its fingerprint.

    Raises StreamError: malformed.
    Raises Refused: of another architecture.
    """
    if not isinstance(found, dict) or set(found) != {"architecture", "kernel", "capabilities"}:
        raise StreamError("header: the fingerprint is malformed")
    architecture, kernel, offered = (found[k] for k in ("architecture", "kernel", "capabilities"))
    if not isinstance(architecture, str) or not isinstance(kernel, str):
        raise StreamError("header: the fingerprint's architecture or kernel is no text")
    if not isinstance(offered, dict) or not all(type(value) is int for value in offered.values()):
        raise StreamError("header: the fingerprint's capabilities are no numbers")
    if architecture != ARCHITECTURE:
        raise Refused(f"a machine of architecture {shortened(repr(architecture))}")
    return found
