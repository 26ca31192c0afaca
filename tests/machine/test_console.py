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
