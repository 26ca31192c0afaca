"""The UART as Linux's 8250 driver uses it: what it identifies, when it interrupts."""

import pytest

from harness.machine.errors import MachineError
from harness.machine.uart import COM1_IRQ, COM1_PORT, Line, Uart

THR, IER, IIR, LCR, MCR, LSR, MSR, SCR = range(COM1_PORT, COM1_PORT + 8)
OUT2, LOOP = 0x08, 0x10
RECEIVED, EMPTY = 0x01, 0x02
NONE_PENDING, EMPTY_PENDING, RECEIVED_PENDING = 0x01, 0x02, 0x04
DATA_READY = 0x01


@pytest.fixture
def levels():
    return []


@pytest.fixture
def uart(levels):
    return Uart(COM1_PORT, Line(COM1_IRQ, lambda irq, level: levels.append((irq, level))))


def up(uart, enable):
    """Do what a driver does when it opens the port."""
    uart.write(MCR, OUT2)
    uart.write(IER, enable)


def test_what_is_sent_is_kept(uart):
    for byte in b"hello":
        uart.write(THR, byte)
    assert uart.text == "hello"


def test_what_is_sent_may_go_elsewhere(levels):
    sent = []
    uart = Uart(COM1_PORT, Line(COM1_IRQ, lambda irq, level: None), sent.append)
    uart.write(THR, 65)
    assert sent == [65]
    assert uart.text == ""


def test_the_driver_finds_a_16550a(uart):
    uart.write(MCR, LOOP | 0x0A)
    assert uart.read(MSR) & 0xF0 == 0x90
    uart.write(MCR, 0)
    uart.write(IIR, 0x01)
    assert uart.read(IIR) >> 6 == 3
    uart.write(IIR, 0)
    assert uart.read(IIR) >> 6 == 0


def test_looped_back_bytes_are_received_and_not_sent(uart):
    uart.write(MCR, LOOP)
    uart.write(THR, 0x5A)
    assert uart.text == ""
    assert uart.read(LSR) & DATA_READY
    assert uart.read(THR) == 0x5A
    assert not uart.read(LSR) & DATA_READY


def test_received_bytes_raise_the_line_until_all_are_read(uart, levels):
    up(uart, RECEIVED)
    uart.receive(b"ab")
    assert levels == [(COM1_IRQ, 1)]
    assert uart.read(IIR) & 0xF == RECEIVED_PENDING
    assert uart.read(THR) == ord("a")
    assert levels == [(COM1_IRQ, 1)]
    assert uart.read(THR) == ord("b")
    assert levels == [(COM1_IRQ, 1), (COM1_IRQ, 0)]
    assert uart.read(IIR) & 0xF == NONE_PENDING


def test_without_out2_nothing_reaches_the_line(uart, levels):
    uart.write(IER, RECEIVED)
    uart.receive(b"a")
    assert levels == []
    uart.write(MCR, OUT2)
    assert levels == [(COM1_IRQ, 1)]


def test_an_empty_transmitter_is_told_once(uart, levels):
    up(uart, EMPTY)
    assert levels == [(COM1_IRQ, 1)]
    assert uart.read(IIR) & 0xF == EMPTY_PENDING
    assert levels == [(COM1_IRQ, 1), (COM1_IRQ, 0)]
    assert uart.read(IIR) & 0xF == NONE_PENDING
    uart.write(THR, 65)
    assert levels[-1] == (COM1_IRQ, 1)


def test_enabling_the_interrupt_again_tells_again(uart):
    """serial8250_do_startup tests for UARTs that do not, and works around them by a timer."""
    up(uart, EMPTY)
    uart.read(IIR)
    uart.write(IER, 0)
    uart.write(IER, EMPTY)
    assert uart.read(IIR) & 0xF == EMPTY_PENDING


def test_clearing_the_fifo_loses_nothing_that_waits_on_the_line(uart):
    uart.receive(b"x")
    uart.write(IIR, 0x07)
    assert uart.read(THR) == ord("x")


def test_the_divisor_is_behind_dlab(uart):
    uart.write(LCR, 0x80)
    uart.write(THR, 12)
    uart.write(IER, 0)
    assert uart.read(THR) == 12
    uart.write(LCR, 3)
    assert uart.text == ""
    assert uart.read(SCR) == 0


def test_state_travels(uart, levels):
    up(uart, RECEIVED | EMPTY)
    uart.write(SCR, 0x77)
    uart.receive(b"abc")
    seen = []
    other = Uart(COM1_PORT, Line(COM1_IRQ, lambda irq, level: seen.append(level)))
    other.restore(uart.state())
    assert other.state() == uart.state()
    assert other.read(SCR) == 0x77
    assert bytes(other.read(THR) for _ in range(3)) == b"abc"
    # The line was up at the source, and KVM knows: there is nothing to raise, the sender's
    # interrupt is still pending.
    assert seen == []
    other.read(IIR)
    assert seen == [0]


def test_a_byte_that_was_looped_back_travels(uart):
    uart.write(MCR, 0x10)
    uart.write(THR, 0x42)
    other = Uart(COM1_PORT, Line(COM1_IRQ, lambda irq, level: None))
    other.restore(uart.state())
    assert other.read(LSR) & 1
    assert other.read(THR) == 0x42


GOOD = {
    "registers": "00" * 8,
    "divisor": "0100",
    "received": [],
    "fifos": False,
    "transmitter_empty": False,
}


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"registers": "zz"},
        {"registers": "00" * 8, "divisor": "0100", "received": [256]},
        {**GOOD, "looped_back": 256},
        {**GOOD, "fifos": None, "received": None},
    ],
)
def test_a_malformed_state_is_named(uart, state):
    with pytest.raises(MachineError, match="UART 0x3f8: malformed state"):
        uart.restore(state)
