"""What devices outside the kernel hold: plain data that travels with the guest."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

from harness.machine.errors import MachineError


class StatefulDevice(Protocol):
    """A device that a guest changes."""

    def state(self) -> dict[str, Any]:
        """Return what must travel with the guest, for JSON."""

    def restore(self, state: dict[str, Any]) -> None:
        """Become what another one's `state` says; raises MachineError if it is malformed."""


@contextlib.contextmanager
def taking_state(what: str) -> Iterator[None]:
    """Say of which device a state is that turns out to be malformed.

    Raises MachineError: in this `with` something is missing, or of a wrong type or value.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise MachineError(f"{what}: malformed state ({type(e).__name__}: {e})") from None
