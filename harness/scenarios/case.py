"""How a scenario is declared: the claim, what it needs, and the axes along which it varies."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from harness.facts import FactFunction

#: On silicon; the runner multiplies it for an emulated host.
DEFAULT_TIMEOUT_S = 120.0

Value = str | int | bool

LIFECYCLE = "lifecycle"
"""The axis that every scenario can have: what its machines go through."""

FRESH, RESTORED = "fresh", "restored"
"""Machines stay where they were made; or are saved and restored, into another VM, before every run
of a vCPU."""

LIFECYCLES = (FRESH, RESTORED)

GUEST_LINUX = "guest-linux"
"""What a host is asked for beside kvm_amd's parameters: Linux for guests of its own."""

GUEST_QEMU = "guest-qemu"
"""And QEMU to run it."""


@dataclass(frozen=True)
class Scenario:
    """One claim about behaviour."""

    function: Callable[..., None]
    needs: tuple[FactFunction, ...] = ()
    axes: Mapping[str, tuple[Value, ...]] = field(default_factory=dict)
    #: kvm_amd's module parameters that it must run with, other than the defaults.
    params: Mapping[str, str] = field(default_factory=dict)
    levels: int = 1
    lifecycle: tuple[str, ...] = (FRESH,)
    timeout_s: float = DEFAULT_TIMEOUT_S
    #: Part of `make run`.
    quick: bool = False
    #: May take the host down: only on the emulated host, or when asked for by name.
    unsafe: bool = False
    #: Expressions for kernel log lines that this scenario provokes on purpose.
    benign: tuple[str, ...] = ()
    #: The host must have an image of Linux to boot as a guest (`harness.nest.payload`).
    guest_linux: bool = False
    #: The host must have QEMU for it (`harness.qemu_vmm`).
    guest_qemu: bool = False

    @property
    def host_params(self) -> dict[str, str]:
        """What the host must be like: kvm_amd's parameters, GUEST_LINUX, GUEST_QEMU if needed."""
        wanted = {GUEST_LINUX: self.guest_linux, GUEST_QEMU: self.guest_qemu}
        return {**self.params, **{name: "1" for name, is_needed in wanted.items() if is_needed}}

    @property
    def name(self) -> str:
        """The sentence, without pytest's prefix."""
        return self.function.__name__.removeprefix("test_")

    @property
    def claim(self) -> str:
        """The docstring's first line."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]


@dataclass(frozen=True)
class Case:
    """A scenario with one value for each of its axes."""

    scenario: Scenario
    values: Mapping[str, Value]
    #: Which time it is that this case runs, from 1.
    repeat: int = 1

    @property
    def id(self) -> str:
        """``name[axis=value,...]``, as given to ``-k`` and printed in results."""
        if not self.values:
            return self.scenario.name
        inner = ",".join(f"{axis}={value}" for axis, value in self.values.items())
        return f"{self.scenario.name}[{inner}]"


def scenario(
    *,
    needs: Sequence[FactFunction] = (),
    axes: Mapping[str, Sequence[Value]] | None = None,
    params: Mapping[str, str] | None = None,
    levels: int = 1,
    lifecycle: Sequence[str] = (FRESH,),
    timeout_s: float = DEFAULT_TIMEOUT_S,
    quick: bool = False,
    unsafe: bool = False,
    benign: Sequence[str] = (),
    guest_linux: bool = False,
    guest_qemu: bool = False,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Declare the decorated function as a scenario; its docstring's first line is the claim."""

    def declare(function: Callable[..., None]) -> Callable[..., None]:
        declared = Scenario(
            function,
            tuple(needs),
            {axis: tuple(values) for axis, values in (axes or {}).items()},
            dict(params or {}),
            levels,
            tuple(lifecycle),
            timeout_s,
            quick,
            unsafe,
            tuple(benign),
            guest_linux or guest_qemu,
            guest_qemu,
        )
        if not declared.claim:
            raise TypeError(f"scenario {declared.name} has no docstring to claim anything")
        if unknown := set(lifecycle) - set(LIFECYCLES) or {LIFECYCLE} & set(declared.axes):
            raise TypeError(f"scenario {declared.name}: {', '.join(unknown)} is no lifecycle")
        function.__scenario__ = declared  # type: ignore[attr-defined]
        return function

    return declare


def scenario_of(function: object) -> Scenario | None:
    """Return the declaration that `scenario` attached to a function, if it did."""
    declared: Any = getattr(function, "__scenario__", None)
    return declared if isinstance(declared, Scenario) else None


def cases_of(declared: Scenario) -> Iterator[Case]:
    """Yield one case for every combination of the axes' values, and of lifecycles if several."""
    axes = dict(declared.axes)
    if declared.lifecycle != (FRESH,):
        axes[LIFECYCLE] = declared.lifecycle
    for values in itertools.product(*axes.values()):
        yield Case(declared, dict(zip(axes, values, strict=True)))
