import struct

import pytest

from harness.machine.errors import MachineError
from harness.machine.fw_cfg import FwCfg, FwCfgKey, pc_fw_cfg
from harness.machine.memory_map import e820_map

SELECT, DATA = 0x510, 0x511


@pytest.fixture
def device():
    return pc_fw_cfg(3, 5 << 30, e820_map(5 << 30), "image one two")


def item(device, key, size):
    device.write(SELECT, 2, key)
    return bytes(device.read(DATA, 1) for _ in range(size))


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (FwCfgKey.FW_CFG_SIGNATURE, b"QEMU"),
        (FwCfgKey.FW_CFG_ID, struct.pack("<I", 1)),
        (FwCfgKey.FW_CFG_RAM_SIZE, struct.pack("<Q", 5 << 30)),
        (FwCfgKey.FW_CFG_NB_CPUS, b"\3\0"),
        (FwCfgKey.FW_CFG_MAX_CPUS, b"\3\0"),
        (FwCfgKey.FW_CFG_CMDLINE_SIZE, struct.pack("<I", 14)),
        (FwCfgKey.FW_CFG_CMDLINE_DATA, b"image one two\0"),
    ],
)
def test_items_read_as_in_qemu_and_then_as_zeroes(device, key, expected):
    assert item(device, key, len(expected) + 2) == expected + b"\0\0"


def test_selecting_again_starts_again(device):
    assert item(device, 0, 2) == b"QE"
    assert item(device, 0, 4) == b"QEMU"


def test_an_unknown_item_reads_as_zeroes(device):
    item(device, 0, 1)
    assert item(device, 0x7FFF, 4) == bytes(4)


def test_a_write_of_one_byte_does_not_select(device):
    item(device, 0, 1)
    device.write(SELECT, 1, 5)
    assert device.read(DATA, 1) == ord("E")


def directory(device):
    (count,) = struct.unpack(">I", item(device, FwCfgKey.FW_CFG_FILE_DIR, 4))
    entries = item(device, FwCfgKey.FW_CFG_FILE_DIR, 4 + 64 * count)[4:]
    return {
        name.rstrip(b"\0").decode(): (size, key)
        for size, key, _, name in struct.iter_unpack(">IHH56s", entries)
    }


def test_the_memory_map_is_a_file(device):
    size, key = directory(device)["etc/e820"]
    entries = list(struct.iter_unpack("<QQI", item(device, key, size)))
    assert entries == [(r.gpa, r.size_bytes, r.kind) for r in e820_map(5 << 30)]
    assert key >= FwCfgKey.FW_CFG_FILE_FIRST


def test_files_are_in_the_order_of_their_names():
    device = FwCfg({}, {"b": b"2", "a": b"11"})
    assert directory(device) == {"a": (2, 0x20), "b": (1, 0x21)}
    assert item(device, 0x21, 1) == b"2"


def test_a_name_that_does_not_fit_is_refused():
    with pytest.raises(MachineError, match="longer than 55 bytes"):
        FwCfg({}, {"x" * 56: b""})


def test_how_far_it_was_read_travels(device):
    assert item(device, FwCfgKey.FW_CFG_SIGNATURE, 2) == b"QE"
    other = pc_fw_cfg(3, 5 << 30, e820_map(5 << 30), "image one two")
    other.restore(device.state())
    assert bytes(other.read(DATA, 1) for _ in range(3)) == b"MU\0"


@pytest.mark.parametrize("state", [{}, {"key": 0}, {"key": -1, "next": 0}, {"key": 0, "next": "x"}])
def test_a_malformed_state_is_named(device, state):
    with pytest.raises(MachineError, match="fw_cfg: malformed state"):
        device.restore(state)
