"""QEMU's firmware configuration device, the port interface (QEMU docs/specs/fw_cfg).

DMA is declared absent, and nothing can be written.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any, Final

from harness.machine.device_state import taking_state
from harness.machine.errors import MachineError
from harness.machine.memory_map import MemoryRange


class FwCfgKey(IntEnum):
    """Selector keys (QEMU include/standard-headers/linux/qemu_fw_cfg.h, hw/nvram/fw_cfg_keys.h)."""

    FW_CFG_SIGNATURE = 0x00
    FW_CFG_ID = 0x01
    FW_CFG_RAM_SIZE = 0x03
    FW_CFG_NOGRAPHIC = 0x04
    FW_CFG_NB_CPUS = 0x05
    FW_CFG_MAX_CPUS = 0x0F
    FW_CFG_CMDLINE_SIZE = 0x14
    FW_CFG_CMDLINE_DATA = 0x15
    FW_CFG_FILE_DIR = 0x19
    FW_CFG_FILE_FIRST = 0x20
    FW_CFG_IRQ0_OVERRIDE = 0x8002
    """IRQ 0 is at pin 2 of the I/O APIC."""


FW_CFG_SIGNATURE_TEXT: Final = b"QEMU"
_VERSION_TRADITIONAL = 1 << 0
"""FW_CFG_ID without FW_CFG_VERSION_DMA."""

_FILE_ENTRY = struct.Struct(">IHH56s")
"""struct fw_cfg_file: size, select, reserved, name; big-endian, unlike the numeric items."""
_E820_ENTRY = struct.Struct("<QQI")


class FwCfg:
    """Selector at port 0x510, data byte by byte at 0x511."""

    ports: Final = range(0x510, 0x512)

    def __init__(self, items: Mapping[int, bytes], files: Mapping[str, bytes]) -> None:
        self._items = {**items, **_file_items(files)}
        self._key = 0
        self._selected = b""
        self._next = 0

    def write(self, port: int, size_bytes: int, value: int) -> None:
        """Select an item; an unknown one reads as zeroes. Writes to the data port are lost."""
        if port == self.ports.start and size_bytes == 2:
            self._select(value)

    def _select(self, key: int, at: int = 0) -> None:
        self._key, self._selected, self._next = key, self._items.get(key, b""), at

    def state(self) -> dict[str, Any]:
        """Return what must travel with the guest, for JSON: how far it has read what."""
        return {"key": self._key, "next": self._next}

    def restore(self, state: dict[str, Any]) -> None:
        """Become what another one's `state` says; the items are those of this machine.

        Raises MachineError: it is malformed.
        """
        with taking_state("fw_cfg"):
            key, at = int(state["key"]), int(state["next"])
            if key < 0 or at < 0:
                raise ValueError(f"key {key}, next byte {at}")
        self._select(key, at)

    def read(self, port: int, size_bytes: int) -> int:
        """Return the next byte of the selected item, zero past its end."""
        if port == self.ports.start:
            return 0
        at, self._next = self._next, self._next + 1
        return self._selected[at] if at < len(self._selected) else 0


def pc_fw_cfg(
    vcpus: int, ram_bytes: int, memory_map: Sequence[MemoryRange], command_line: str
) -> FwCfg:
    """Return the device with what a PC's start-up code asks it for."""
    text = command_line.encode("utf-8", "surrogateescape") + b"\0"
    items: dict[int, bytes] = {
        FwCfgKey.FW_CFG_SIGNATURE: FW_CFG_SIGNATURE_TEXT,
        FwCfgKey.FW_CFG_ID: struct.pack("<I", _VERSION_TRADITIONAL),
        FwCfgKey.FW_CFG_RAM_SIZE: struct.pack("<Q", ram_bytes),
        FwCfgKey.FW_CFG_NOGRAPHIC: struct.pack("<H", 1),
        FwCfgKey.FW_CFG_NB_CPUS: struct.pack("<H", vcpus),
        FwCfgKey.FW_CFG_MAX_CPUS: struct.pack("<H", vcpus),
        FwCfgKey.FW_CFG_CMDLINE_SIZE: struct.pack("<I", len(text)),
        FwCfgKey.FW_CFG_CMDLINE_DATA: text,
        FwCfgKey.FW_CFG_IRQ0_OVERRIDE: struct.pack("<I", 1),
    }
    e820 = b"".join(_E820_ENTRY.pack(r.gpa, r.size_bytes, r.kind) for r in memory_map)
    return FwCfg(items, {"etc/e820": e820})


def _file_items(files: Mapping[str, bytes]) -> dict[int, bytes]:
    """Give every file a key, and make the directory.

    Raises MachineError: a name that does not fit.
    """
    items: dict[int, bytes] = {}
    directory = struct.pack(">I", len(files))
    for key, (name, data) in enumerate(sorted(files.items()), FwCfgKey.FW_CFG_FILE_FIRST):
        if len(name.encode()) > 55:
            raise MachineError(f"fw_cfg file name {name!r} is longer than 55 bytes")
        items[key] = data
        directory += _FILE_ENTRY.pack(len(data), key, 0, name.encode())
    items[FwCfgKey.FW_CFG_FILE_DIR] = directory
    return items
