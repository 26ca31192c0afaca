"""Binary statistics of a VM or vCPU (KVM_GET_STATS_FD, KVM_CAP_BINARY_STATS_FD).

The file holds a header, an id, descriptors and values; only the values change.
"""

from __future__ import annotations

import ctypes
import os
import struct
from dataclasses import dataclass

from kvm_ioctl.linux_kvm import (
    KVM_STATS_BASE_MASK,
    KVM_STATS_TYPE_MASK,
    KVM_STATS_UNIT_MASK,
    StatsBase,
    StatsType,
    StatsUnit,
    kvm_stats_desc,
    kvm_stats_header,
)
from kvm_ioctl.request import Fd

_VALUE_BYTES = 8


class StatsError(ValueError):
    """The statistics file does not look as the kernel documents it."""


@dataclass(frozen=True, slots=True)
class StatDescriptor:
    """What one statistic is: its values are counted in ``unit * base ** exponent``."""

    name: str
    type: StatsType | int
    unit: StatsUnit | int
    base: StatsBase | int
    exponent: int
    size: int
    """Number of values; more than one for histograms."""
    offset: int
    """Bytes from the start of the values."""
    bucket_size: int


def _named(kind: type[StatsType] | type[StatsUnit] | type[StatsBase], value: int) -> int:
    """Return the value as the enum's member, or as it is where a newer kernel has more."""
    try:
        return kind(value)
    except ValueError:
        return value


def parse_descriptors(header: kvm_stats_header, block: bytes) -> list[StatDescriptor]:
    """Parse the descriptor block; raise StatsError if it is shorter than the header says."""
    step = ctypes.sizeof(kvm_stats_desc) + header.name_size
    if len(block) < step * header.num_desc:
        raise StatsError(f"{header.num_desc} statistics descriptors do not fit {len(block)} bytes")
    return [_descriptor(block[i * step : (i + 1) * step]) for i in range(header.num_desc)]


def _descriptor(data: bytes) -> StatDescriptor:
    desc = kvm_stats_desc.from_bytes(data)
    return StatDescriptor(
        name=bytes(desc.name).split(b"\0", 1)[0].decode(errors="replace"),
        type=_named(StatsType, desc.flags & KVM_STATS_TYPE_MASK),
        unit=_named(StatsUnit, desc.flags & KVM_STATS_UNIT_MASK),
        base=_named(StatsBase, desc.flags & KVM_STATS_BASE_MASK),
        exponent=desc.exponent,
        size=desc.size,
        offset=desc.offset,
        bucket_size=desc.bucket_size,
    )


def parse_values(descriptors: list[StatDescriptor], block: bytes) -> dict[str, int | list[int]]:
    """Parse the value block: an int per statistic, a list where there are several values."""
    values: dict[str, int | list[int]] = {}
    for desc in descriptors:
        if desc.offset + desc.size * _VALUE_BYTES > len(block):
            raise StatsError(
                f"statistic {desc.name} is outside of the {len(block)} bytes of values"
            )
        numbers = struct.unpack_from(f"={desc.size}Q", block, desc.offset)
        values[desc.name] = numbers[0] if desc.size == 1 else list(numbers)
    return values


class StatsFd(Fd):
    """An fd made by KVM_GET_STATS_FD; ``id`` and ``descriptors`` are read once."""

    kind = "stats"

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        try:
            data = self._read_at(0, ctypes.sizeof(kvm_stats_header))
            header = self.header = kvm_stats_header.from_bytes(data)
            name = self._read_at(header.id_offset, header.name_size)
            self.id = name.split(b"\0", 1)[0].decode(errors="replace")
            block_bytes = (ctypes.sizeof(kvm_stats_desc) + header.name_size) * header.num_desc
            block = self._read_at(header.desc_offset, block_bytes)
            self.descriptors = parse_descriptors(header, block)
        except BaseException:
            self.close()
            raise
        ends = (desc.offset + desc.size * _VALUE_BYTES for desc in self.descriptors)
        self._value_bytes = max(ends, default=0)

    def read(self) -> dict[str, int | list[int]]:
        """Read all statistics as they are now, by name."""
        block = self._read_at(self.header.data_offset, self._value_bytes)
        return parse_values(self.descriptors, block)

    def _read_at(self, offset: int, size_bytes: int) -> bytes:
        data = os.pread(self.fileno(), size_bytes, offset)
        if len(data) < size_bytes:
            raise StatsError(f"statistics end after {len(data)} of {size_bytes} bytes at {offset}")
        return data
