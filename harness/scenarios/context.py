"""What a scenario is given: a KVM, machines closed behind it, and a way to say what it saw."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import cached_property
from typing import Any, Self, TypeVar

from harness.errors import ScenarioFailure
from harness.scenarios.case import FRESH
from kvm_ioctl.handles import Kvm

T = TypeVar("T")
Emit = Callable[..., None]


class Context:
    """One run of one case. A context manager: what was entered through it is left with it."""

    def __init__(self, emit: Emit, lifecycle: str = FRESH) -> None:
        self.lifecycle = lifecycle
        """What machines go through, see `case.LIFECYCLES`."""
        self._emit = emit
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @cached_property
    def kvm(self) -> Kvm:
        """The host's /dev/kvm."""
        return self._stack.enter_context(Kvm())

    def enter(self, manager: Any) -> Any:
        """Enter a context manager that is left when the scenario ends."""
        return self._stack.enter_context(manager)

    def note(self, what: str, **values: object) -> None:
        """Record something seen; it is in the results at once, whatever happens next."""
        self._emit("note", what=what, **values)

    def expect(self, what: str, seen: T, expected: T, show: Callable[[T], str] = repr) -> None:
        """Fail the scenario unless `seen` equals `expected`.

        Raises:
            ScenarioFailure: names `what` and both values.
        """
        if seen != expected:
            raise ScenarioFailure(f"{what}: expected {show(expected)}, saw {show(seen)}")

    def expect_within(self, what: str, seen: float, expected: float, tolerance: float) -> None:
        """Fail the scenario unless `seen` is `expected` to within `tolerance`."""
        if abs(seen - expected) > tolerance:
            raise ScenarioFailure(
                f"{what}: expected {expected:g} (within {tolerance:g}), saw {seen:g}"
            )
