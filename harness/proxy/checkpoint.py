"""What Python knows of the levels in a machine, as JSON: to go on with them elsewhere.

A machine that is moved takes its memory and its vCPUs along, but not the objects by which it is
controlled. `remember` writes these down and `resume` makes them again around another VM: levels,
mailboxes, page tables, programs under way, emulated SVM. Objects of the classes in `KNOWN` are
written as their attributes; nothing else is ever made, and nothing of it is called.

What is no knowledge but somebody's function (`on_exit`, `SmmLevel.handler`) cannot travel.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache
from typing import Any, Final

from harness.errors import NsvmError
from harness.machine.console import PortOut
from harness.machine.images import load_image
from harness.machine.loader import Image, read_image
from harness.machine.machine import Machine
from harness.machine.memory import GuestMemory
from harness.machine.vcpu import MachineVcpu
from harness.proxy.cpu import Cpu
from harness.proxy.guest_level import GuestLevel
from harness.proxy.instance import Context, Instance
from harness.proxy.level import Level
from harness.proxy.machine import ProxyMachine
from harness.proxy.nesting import Nesting
from harness.proxy.ops import EnterFlag, Op, Policy, Status
from harness.proxy.paging import PageAllocator, PageTables
from harness.proxy.permissions import Iopm, Msrpm
from harness.proxy.program import Fault, Result
from harness.proxy.shadow_npt import RecycledPages, ShadowNpt
from harness.proxy.smm import SmmLevel
from harness.proxy.virtual_gif import VirtualGif
from harness.proxy.vmcb_view import VmcbView
from harness.proxy.vmexit import VmExit
from harness.svm.msrs import Cr0, Cr4, Efer
from harness.svm.vmcb import EventInj

KNOWN: Final[Mapping[str, type]] = {
    kind.__name__: kind
    for kind in (
        *(Cpu, Level, GuestLevel, SmmLevel, Instance, Context, Nesting, VirtualGif),
        *(PageAllocator, RecycledPages, PageTables, ShadowNpt, VmcbView, Msrpm, Iopm),
        *(Op, Result, Fault, VmExit, PortOut),
    )
}
"""Classes whose objects travel."""

NUMBERS: Final[Mapping[str, type[int]]] = {
    kind.__name__: kind for kind in (EnterFlag, Policy, Status, Cr0, Cr4, Efer, EventInj)
}
"""Kinds of numbers that are more than a number."""

_MACHINE: Final = (
    *("timeout_s", "smm_wired", "_vcpu_count", "_shadows_stale", "pages", "efer", "cpus"),
)
"""Attributes of a ProxyMachine that are knowledge; the others are its VM's."""

_CALLBACKS: Final = ("tables_changed",)
"""Methods of the machine that objects keep."""

_HOOKS: Final = ("before_run", "handler", "on_exit")
"""Attributes with somebody's functions in them."""


class CheckpointError(NsvmError):
    """Knowledge that cannot be written down, or that is malformed; one line says why."""


def remember(machine: ProxyMachine) -> dict[str, Any]:
    """Return what Python knows of a machine's levels, for JSON.

    Raises CheckpointError: a hook is in use, which cannot travel.
    """
    writer = _Writer(machine)
    known = {name: writer.value(getattr(machine, name)) for name in _MACHINE}
    events = [writer.value(list(runner.waiting_events)) for runner in machine.vcpus]
    return {"image": _digest(machine.proxy_image), "machine": known, "events": events}


def resume(other: Machine, data: Any) -> ProxyMachine:
    """Make a ProxyMachine around another machine's VM, as `remember` found it; the other has none.

    Raises CheckpointError: malformed, or of another build of the proxy.
    """
    image = _proxy_image()
    if not isinstance(data, dict) or not isinstance(data.get("machine"), dict):
        raise CheckpointError("proxies: malformed")
    if data.get("image") != _digest(image):
        raise CheckpointError("proxies: of another build of the proxy than this harness has")
    machine = ProxyMachine.__new__(ProxyMachine)
    machine.image = image
    reader = _Reader(machine, other)
    try:
        values = {name: reader.value(data["machine"][name]) for name in _MACHINE}
        events = [_port_writes(reader.value(waiting)) for waiting in data["events"]]
        waiting = list(zip(other.vcpus, events, strict=True))
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as e:
        raise CheckpointError(f"proxies: malformed ({type(e).__name__}: {e})") from None
    machine.take_over(other)
    for name, value in values.items():
        setattr(machine, name, value)
    for runner, missed in waiting:
        runner.put_back(missed)
    return machine


def _port_writes(events: Any) -> list[PortOut]:
    if not isinstance(events, list) or not all(isinstance(event, PortOut) for event in events):
        raise CheckpointError("proxies: malformed events")
    return events


@cache
def _proxy_image() -> Image:
    return read_image(load_image("proxy"))


def _digest(image: Image) -> str:
    digest = hashlib.sha256(str((image.mode, image.entry)).encode())
    for segment in image.segments:
        digest.update(f"{segment.gpa:#x} {segment.size_bytes:#x}".encode())
        digest.update(segment.data)
    return digest.hexdigest()


def _attributes(found: Any) -> dict[str, Any]:
    if hasattr(found, "__dict__"):
        return dict(vars(found))
    return {name: getattr(found, name) for name in found.__slots__}


class _Writer:
    """Turns objects into JSON; what comes up again is a reference to where it came first."""

    def __init__(self, machine: ProxyMachine) -> None:
        self._machine = machine
        self._numbers: dict[int, int] = {}
        self._kept: list[object] = []

    def value(self, found: Any) -> Any:
        """Return one value as JSON."""
        if found is None or isinstance(found, bool | str | float):
            return found
        if isinstance(found, int):
            kind = type(found).__name__
            return ["n", kind, int(found)] if kind in NUMBERS else int(found)
        if isinstance(found, list | tuple):
            return ["l" if isinstance(found, list) else "t", [self.value(item) for item in found]]
        if isinstance(found, dict):
            pairs = [[self.value(key), self.value(item)] for key, item in found.items()]
            return ["d", pairs]
        return self._anchor(found) or self._object(found)

    def _anchor(self, found: Any) -> list[Any] | None:
        """Return what stands for something that is there at the other end."""
        if found is self._machine:
            return ["machine"]
        if isinstance(found, GuestMemory):
            return ["memory"]
        if isinstance(found, MachineVcpu):
            return ["vcpu", found.index]
        name = getattr(found, "__name__", "")
        if name in _CALLBACKS and getattr(found, "__self__", None) is self._machine:
            return ["call", name]
        return None

    def _object(self, found: Any) -> list[Any]:
        if id(found) in self._numbers:
            return ["r", self._numbers[id(found)]]
        kind = type(found).__name__
        if KNOWN.get(kind) is not type(found):
            raise CheckpointError(f"proxies: {found!r} cannot be written down")
        number = self._numbers[id(found)] = len(self._numbers)
        self._kept.append(found)
        attributes = []
        for name, value in _attributes(found).items():
            if name in _HOOKS and value:
                raise CheckpointError(f"proxies: {kind}.{name} is in use, functions do not travel")
            attributes.append([name, self.value(value)])
        return ["o", number, kind, attributes]


class _Reader:
    """Makes objects of JSON: of known classes only, and without calling anything of theirs."""

    def __init__(self, machine: ProxyMachine, other: Machine) -> None:
        self._machine = machine
        self._other = other
        self._objects: dict[int, Any] = {}

    def value(self, data: Any) -> Any:
        """Return one value."""
        if not isinstance(data, list):
            if isinstance(data, dict):
                raise CheckpointError("proxies: malformed")
            return data
        kind, *rest = data
        read = getattr(self, f"_read_{kind}", None) if isinstance(kind, str) else None
        if read is None:
            raise CheckpointError(f"proxies: malformed value {kind!r}")
        return read(*rest)

    def _read_n(self, kind: str, number: int) -> int:
        return NUMBERS[kind](_integer(number))

    def _read_l(self, items: list[Any]) -> list[Any]:
        return [self.value(item) for item in items]

    def _read_t(self, items: list[Any]) -> tuple[Any, ...]:
        return tuple(self.value(item) for item in items)

    def _read_d(self, pairs: list[Any]) -> dict[Any, Any]:
        return {self.value(key): self.value(item) for key, item in pairs}

    def _read_machine(self) -> ProxyMachine:
        return self._machine

    def _read_memory(self) -> GuestMemory:
        return self._other.memory

    def _read_vcpu(self, index: int) -> MachineVcpu:
        return self._other.vcpus[_integer(index)]

    def _read_call(self, name: str) -> Any:
        if name not in _CALLBACKS:
            raise CheckpointError(f"proxies: malformed call {name!r}")
        return getattr(self._machine, name)

    def _read_r(self, number: int) -> Any:
        return self._objects[number]

    def _read_o(self, number: int, kind: str, attributes: list[Any]) -> Any:
        known: Any = KNOWN[kind]
        made = known.__new__(known)
        # Known before its attributes are: they may refer to it.
        self._objects[_integer(number)] = made
        for name, value in attributes:
            # Not setattr: some are frozen.
            object.__setattr__(made, name, self.value(value))
        return made


def _integer(data: Any) -> int:
    if not isinstance(data, int):
        raise CheckpointError(f"proxies: {data!r} is no number")
    return data
