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

# Pages from RCX up to RDX up, those whose bits are set in RSI bytes from RDI up, whole words. The
# stores go past the caches: nobody reads the pages soon, and what comes next is still in there.
_COPIES: Final = bytes.fromhex(
    "4989f8"  # mov r8, rdi
    "4c8d0c37"  # lea r9, [rdi + rsi]
    "4989ca"  # mov r10, rcx
    "4d39c8"  # word: cmp r8, r9
    "7369"  # jae end
    "498b00"  # mov rax, [r8]
    "4983c008"  # add r8, 8
    "4c0fbcd8"  # bit: bsf r11, rax
    "744c"  # jz skip
    "488d48ff"  # lea rcx, [rax - 1]
    "4821c8"  # and rax, rcx
    "49c1e30c"  # shl r11, 12
    "4a8d3c1a"  # lea rdi, [rdx + r11]
    "4b8d341a"  # lea rsi, [r10 + r11]
    "b940000000"  # mov ecx, 4096 / 64
    "f30f6f06"  # line: movdqu xmm0, [rsi]
    "f30f6f4e10"  # movdqu xmm1, [rsi + 16]
    "f30f6f5620"  # movdqu xmm2, [rsi + 32]
    "f30f6f5e30"  # movdqu xmm3, [rsi + 48]
    "660fe707"  # movntdq [rdi], xmm0
    "660fe74f10"  # movntdq [rdi + 16], xmm1
    "660fe75720"  # movntdq [rdi + 32], xmm2
    "660fe75f30"  # movntdq [rdi + 48], xmm3
    "4883c640"  # add rsi, 64
    "4883c740"  # add rdi, 64
    "ffc9"  # dec ecx
    "75ce"  # jnz line
    "ebae"  # jmp bit
    "4881c200000400"  # skip: add rdx, 64 << 12
    "4981c200000400"  # add r10, 64 << 12
    "eb92"  # jmp word
    "0faef8"  # end: sfence
    "c3"  # ret
)

_COPIES_AT: Final = 64
_FD, _REQUEST, _ARGUMENT, _LEAST, _RESULT, _WORDS = range(6)
_WORD: Final = 8
_STORE_BYTES: Final = 16
_ANY: Final = -(1 << 62)


@dataclass(frozen=True)
class _Code:
    """The loops, as functions of what is in RDI, RSI, RDX, RCX."""

    ioctls: Callable[[int, int], int]
    copies: Callable[[bytes, int, int, int], int]
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
    ioctls = ctypes.CFUNCTYPE(u64, u64, u64)
    copies = ctypes.CFUNCTYPE(u64, ctypes.c_char_p, u64, u64, u64)
    return _Code(ioctls(at), copies(at + _COPIES_AT), memory)


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


def copy_pages(bits: bytes, there: int, here: int) -> None:
    """Copy pages to the same places of another mapping.

    Nobody looks whether there is memory: the caller has to.

    Args:
        bits: bit 0 of byte 0 says whether the first page is copied, and so on; whole words of 8.
        there: the address of the first page to copy to, a multiple of 16.
        here: that of the first page to copy from.

    Raises ValueError: those are no whole words, or `there` is no such multiple.

    """
    if len(bits) % _WORD:
        raise ValueError(f"{len(bits)} bytes of bits are no whole words")
    if there % _STORE_BYTES:
        raise ValueError(f"cannot copy to {there:#x}, which is no multiple of {_STORE_BYTES}")
    code = _code()
    if code is not None:
        code.copies(bits, len(bits), there, here)
        return
    for page in range(8 * len(bits)):
        if bits[page // 8] >> page % 8 & 1:
            offset = page * mmap.PAGESIZE
            ctypes.memmove(there + offset, here + offset, mmap.PAGESIZE)
