"""Who is at fault: the kernel (FAIL), the host or its set-up (ERROR), this harness (ERROR).

Standard library only: scenarios raise these inside a host.
"""

from __future__ import annotations


class NsvmError(Exception):
    """A failure with a one-line explanation, fit to be shown to the user as it is."""


class HostError(NsvmError):
    """The host or its set-up is at fault; this is not a verdict on KVM."""


class HostUnavailable(HostError):
    """The host cannot be had now, and asking again would end the same.

    There is no way to it, it lets nobody in, or another run has it.
    """


class HostLost(HostError):
    """The host died or stopped answering. `console` holds its last words.

    `silent`: an emulated host that hangs without a word from its kernel. That has a known cause in
    the emulation (static branches being patched under TCG), so it is worth one more try.
    `unreachable`: there was no connection any more, and nobody knows what became of the host.
    """

    def __init__(
        self,
        reason: str,
        console: str = "",
        *,
        silent: bool = False,
        unreachable: bool = False,
    ) -> None:
        super().__init__(reason)
        self.console = console
        self.silent = silent
        self.unreachable = unreachable


class HarnessError(NsvmError):
    """The harness itself is at fault."""


class ScenarioFailure(NsvmError):
    """KVM did what it must not."""


class Unsupported(NsvmError):
    """A fact that the scenario needs says no; the message is the evidence."""
