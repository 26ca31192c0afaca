"""One-line methods for handles: get a struct, set a struct, or just do it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from kvm_ioctl.request import Fd, Ioctl

F = TypeVar("F", bound=Fd)
P = TypeVar("P")


def getter(request: Ioctl[F, P]) -> Callable[[F], P]:
    """Make a method that issues the request and returns the payload that it filled."""

    def get(handle: F) -> P:
        payload: P = request.payload()
        handle.call(request, payload)
        return payload

    get.__doc__ = f"Issue {request.name}; return what it filled."
    return get


def setter(request: Ioctl[F, P]) -> Callable[[F, P], int]:
    """Make a method that issues the request with the payload it is given."""

    def set_(handle: F, payload: P) -> int:
        return handle.call(request, payload)

    set_.__doc__ = f"Issue {request.name} with this payload."
    return set_


def action(request: Ioctl[F, None]) -> Callable[[F], int]:
    """Make a method that issues a request without an argument and returns its result."""

    def act(handle: F) -> int:
        return handle.call(request)

    act.__doc__ = f"Issue {request.name}."
    return act
