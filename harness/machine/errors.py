"""What can go wrong with a machine, sorted by who is at fault."""

from harness.errors import HarnessError, NsvmError


class MachineError(HarnessError):
    """A machine was asked for something that it cannot do."""


class GuestMemoryError(MachineError):
    """An access or a slot that the guest's memory does not have; names gpa and slot."""


class ImageError(NsvmError):
    """A guest image that cannot be loaded; one line says why."""
