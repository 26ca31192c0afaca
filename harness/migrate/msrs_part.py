"""The MSRs of a vCPU, as one part of its state: those that this kernel lists, and some more."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Final

from harness.migrate.bound import Reading, Source, Target, Writing, buffered
from harness.migrate.notes import Loss, Note
from harness.migrate.parts import Data
from harness.svm.msrs import Msr
from kvm_ioctl.asm_kvm import kvm_msr_entry, kvm_msrs
from kvm_ioctl.batch import Call
from kvm_ioctl.cstruct import packed_format
from kvm_ioctl.msrs import MOST_IN_ONE_CALL, MsrBlock

MTRR_MSRS: Final = (
    *range(0x200, 0x210), 0x250, 0x258, 0x259, *range(0x268, 0x270), 0x2FF,
)  # fmt: skip
"""MTRRphysBase/Mask 0 to 7, the fixed ones, MTRRdefType (APM vol. 2, appendix A.7)."""

UNLISTED_MSRS: Final = (Msr.MSR_VM_CR, *MTRR_MSRS)
"""MSRs with state that KVM_GET_MSR_INDEX_LIST of some kernels leaves out."""

MOST_MSRS: Final = 1024
"""More of them are nonsense."""

AFTER_RESET: Final[Mapping[int, int]] = {Msr.MSR_AMD64_TSC_RATIO: 1 << 32}
"""MSRs that are not 0 after reset, where only some kernels know them: a ratio of 1.0."""

_MSR: Final = packed_format(kvm_msr_entry)
_INDEX_BYTES: Final = 4
_HEADER_BYTES: Final = len(bytes(kvm_msrs()))


def given_msrs(source: Source) -> tuple[int, ...]:
    """Ask a vCPU for all MSRs that may hold state; return those that KVM gives."""
    wanted = tuple(dict.fromkeys((*source.offers.msr_indices, *UNLISTED_MSRS)))
    values = source.vcpu.get_msrs(wanted, skip_refused=True)
    for index in source.offers.msr_indices:
        if index not in values:
            why = "in KVM_GET_MSR_INDEX_LIST, but KVM_GET_MSRS refuses it"
            source.notes.append(Note(Loss.NOT_GIVEN, f"msrs.{index:#x}", why))
    return tuple(values)


def msrs_reading(source: Source) -> Reading:
    """Return how those are read that KVM gives now: each with its index, as KVM has them."""
    given, most = given_msrs(source), MOST_IN_ONE_CALL
    blocks = [MsrBlock(given[at : at + most]) for at in range(0, len(given), most)]
    vcpu = source.vcpu
    calls = tuple(
        Call(vcpu, vcpu.KVM_GET_MSRS, block.payload, least=len(block.indices)) for block in blocks
    )
    if len(blocks) == 1:
        return Reading(calls, blocks[0].entries)
    return Reading(calls, data=lambda results: b"".join([block.entries for block in blocks]))


def msrs_writing(target: Target) -> Writing:
    """Return how all are written; a refused one does not keep those after it from being written."""
    payload, view = buffered(kvm_msrs, _HEADER_BYTES + MOST_IN_ONE_CALL * _MSR.size)
    issue = target.vcpu.bind(target.vcpu.KVM_SET_MSRS, payload)

    def load(data: Data) -> bool:
        count = len(data) // _MSR.size
        if count > MOST_IN_ONE_CALL:
            return False
        payload.nmsrs = count
        view[_HEADER_BYTES : _HEADER_BYTES + len(data)] = data
        return True

    def write(data: Data) -> None:
        left = memoryview(data)
        while left:
            some = left[: MOST_IN_ONE_CALL * _MSR.size]
            load(some)
            taken = issue()
            if taken * _MSR.size == len(some):
                left = left[len(some) :]
            else:
                left = without_refused(left, taken)

    def without_refused(data: memoryview, taken: int) -> memoryview:
        index, _, value = _MSR.unpack_from(data, taken * _MSR.size)
        _note_refused(target, index, value)
        return data[(taken + 1) * _MSR.size :]

    def go_on(data: Data, taken: int) -> None:
        write(without_refused(memoryview(data), taken))

    call = Call(target.vcpu, target.vcpu.KVM_SET_MSRS, payload)
    return Writing(write, call, load, lambda data: len(data) // _MSR.size, go_on)


def _note_refused(target: Target, index: int, value: int) -> None:
    now = target.vcpu.get_msrs([index], skip_refused=True).get(index)
    # One that this kernel does not know holds what it has after reset.
    if value == (AFTER_RESET.get(index, 0) if now is None else now):
        return
    why = f"KVM_SET_MSRS refuses {value:#x}, " + (
        "and KVM_GET_MSRS does not know it" if now is None else f"it stays {now:#x}"
    )
    target.notes.append(Note(Loss.NOT_TAKEN, f"msrs.{index:#x}", why))


def msrs_flaw(data: Data) -> str | None:
    """Say what is wrong with such bytes, if anything."""
    raw = bytes(data)
    # Mostly they are the same MSRs as last time.
    return _indices_flaw(b"".join([raw[at :: _MSR.size] for at in range(_INDEX_BYTES)]))


@lru_cache(16)
def _indices_flaw(columns: bytes) -> str | None:
    """Say it, given the first bytes of all indices, then their second ones, and so on."""
    count = len(columns) // _INDEX_BYTES
    indices = {columns[number::count] for number in range(count)}
    return None if len(indices) == count else "one MSR is there twice"
