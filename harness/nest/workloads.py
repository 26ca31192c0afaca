"""Work for a Linux of any level, in rounds: deterministic, so that anybody can say what comes out.

Every round writes memory and files and reads them back, watches clocks and timers, visits every CPU
and has CPUs wake each other, keeps values in FPU and AVX registers while it is interrupted and
reckons in them. A round's entry says what was seen; two runs with as many rounds and CPUs have the
same entries, wherever they ran.
"""

from __future__ import annotations

import os
import select
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

from harness.errors import ScenarioFailure
from harness.nest.registers import keep_registers, reckon

_MEMORY_BYTES = 1 << 20
_PAGE = 4096
_FILES = 12
_CLOCK_READS = 200
_TIMER_S = 0.01
_MESSAGES = 20
"""From one CPU to the next."""
_WAKE_S = 60.0


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
                f"float {reckon(number)}",
                f"registers {keep_registers(number)}",
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
            self._read_clock()
        self._count += _CLOCK_READS
        return f"forward {self._count}"

    def _read_clock(self) -> None:
        now = time.monotonic_ns()
        _require(now >= self._last_ns, f"CLOCK_MONOTONIC: {self._last_ns} and then {now} ns")
        self._last_ns = now

    def _timer_work(self) -> str:
        """Sleep: not for a shorter time than asked for."""
        before = time.monotonic()
        time.sleep(_TIMER_S)
        slept = time.monotonic() - before
        _require(slept >= _TIMER_S, f"a timer of {_TIMER_S} s came after {slept} s")
        return "in time"

    def _cpu_work(self) -> str:
        """Visit all CPUs, on which the clock must not go back either, and let them wake each other.

        One that is moved to another CPU is sent there by an IPI, as is one that is woken there.
        """
        allowed = os.sched_getaffinity(0)
        there = sorted(allowed)
        cpus = [there[min(index, len(there) - 1)] for index in range(self._cpus)]
        try:
            for cpu in cpus:
                os.sched_setaffinity(0, {cpu})
                self._read_clock()
            for first, second in zip(cpus, [*cpus[1:], cpus[0]], strict=True):
                _ping_pong(first, second, _MESSAGES)
        finally:
            os.sched_setaffinity(0, allowed)
        return f"visited {self._cpus}, {_MESSAGES * self._cpus} messages"

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


def _ping_pong(first: int, second: int, messages: int) -> None:
    """Have threads on two CPUs wake each other, which takes an IPI each time that one sleeps."""
    there, back = os.pipe(), os.pipe()
    lost: list[str] = []

    def answer() -> None:
        os.sched_setaffinity(0, {second})
        for number in range(messages):
            got = os.read(there[0], 4)
            if got != struct.pack("<I", number):
                lost.append(f"message {number} came as {got.hex()}")
            os.write(back[1], got)

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    try:
        os.sched_setaffinity(0, {first})
        for number in range(messages):
            os.write(there[1], struct.pack("<I", number))
            arrives = select.select([back[0]], [], [], _WAKE_S)[0]
            _require(bool(arrives), f"CPU {second} does not wake up within {_WAKE_S:g} s")
            os.read(back[0], 4)
        thread.join(_WAKE_S)
    finally:
        # Not if the other one may still use them.
        for fd in () if thread.is_alive() else (*there, *back):
            os.close(fd)
    _require(not lost, "; ".join(lost))


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ScenarioFailure(what)
