"""Parts of the state as calls that are ready to be made: buffers and arguments are made once.

All calls for a machine are made in one go (`kvm_ioctl.batch`), and what KVM has put into the
buffers travels as it lies there.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from harness.migrate.notes import Note
from harness.migrate.offers import Offers
from harness.migrate.parts import Data
from kvm_ioctl.batch import Call
from kvm_ioctl.cstruct import CStruct
from kvm_ioctl.handles import Vcpu
from kvm_ioctl.request import Fd, Ioctl

F = TypeVar("F", bound=Fd)
S = TypeVar("S", bound=CStruct)

Notes = list[Note]

Write = Callable[[Data], None]
"""Puts a part of the state there; raises ValueError for bytes that it cannot be."""


@dataclass(frozen=True)
class Source:
    """Where parts of a vCPU are read from."""

    vcpu: Vcpu
    offers: Offers
    irqchip: bool
    notes: Notes


@dataclass(frozen=True)
class Target:
    """Where parts of a vCPU are written to."""

    vcpu: Vcpu
    offers: Offers
    irqchip: bool
    notes: Notes


def _unread(results: list[int]) -> Data | None:
    raise AssertionError("nobody asks for it: the view is fixed")


@dataclass(frozen=True)
class Reading:
    """How a part is read; without calls there is none here."""

    calls: tuple[Call, ...] = ()
    view: Data | None = None
    """What the calls fill, if that is the part, always."""
    data: Callable[[list[int]], Data | None] = _unread
    """Otherwise this returns the part, or None, given the results of the calls."""
    before: Callable[[], None] | None = None
    """What has to be done each time before the calls are made."""


@dataclass(frozen=True)
class Writing:
    """How a part is written."""

    write: Write
    """Does it, whatever it takes."""
    call: Call | None = None
    """The one call that mostly does it,"""
    load: Callable[[Data], bool] = field(default=lambda data: False)
    """once this has filled its payload; False: that call alone would not do."""
    least: Callable[[Data], int] | None = None
    """Returns what the call returns if it did all; by default anything but an error means that."""
    go_on: Callable[[Data, int], None] | None = None
    """Does the rest, where the call did less: given what it returned."""


def buffered(kind: type[S], size_bytes: int = 0) -> tuple[S, memoryview]:
    """Return a zeroed struct, with room for a tail if it is to have one, and all its bytes."""
    buffer = bytearray(max(size_bytes, ctypes.sizeof(kind)))
    return kind.over(buffer), memoryview(buffer)


def getting(fd: F, request: Ioctl[F, S]) -> Reading:
    """Return a reading by one request that fills one struct."""
    payload, view = buffered(request.payload)
    return Reading((Call(fd, request, payload),), view)


def setting(
    fd: F, request: Ioctl[F, S], *, alone: Callable[[Data], bool] = lambda data: True
) -> Writing:
    """Return a writing by one request that takes one struct.

    Args:
        fd: where it is issued.
        request: which one.
        alone: tells whether that is all there is to do.

    """
    payload, view = buffered(request.payload)
    issue = fd.bind(request, payload)
    name, size = request.payload.__name__, len(view)

    def load(data: Data) -> bool:
        if len(data) != size or not alone(data):
            return False
        view[:] = data
        return True

    def write(data: Data) -> None:
        if len(data) != size:
            raise ValueError(f"{name} has {size} bytes, got {len(data)}")
        view[:] = data
        issue()

    return Writing(write, Call(fd, request, payload), load)
