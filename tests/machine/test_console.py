import pytest

from harness.machine.console import GuestExit, PortBus, PortOut
from harness.machine.guest_abi import DEBUG_EXIT_PORT, SERIAL_PORT, STAGE_PORT


def test_what_the_guest_prints_is_kept():
    bus = PortBus()
    assert bus.out(SERIAL_PORT, 1, b"hi\xc3\xa9\xff") == []
    assert bus.serial.text == "hi\u00e9\ufffd"


def test_the_transmitter_is_always_empty():
    assert PortBus().read(SERIAL_PORT + 5, 1) == b"\x60"


def test_setting_the_speed_prints_nothing():
    bus = PortBus()
    bus.out(SERIAL_PORT + 3, 1, b"\x83")
    bus.out(SERIAL_PORT, 1, b"\x0c")
    bus.out(SERIAL_PORT + 1, 1, b"\x00")
    assert bus.read(SERIAL_PORT, 1) == b"\x0c"
    bus.out(SERIAL_PORT + 3, 1, b"\x03")
    assert bus.serial.text == ""
    assert bus.read(SERIAL_PORT, 1) == b"\0"
    assert bus.read(SERIAL_PORT + 3, 1) == b"\x03"


def test_the_debug_exit_port_ends_the_machine_as_in_qemu():
    (seen,) = PortBus().out(DEBUG_EXIT_PORT, 1, b"\x2a")
    assert seen == GuestExit(42)
    assert seen.exit_code == 85


def test_other_ports_are_reported_one_by_one():
    seen = PortBus().out(STAGE_PORT, 2, b"\x01\x00\x02\x01")
    assert seen == [PortOut(STAGE_PORT, 2, 1), PortOut(STAGE_PORT, 2, 0x102)]


def test_a_port_without_device_reads_all_ones():
    assert PortBus().read(0x80, 4) == b"\xff" * 4


def test_loop_back_returns_what_is_sent_and_prints_nothing():
    bus = PortBus()
    bus.out(SERIAL_PORT + 4, 1, b"\x13")
    bus.out(SERIAL_PORT, 1, b"\xae")
    assert bus.read(SERIAL_PORT + 5, 1) == b"\x61"
    assert bus.read(SERIAL_PORT, 1) == b"\xae"
    assert bus.read(SERIAL_PORT + 5, 1) == b"\x60"
    bus.out(SERIAL_PORT + 4, 1, b"\x03")
    bus.out(SERIAL_PORT, 1, b"x")
    assert bus.serial.text == "x"


def test_what_is_new_on_the_console_can_be_told():
    bus = PortBus()
    bus.out(SERIAL_PORT, 1, b"one")
    assert bus.serial.printed_since(0) == b"one"
    bus.out(SERIAL_PORT, 1, b"two")
    assert bus.serial.printed_since(3) == b"two"
    assert bus.serial.printed_since(6) == b""


@pytest.mark.parametrize(("control", "status"), [(0x1A, 0x90), (0x15, 0x60), (0x10, 0), (3, 0xB0)])
def test_modem_lines_are_looped_back(control, status):
    """How the 8250 drivers of Linux and Xen look for a UART."""
    bus = PortBus()
    bus.out(SERIAL_PORT + 4, 1, bytes([control]))
    assert bus.read(SERIAL_PORT + 6, 1) == bytes([status])


def test_fifos_are_seen_once_they_are_enabled():
    bus = PortBus()
    assert bus.read(SERIAL_PORT + 2, 1) == b"\x01"
    bus.out(SERIAL_PORT + 2, 1, b"\x01")
    assert bus.read(SERIAL_PORT + 2, 1) == b"\xc1"


def test_the_interrupt_enable_register_has_four_bits():
    bus = PortBus()
    bus.out(SERIAL_PORT + 1, 1, b"\xff")
    assert bus.read(SERIAL_PORT + 1, 1) == b"\x0f"
