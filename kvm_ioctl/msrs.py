"""KVM_GET_MSRS and KVM_SET_MSRS: a mapping of MSRs to and from the list that KVM takes."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Iterable, Mapping
from typing import Final, TypeVar

from kvm_ioctl.asm_kvm import kvm_msr_entry, kvm_msrs
from kvm_ioctl.request import Fd, Ioctl, MsrRefused

F = TypeVar("F", bound=Fd)

MOST_IN_ONE_CALL = 255
"""KVM answers E2BIG to MAX_IO_MSRS (256) and more in one call (``msr_io``)."""

_U64: Final = "Q"


class MsrBlock:
    """A ``kvm_msrs`` with these indices, whose data are read and written all at once.

    Raises OverflowError for what is no MSR's index.
    """

    __slots__ = ("data", "entries", "indices", "payload")

    def __init__(self, indices: tuple[int, ...]) -> None:
        header_bytes, entry_bytes = ctypes.sizeof(kvm_msrs), ctypes.sizeof(kvm_msr_entry)
        buffer = bytearray(header_bytes + len(indices) * entry_bytes)
        self.indices = indices
        self.payload: kvm_msrs = kvm_msrs.over(buffer)
        self.payload.nmsrs = len(indices)
        # An entry is two words: the index, which is only half of the first, and the data. One
        # strided assignment fills a column; ctypes takes three calls for each entry.
        self.entries = memoryview(buffer)[header_bytes:]
        """All of them, as they lie in memory."""
        words = self.entries.cast(_U64)
        words[0::2] = array(_U64, array("I", indices))
        self.data = words[1::2]


class MsrBlocks:
    """Keeps the block that was used last: mostly the same MSRs are asked for over and over.

    Who takes a block has it alone until it is given back, so two threads never share one.
    """

    __slots__ = ("_kept",)

    def __init__(self) -> None:
        self._kept: list[MsrBlock] = []

    def take(self, indices: tuple[int, ...]) -> MsrBlock:
        """Return a block with these indices; its data are anything."""
        try:
            block = self._kept.pop()
        except IndexError:
            return MsrBlock(indices)
        return block if block.indices == indices else MsrBlock(indices)

    def give_back(self, block: MsrBlock) -> None:
        """Keep this block for the next one who wants it."""
        self._kept[:] = (block,)


def read_msrs(
    fd: F,
    request: Ioctl[F, kvm_msrs],
    blocks: MsrBlocks,
    indices: Iterable[int],
    skip_refused: bool,
) -> dict[int, int]:
    """Return the values of the MSRs; raise MsrRefused at one that KVM will not give, or skip it."""
    wanted = tuple(indices)
    values: dict[int, int] = {}
    position = 0
    while position < len(wanted):
        block = blocks.take(wanted[position : position + MOST_IN_ONE_CALL])
        done = fd.call(request, block.payload)
        values.update(zip(block.indices, block.data.tolist()[:done], strict=False))
        blocks.give_back(block)
        position += done
        if done < len(block.indices):
            if not skip_refused:
                raise MsrRefused(request.name, fd.kind, wanted[position], position, len(wanted))
            position += 1
    return values


def write_msrs(
    fd: F, request: Ioctl[F, kvm_msrs], blocks: MsrBlocks, values: Mapping[int, int]
) -> int:
    """Set the MSRs in the mapping's order; return how many KVM took before it refused one."""
    indices, data = tuple(values), array(_U64, list(values.values()))
    taken = 0
    while taken < len(indices):
        block = blocks.take(indices[taken : taken + MOST_IN_ONE_CALL])
        block.data[:] = data[taken : taken + MOST_IN_ONE_CALL]
        done = fd.call(request, block.payload)
        blocks.give_back(block)
        taken += done
        if done < len(block.indices):
            break
    return taken
