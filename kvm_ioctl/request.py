"""Request numbers, the one ioctl(2) call, and the fds that requests belong to.

The arithmetic is that of ``asm-generic/ioctl.h``. Calls go through a ``ctypes.CDLL``, which lets
go of the GIL around every call: ``fcntl.ioctl`` keeps it for mutable buffers over 1024 bytes, and a
KVM_GET_XSAVE that waits for a running vCPU would then stop the whole process.
"""

from __future__ import annotations

import ctypes
import errno as errno_names
import os
import warnings
from collections.abc import Callable
from typing import Any, ClassVar, Generic, Self, TypeVar, overload

from kvm_ioctl.capabilities import Cap
from kvm_ioctl.cstruct import CStruct

KVMIO = 0xAE
"""The ioctl type of all KVM requests (linux/kvm.h)."""

_NRBITS, _TYPEBITS, _SIZEBITS = 8, 8, 14
_IOC_NONE, _IOC_WRITE, _IOC_READ = 0, 1, 2

_byref = ctypes.byref
_libc_ioctl: Any = ctypes.CDLL(None, use_errno=True).ioctl
# No argtypes on purpose: they double the cost of a call. So a Python int is passed as a C int, and
# libffi extends that to the register; addresses go as byref(), larger immediates as c_ulong.

_INT_MAX = 0x7FFF_FFFF


def _argument(payload: Any) -> Any:
    """Return a payload as ioctl(2)'s third argument; it keeps the payload alive."""
    if payload is None:
        return 0
    if not isinstance(payload, int):
        return _byref(payload)
    return payload if 0 <= payload <= _INT_MAX else ctypes.c_ulong(payload)


def ioc(direction: int, number: int, size_bytes: int) -> int:
    """Compute a KVM request number as ``_IOC(direction, KVMIO, number, size)`` does."""
    if not 0 <= size_bytes < 1 << _SIZEBITS:
        raise ValueError(f"no ioctl request can carry {size_bytes} bytes")
    type_shift, size_shift = _NRBITS, _NRBITS + _TYPEBITS
    return (
        direction << size_shift + _SIZEBITS
        | size_bytes << size_shift
        | KVMIO << type_shift
        | number
    )


class KvmError(OSError):
    """A KVM request failed; says which, on what kind of fd, and why."""

    def __init__(self, error: int, ioctl: str, fd_kind: str, detail: str = "") -> None:
        super().__init__(error, os.strerror(error))
        self.ioctl = ioctl
        self.fd_kind = fd_kind
        self.detail = detail

    def __str__(self) -> str:
        name = errno_names.errorcode.get(self.errno or 0, str(self.errno))
        detail = f": {self.detail}" if self.detail else ""
        return f"{self.ioctl} on {self.fd_kind} fd: {name} ({self.strerror}){detail}"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.errno, self.ioctl, self.fd_kind, self.detail)


class MsrRefused(KvmError):
    """KVM took or gave the MSRs before this one, and stopped here; there is no errno."""

    def __init__(self, ioctl: str, fd_kind: str, index: int, done: int, asked: int) -> None:
        super().__init__(0, ioctl, fd_kind)
        self.index = index
        self.done = done
        self.asked = asked

    def __str__(self) -> str:
        progress = f"{self.done} of {self.asked} done"
        return f"{self.ioctl} on {self.fd_kind} fd: MSR {self.index:#x} refused ({progress})"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.ioctl, self.fd_kind, self.index, self.done, self.asked)


class ClosedError(ValueError):
    """A handle was used after it was closed."""


class Fd:
    """Owns one file descriptor; closes it at the end of a ``with`` block, or by ``close()``."""

    kind: ClassVar[str] = "?"
    """What error messages call this fd."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._parent: Fd | None = None
        self._children: set[Fd] = set()

    def _adopt(self, child: C) -> C:
        """Own the child: it is closed when this fd is, for it would keep the VM alive."""
        child._parent = self
        self._children.add(child)
        return child

    def fileno(self) -> int:
        """Return the file descriptor; raises ClosedError after ``close()``."""
        if self._fd < 0:
            raise ClosedError(f"this {self.kind} fd is closed")
        return self._fd

    @property
    def closed(self) -> bool:
        """Whether ``close()`` was called."""
        return self._fd < 0

    def close(self) -> None:
        """Close the fd and those made from it; a second call does nothing."""
        for child in list(self._children):
            child.close()
        if self._parent is not None:
            self._parent._children.discard(self)
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) < 0:
            return
        message = f"unclosed {self!r}"
        self.close()  # before the warning, which may be made an error
        warnings.warn(message, ResourceWarning, stacklevel=2, source=self)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {'closed' if self._fd < 0 else f'fd {self._fd}'}>"

    @overload
    def call(self: F, request: Ioctl[F, None]) -> int: ...
    @overload
    def call(self: F, request: Ioctl[F, P], payload: P) -> int: ...
    def call(self, request: Ioctl[Any, Any], payload: Any = None) -> int:
        """Issue the request; return what ioctl(2) returned, raise KvmError if that was negative."""
        result = request.raw(self._fd, payload)
        if result < 0:
            self.fileno()  # a closed one is -1, which ioctl(2) refused: then this is ClosedError
            raise KvmError(-result, request.name, self.kind)
        return result

    @overload
    def try_call(self: F, request: Ioctl[F, None]) -> int: ...
    @overload
    def try_call(self: F, request: Ioctl[F, P], payload: P) -> int: ...
    def try_call(self, request: Ioctl[Any, Any], payload: Any = None) -> int:
        """Issue the request; return 0 if it was accepted, else its (positive) errno."""
        result = request.raw(self._fd, payload)
        if result >= 0:
            return 0
        self.fileno()  # as above
        return -result

    def bind(self: F, request: Ioctl[F, P], payload: P) -> Callable[[], int]:
        """Return what issues the request with this very payload, as `call` does, and faster.

        For what is done often or must not take long: the payload is converted once, here.
        """
        number, argument = request.number, _argument(payload)

        def issue() -> int:
            # The fd is looked up each time: once closed, its number may be anything else's.
            result: int = _libc_ioctl(self._fd, number, argument)
            if result < 0:
                error = ctypes.get_errno()
                self.fileno()
                raise KvmError(error, request.name, self.kind)
            return result

        return issue

    def get(self: F, request: Ioctl[F, P]) -> P:
        """Issue a request that fills its payload; return the payload."""
        payload: P = request.payload()
        self.call(request, payload)
        return payload


C = TypeVar("C", bound=Fd)
F = TypeVar("F", bound=Fd)
FdIn = TypeVar("FdIn", bound=Fd, contravariant=True)
P = TypeVar("P")
S = TypeVar("S", bound="CStruct | ctypes._SimpleCData[Any]")


class SystemFd(Fd):
    """An open /dev/kvm."""

    kind = "system"


class VmFd(Fd):
    """An fd made by KVM_CREATE_VM."""

    kind = "vm"


class VcpuFd(Fd):
    """An fd made by KVM_CREATE_VCPU."""

    kind = "vcpu"


class DeviceFd(Fd):
    """An fd made by KVM_CREATE_DEVICE."""

    kind = "device"


class Ioctl(Generic[FdIn, P]):
    """One request: its number, the kind of fd it is for, its payload and its capability.

    The name is that of the attribute it is assigned to. A request for a vCPU fd is one for every
    handle that is a vCPU fd, hence the contravariance.
    """

    __slots__ = ("cap", "fd_kind", "name", "number", "payload")

    def __init__(self, number: int, fd_kind: type[Fd], payload: Any, cap: Cap | None) -> None:
        self.name = "?"
        self.number = number
        self.fd_kind = fd_kind
        self.payload = payload
        """The payload's type: called, it makes a zeroed one."""
        self.cap = cap
        """The KVM_CAP_* that offers it; None if every KVM has it."""

    def __set_name__(self, owner: type, name: str) -> None:
        """Take the attribute's name."""
        self.name = name

    def raw(self, fd: int, payload: P) -> int:
        """Issue the request; return ioctl(2)'s result, or the negated errno."""
        # Everything goes through here: each helper called on the way would cost as much as a tenth
        # of a request that does nothing.
        argument: Any = payload
        if argument is None:
            argument = 0
        elif not isinstance(argument, int):
            argument = _byref(argument)
        elif not 0 <= argument <= _INT_MAX:
            argument = ctypes.c_ulong(argument)
        result: int = _libc_ioctl(fd, self.number, argument)
        return result if result >= 0 else -ctypes.get_errno()

    def __repr__(self) -> str:
        return f"<{self.name} {self.number:#x} on {self.fd_kind.kind} fd>"


@overload
def IO(fd: type[F], number: int, *, cap: Cap | None = None) -> Ioctl[F, None]: ...
@overload
def IO(fd: type[F], number: int, payload: type[P], *, cap: Cap | None = None) -> Ioctl[F, P]: ...
def IO(fd: type[F], number: int, payload: Any = None, *, cap: Cap | None = None) -> Ioctl[F, Any]:
    """Declare an ``_IO`` request: no argument, an ``int``, or an address it is silent on."""
    return Ioctl(ioc(_IOC_NONE, number, 0), fd, payload, cap)


def IOR(
    fd: type[F], number: int, payload: type[S], *, cap: Cap | None = None, encodes: Any = None
) -> Ioctl[F, S]:
    """Declare an ``_IOR`` request; ``encodes`` is the type in its number if not the payload."""
    return Ioctl(ioc(_IOC_READ, number, ctypes.sizeof(encodes or payload)), fd, payload, cap)


def IOW(
    fd: type[F], number: int, payload: type[S], *, cap: Cap | None = None, encodes: Any = None
) -> Ioctl[F, S]:
    """Declare an ``_IOW`` request; ``encodes`` is the type in its number if not the payload."""
    return Ioctl(ioc(_IOC_WRITE, number, ctypes.sizeof(encodes or payload)), fd, payload, cap)


def IOWR(
    fd: type[F], number: int, payload: type[S], *, cap: Cap | None = None, encodes: Any = None
) -> Ioctl[F, S]:
    """Declare an ``_IOWR`` request; ``encodes`` is the type in its number if not the payload."""
    both = _IOC_READ | _IOC_WRITE
    return Ioctl(ioc(both, number, ctypes.sizeof(encodes or payload)), fd, payload, cap)
