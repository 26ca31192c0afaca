"""Many ioctls, or many copies, in one go: a loop in machine code instead of one in Python.

For the time in which a virtual machine stands still. There, what Python does between two ioctls
takes several times as long as usual: KVM drives it out of the CPU's caches again and again. Where
memory cannot be made executable, or on another CPU than x86-64, the same is done by a loop in
Python.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

from kvm_ioctl.request import Fd, Ioctl, KvmError

# An array of entries from RDI up to RSI, five words each: fd, request, argument, the least result
# that is good, result. Returns the address of the entry whose result is less, or the end.
_IOCTLS: Final = bytes.fromhex(
    "53"  # push rbx
    "4154"  # push r12
    "4889fb"  # mov rbx, rdi
    "4989f4"  # mov r12, rsi
    "4c39e3"  # next: cmp rbx, r12
    "7322"  # jae end
    "488b3b"  # mov rdi, [rbx]
    "488b7308"  # mov rsi, [rbx + 8]
    "488b5310"  # mov rdx, [rbx + 16]
    "b810000000"  # mov eax, SYS_ioctl (asm/unistd_64.h)
    "0f05"  # syscall
    "48894320"  # mov [rbx + 32], rax
    "483b4318"  # cmp rax, [rbx + 24]
    "7c06"  # jl end
    "4883c328"  # add rbx, 40
    "ebd9"  # jmp next
    "4889d8"  # end: mov rax, rbx
    "415c"  # pop r12
    "5b"  # pop rbx
    "c3"  # ret
)

# Pages from RCX to RDX, an array from RDI up to RSI saying which: two words for each span, its
# first page and how many follow one another.
_COPIES: Final = bytes.fromhex(
    "4989f8"  # mov r8, rdi
    "4989f1"  # mov r9, rsi
    "4989ca"  # mov r10, rcx
    "4d39c8"  # next: cmp r8, r9
    "7320"  # jae end
    "498b00"  # mov rax, [r8]
    "48c1e00c"  # shl rax, 12
    "488d3c02"  # lea rdi, [rdx + rax]
    "498d3402"  # lea rsi, [r10 + rax]
    "498b4808"  # mov rcx, [r8 + 8]
    "48c1e109"  # shl rcx, 9
    "f348a5"  # rep movsq
    "4983c010"  # add r8, 16
    "ebdb"  # jmp next
    "c3"  # end: ret
)

_COPIES_AT: Final = 64
_FD, _REQUEST, _ARGUMENT, _LEAST, _RESULT, _WORDS = range(6)
_WORD: Final = 8
_ANY: Final = -(1 << 62)


@dataclass(frozen=True)
class _Code:
    """The loops, as functions of what is in RDI, RSI, RDX, RCX."""

    ioctls: Callable[[int, int], int]
    copies: Callable[[int, int, int, int], int]
    memory: mmap.mmap
    """Where they are; kept for as long as they may be called."""


@cache
def _code() -> _Code | None:
    """Return the loops; None where there can be none."""
    if platform.machine() != "x86_64":
        return None
    try:
        memory = mmap.mmap(
            -1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
        )
    except OSError:
        return None
    memory[: len(_IOCTLS)] = _IOCTLS
    memory[_COPIES_AT : _COPIES_AT + len(_COPIES)] = _COPIES
    at = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    # They let go of the GIL, as a CDLL's functions do.
    u64 = ctypes.c_uint64
    two, four = ctypes.CFUNCTYPE(u64, u64, u64), ctypes.CFUNCTYPE(u64, u64, u64, u64, u64)
    return _Code(two(at), four(at + _COPIES_AT), memory)


@dataclass(frozen=True)
class Call:
    """A request with its payload."""

    fd: Fd
    request: Ioctl[Any, Any]
    payload: Any
    """A struct; None, if the request has no argument."""
    least: int | None = 0
    """Anything less is not what was asked for; None: all that comes is good."""


class Batch:
    """Calls that are made one after the other, up to the first that gives what it must not."""

    def __init__(self, calls: Sequence[Call]) -> None:
        """Make ready; the payloads are kept, and are read and written where they are."""
        self.calls: Final = tuple(calls)
        self._fds = {(call.fd, call.fd.fileno()) for call in calls}
        self._table = array("q")
        for call in calls:
            argument = 0 if call.payload is None else ctypes.addressof(call.payload)
            least = _ANY if call.least is None else call.least
            self._table.extend((call.fd.fileno(), call.request.number, argument, least, 0))
        self._at = self._table.buffer_info()[0]

    def run(self, first: int = 0) -> int:
        """Make all calls from one on; return the number of the one that failed, or of all.

        Raises ClosedError: an fd was closed.
        """
        for fd, number in self._fds:
            if fd.fileno() != number:
                raise ValueError(f"this {fd.kind} is another one than before")
        code = _code()
        if code is None:
            return self._run_slowly(first)
        entry = _WORDS * _WORD
        stop = code.ioctls(self._at + first * entry, self._at + len(self.calls) * entry)
        return (stop - self._at) // entry

    def result(self, number: int) -> int:
        """Return what the kernel answered to a call: ioctl(2)'s result, or the negated errno."""
        return self._table[number * _WORDS + _RESULT]

    def expect(self, number: int, least: int) -> None:
        """Change what is the least good result of a call."""
        self._table[number * _WORDS + _LEAST] = least

    def error(self, number: int) -> KvmError:
        """Return the error of a call that failed."""
        call = self.calls[number]
        return KvmError(-self.result(number), call.request.name, call.fd.kind)

    def run_all(self) -> None:
        """Make all calls; raises KvmError for the first that fails."""
        stopped = self.run()
        if stopped < len(self.calls):
            raise self.error(stopped)

    def _run_slowly(self, first: int) -> int:
        for number in range(first, len(self.calls)):
            call, at = self.calls[number], number * _WORDS
            self._table[at + _RESULT] = result = call.request.raw(call.fd.fileno(), call.payload)
            if result < self._table[at + _LEAST]:
                return number
        return len(self.calls)


def copy_pages(spans: array[int], there: int, here: int) -> None:
    """Copy pages to the same places of another mapping.

    Nobody looks whether there is memory: the caller has to.

    Args:
        spans: for each its first page and how many follow one another, 8 bytes each.
        there: the address of the mapping to copy to.
        here: that of the mapping to copy from.

    """
    at, count = spans.buffer_info()
    code = _code()
    if code is not None:
        code.copies(at, at + count * _WORD, there, here)
        return
    for first, pages in zip(spans[::2], spans[1::2], strict=True):
        offset = first * mmap.PAGESIZE
        ctypes.memmove(there + offset, here + offset, pages * mmap.PAGESIZE)
