"""What is wrong with a fleet."""

from __future__ import annotations

from harness.errors import HostError


class FleetError(HostError):
    """An inventory that cannot be used, or Ansible itself; the message is one line."""
