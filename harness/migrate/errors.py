"""What can go wrong with a migration, sorted by who is at fault."""

from harness.errors import HostError, NsvmError


class StreamError(NsvmError):
    """A stream that is malformed, cut off or foreign; one line says what and where."""


class Refused(NsvmError):
    """The destination does not take a machine; one line says why. Nothing is left of it there."""


class LinkLost(HostError):
    """The way to the other side broke; the message says during what."""
