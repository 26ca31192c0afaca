import pytest

from harness.machine.console import GuestExit, PortOut
from harness.machine.errors import MachineError
from harness.machine.guest_abi import DEBUG_EXIT_PORT, SERIAL_PORT
from harness.machine.pc_bus import IrqLines, KeyboardController, LatchPorts, PcBus, SystemControl


@pytest.fixture
def lines():
    return []


@pytest.fixture
def bus(lines):
    irqs = IrqLines(lambda line, level: lines.append((line, level)))
    return PcBus([KeyboardController(), SystemControl(), LatchPorts(), irqs])


@pytest.mark.parametrize("port", [0x80, 0xCF8, 0x5F0, 0x8900])
def test_writes_to_nothing_are_lost_and_reads_give_ones(bus, port):
    assert bus.out(port, 4, b"\1\2\3\4") == []
    assert bus.read(port, 4) == b"\xff" * 4


def test_the_guest_can_print_and_end_the_machine(bus):
    assert bus.out(SERIAL_PORT, 1, b"hi") == []
    assert bus.serial.text == "hi"
    assert bus.out(DEBUG_EXIT_PORT, 4, b"\5\0\0\0") == [GuestExit(5)]


@pytest.mark.parametrize(("port", "value"), [(0x64, 0xFE), (0x92, 0x01), (0xCF9, 0x06)])
def test_a_reset_is_seen(bus, port, value):
    assert bus.out(port, 1, bytes([value])) == [PortOut(port, 1, value)]


@pytest.mark.parametrize(("port", "value"), [(0x64, 0xFF), (0x64, 0xD1), (0x92, 0x02), (0xCF9, 2)])
def test_what_only_looks_like_a_reset_is_none(bus, port, value):
    assert bus.out(port, 1, bytes([value])) == []


def test_pci_addresses_are_no_reset(bus):
    assert bus.out(0xCF9, 4, b"\x06\0\0\0") == []


def test_waiting_for_the_keyboard_controller_ends(bus):
    assert bus.read(0x64, 1)[0] & 0x03 == 0


def test_a20_is_open(bus):
    assert bus.read(0x92, 1) == b"\x02"


def test_the_latch_keeps_what_each_port_was_given(bus):
    bus.out(0xE0, 4, b"\x11\x22\x33\x44")
    bus.out(0xE1, 2, b"\xaa\xbb")
    assert bus.read(0xE0, 4) == b"\x11\xaa\xbb\x44"
    assert bus.read(0xE3, 1) == b"\x44"
    bus.out(0xE4, 4, b"\x01\x02\x03\x04")
    assert bus.read(0xE0, 4) == b"\x11\xaa\xbb\x44"


def test_interrupt_lines_follow_their_ports(bus, lines):
    bus.out(0x200E, 4, b"\1\0\0\0")
    bus.out(0x200E, 4, bytes(4))
    assert lines == [(14, 1), (14, 0)]


def test_the_latch_travels():
    latch, other = LatchPorts(), LatchPorts()
    latch.write(0xE1, 2, 0xABCD)
    other.restore(latch.state())
    assert other.read(0xE0, 4) == 0xABCD00


@pytest.mark.parametrize("state", [{}, {"latch": "00"}, {"latch": 5}])
def test_a_malformed_latch_is_named(state):
    with pytest.raises(MachineError, match="pc-testdev: malformed state"):
        LatchPorts().restore(state)
