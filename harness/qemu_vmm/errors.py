"""What went wrong with QEMU itself."""

from __future__ import annotations

from harness.errors import HostLost


class VmmLost(HostLost):
    """What runs a guest failed, or somebody killed it: no word on KVM, nor on the guest."""
