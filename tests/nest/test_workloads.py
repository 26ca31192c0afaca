"""The workloads: what they say is the same everywhere, and nothing wrong goes unnoticed."""

import itertools
import os
import time

import pytest

from harness.errors import ScenarioFailure
from harness.nest import registers, workloads
from harness.nest.workloads import Workloads, entry_sums


@pytest.fixture
def make(tmp_path):
    numbers = itertools.count()

    def made(cpus=1):
        directory = tmp_path / str(next(numbers))
        directory.mkdir()
        return Workloads(directory, cpus)

    return made


def test_two_runs_say_the_same(make):
    assert list(make().rounds(3)) == list(make().rounds(3))


def test_rounds_differ(make):
    entries = [entry.partition(": ")[2] for entry in make().rounds(3)]
    assert len(set(entries)) == 3


def test_with_and_without_avx_the_entries_are_the_same(make, monkeypatch):
    with_avx = list(make().rounds(1))
    monkeypatch.setattr(registers, "_has_avx", lambda: False)
    assert list(make().rounds(1)) == with_avx


def test_memory_that_changes_between_rounds_is_noticed(make):
    work = make()
    rounds = work.rounds(2)
    next(rounds)
    work._memory[12345] ^= 1
    with pytest.raises(ScenarioFailure, match="memory is not as it was left"):
        next(rounds)


def test_a_clock_that_goes_back_is_noticed(make, monkeypatch):
    real = time.monotonic_ns
    reads = itertools.count()
    monkeypatch.setattr(
        workloads.time, "monotonic_ns", lambda: real() - (10**9 if next(reads) == 50 else 0)
    )
    with pytest.raises(ScenarioFailure, match="CLOCK_MONOTONIC: "):
        list(make().rounds(1))


def test_a_timer_that_comes_early_is_noticed(make, monkeypatch):
    monkeypatch.setattr(workloads.time, "sleep", lambda seconds: None)
    with pytest.raises(ScenarioFailure, match=r"a timer of 0\.01 s came after"):
        list(make().rounds(1))


def test_a_register_that_changes_is_noticed(monkeypatch):
    # The same code, but that it forgets to store the last register.
    forgetful = registers._KEEP_SSE.replace(bytes.fromhex("f3440f7f7a20"), b"\x90" * 6)
    monkeypatch.setattr(registers, "_KEEP_SSE", forgetful)
    monkeypatch.setattr(registers, "_has_avx", lambda: False)
    with pytest.raises(ScenarioFailure, match="a vector register changed"):
        registers.keep_registers(1)


@pytest.mark.parametrize("avx", [False, True])
def test_arithmetic_that_goes_wrong_is_noticed(monkeypatch, avx):
    if avx and not registers._has_avx():
        pytest.skip("this CPU has no AVX")
    monkeypatch.setattr(registers, "_has_avx", lambda: avx)
    assert registers.reckon(3) != registers.reckon(4)
    run = registers._run

    def off_by_one(code, given, count, size_bytes):
        return run(code, given, count - 1, size_bytes)

    monkeypatch.setattr(registers, "_run", off_by_one)
    with pytest.raises(ScenarioFailure, match="vector arithmetic gave"):
        registers.reckon(3)


def test_an_fpu_that_miscounts_is_noticed(monkeypatch):
    wrong = registers._COUNT_SSE.replace(bytes.fromhex("d8c1"), bytes.fromhex("d8c0"))
    monkeypatch.setattr(registers, "_COUNT_SSE", wrong)
    monkeypatch.setattr(registers, "_has_avx", lambda: False)
    with pytest.raises(ScenarioFailure, match="the x87 FPU counted 0"):
        registers.reckon(1)


def test_a_cpu_that_does_not_wake_up_is_noticed(make, monkeypatch):
    monkeypatch.setattr(workloads, "_WAKE_S", 0.05)
    write = os.write
    monkeypatch.setattr(
        workloads.os, "write", lambda fd, data: len(data) if len(data) == 4 else write(fd, data)
    )
    with pytest.raises(ScenarioFailure, match="does not wake up within"):
        list(make(2).rounds(1))


def test_a_file_that_changes_changes_the_entry(make):
    one, other = make(), make()
    rounds, others = one.rounds(2), other.rounds(2)
    assert next(rounds) == next(others)
    (other._directory / "d0" / "f0").write_bytes(b"something else")
    assert next(rounds) != next(others)


def test_sums_tell_entries_apart():
    assert entry_sums(["0: a", "1: b"]) != entry_sums(["0: a", "1: c"])
    assert entry_sums(["0: a"]) == entry_sums(["0: a"])
