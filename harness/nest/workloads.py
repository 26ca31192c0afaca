"""Work for a Linux of any level, in rounds: deterministic, so that anybody can say what comes out.

Every round writes memory and files and reads them back, watches clocks and timers, lets a thread
visit every CPU, and keeps values in FPU and AVX registers while it is interrupted. A round's entry
says what was seen; two runs with as many rounds and CPUs have the same entries, wherever they ran.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from harness.errors import ScenarioFailure

_MEMORY_BYTES = 1 << 20
_PAGE = 4096
_FILES = 12
_CLOCK_READS = 200
_TIMER_S = 0.01
_SPINS = 200_000
"""For registers to be kept; some timer interrupts long."""

_FLOAT_STEPS = 500
_TEN_BITS = 0x3FF

# Values go into the first and the last vector register and onto the x87 stack; after a loop of ESI
# iterations all come out again. rdi: in, rdx: out.
_KEEP_AVX: Final = bytes.fromhex(
    "c5fe6f07"  # vmovdqu ymm0, [rdi]
    "c57e6f7f20"  # vmovdqu ymm15, [rdi+32]
    "d9eb"  # fldpi
    "89f1 ffc9 75fc"  # mov ecx, esi; 1: dec ecx; jnz 1b
    "dd5a40"  # fstp qword [rdx+64]
    "c5fe7f02"  # vmovdqu [rdx], ymm0
    "c57e7f7a20"  # vmovdqu [rdx+32], ymm15
    "c5f877 c3"  # vzeroupper; ret
)
_KEEP_SSE: Final = bytes.fromhex(
    "f30f6f07"  # movdqu xmm0, [rdi]
    "f3440f6f7f20"  # movdqu xmm15, [rdi+32]
    "d9eb 89f1 ffc9 75fc dd5a40"
    "f30f7f02"  # movdqu [rdx], xmm0
    "f3440f7f7a20"  # movdqu [rdx+32], xmm15
    "c3"
)
_PI: Final = struct.pack("<Q", 0x4009_21FB_5444_2D18)


class Workloads:
    """The work of one run; files go below `directory`, which must be empty."""

    def __init__(self, directory: Path, cpus: int) -> None:
        """Prepare it; of the CPUs, `cpus` are visited (the last ones again, if there are fewer)."""
        self._directory = directory
        self._cpus = cpus
        self._memory = bytearray(_MEMORY_BYTES)
        self._last_ns = time.monotonic_ns()
        self._count = 0

    def rounds(self, count: int) -> Iterator[str]:
        """Do so many rounds; yield each one's entry.

        Raises ScenarioFailure: something was not as it was left, or time went back.
        """
        for number in range(count):
            parts = (
                f"memory {self._memory_work(number):08x}",
                f"clock {self._clock_work()}",
                f"timer {self._timer_work()}",
                f"cpus {self._cpu_work()}",
                f"float {_float_work(number)}",
                f"registers {_register_work(number)}",
                f"files {self._file_work(number):08x}",
            )
            yield f"{number}: {', '.join(parts)}"

    def _memory_work(self, number: int) -> int:
        """Check what the last round left, write this round's pattern, return its checksum."""
        if number:
            _require(self._memory == _pattern(number - 1), "memory is not as it was left")
        self._memory[:] = _pattern(number)
        return zlib.crc32(self._memory)

    def _clock_work(self) -> str:
        """Read clocks again and again: none may go back, also not since the last round."""
        for _ in range(_CLOCK_READS):
            now = time.monotonic_ns()
            _require(now >= self._last_ns, f"CLOCK_MONOTONIC: {self._last_ns} and then {now} ns")
            self._last_ns = now
        self._count += _CLOCK_READS
        return f"forward {self._count}"

    def _timer_work(self) -> str:
        """Sleep: not for a shorter time than asked for."""
        before = time.monotonic()
        time.sleep(_TIMER_S)
        slept = time.monotonic() - before
        _require(slept >= _TIMER_S, f"a timer of {_TIMER_S} s came after {slept} s")
        return "in time"

    def _cpu_work(self) -> str:
        """Run on one CPU after the other, for which they send each other IPIs."""
        allowed = os.sched_getaffinity(0)
        there = sorted(allowed)
        try:
            for index in range(self._cpus):
                os.sched_setaffinity(0, {there[min(index, len(there) - 1)]})
        finally:
            os.sched_setaffinity(0, allowed)
        return f"visited {self._cpus}"

    def _file_work(self, number: int) -> int:
        """Rewrite a file of the tree, return the checksum of all names and contents."""
        for index in range(_FILES) if number == 0 else [number % _FILES]:
            path = self._directory / f"d{index % 3}" / f"f{index}"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(_pattern(number + index)[: _PAGE + index])
        checksum = 0
        for path in sorted(p for p in self._directory.rglob("*") if p.is_file()):
            checksum = zlib.crc32(str(path.relative_to(self._directory)).encode(), checksum)
            checksum = zlib.crc32(path.read_bytes(), checksum)
        return checksum


def entry_sums(entries: list[str]) -> list[str]:
    """Return a short sum of each entry: enough to say which is the first that differs."""
    return [f"{zlib.crc32(entry.encode()):08x}" for entry in entries]


def _pattern(number: int) -> bytes:
    """Return memory in which no two pages are alike."""
    # Multiples of an odd constant: cheap, and different in every page and round.
    words = ((page * 0x9E37_79B1 + number * 0x85EB_CA6B) & 0xFFFF_FFFF for page in range(256))
    return b"".join(struct.pack("<I", word) * (_PAGE // 4) for word in words)


def _float_work(number: int) -> str:
    value = 1.0 + number
    for step in range(_FLOAT_STEPS):
        value = (value * 1.000_000_119 + 1.0 / (step + 1)) % 1000.0
    return value.hex()


def _register_work(number: int) -> str:
    """Keep values in registers while interrupts come; the text does not say which registers."""
    code = _KEEP_AVX if _has_avx() else _KEEP_SSE
    width = 32 if code is _KEEP_AVX else 16
    given = _pattern(number)[:32] + _pattern(number + 1)[_PAGE : _PAGE + 32]
    taken = ctypes.create_string_buffer(72)
    with mmap.mmap(-1, _PAGE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC) as page:
        page.write(code)
        anchor = ctypes.c_char.from_buffer(page)
        kind = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_uint, ctypes.c_void_p)
        kind(ctypes.addressof(anchor))(given, _SPINS + (number & _TEN_BITS), taken)
        del anchor
    for at in (0, 32):
        _require(taken.raw[at : at + width] == given[at : at + width], "a vector register changed")
    _require(taken.raw[64:72] == _PI, "the x87 stack changed")
    return "kept"


def _has_avx() -> bool:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return "avx" in line.split()
    return False


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ScenarioFailure(what)
