"""What can go wrong with a migration, sorted by who is at fault."""

from harness.errors import HostError, NsvmError


class StreamError(NsvmError):
    """A stream that is malformed, cut off or foreign; one line says what and where."""


class Refused(NsvmError):
    """The destination does not take a machine; one line says why. Nothing is left of it there."""


class LinkLost(HostError):
    """The way to the other side broke; the message says during what."""


class Cancelled(NsvmError):
    """Somebody asked for the migration to be stopped; the source goes on as if it had not begun."""


class HandoverUnknown(HostError):
    """The machine was given away, and nobody said that it was taken; the source stays paused.

    The source has said COMMIT and heard nothing more. Whether the destination runs cannot be found
    out over a link that is dead: each further acknowledgement would have the same gap after it (the
    two generals' problem). Of the two mistakes that are left, a machine that runs twice destroys
    what it works on, one that stands still does not. So whoever looks at the destination and finds
    nothing there calls `machine.resume()`, whoever finds it running closes the source.
    """
