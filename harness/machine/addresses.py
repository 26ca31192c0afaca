"""Addresses that say whose they are."""

from typing import NewType

Gpa = NewType("Gpa", int)
"""Guest-physical address (of L1, unless the name says another level)."""

Gva = NewType("Gva", int)
"""Guest-virtual address: what the vCPU's own paging translates."""

Hva = NewType("Hva", int)
"""Address in this process."""
