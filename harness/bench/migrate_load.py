"""The machines that the migration benchmarks move: half of their memory in use, pages dirtied.

`PlainLoad` is the machine of migrate_loops.c, bit for bit where it matters; `NestedLoad` has L2
running in one of the same size. Standard library only.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Protocol

from harness.errors import HarnessError
from harness.machine.addresses import Gpa
from harness.machine.console import PortOut
from harness.machine.loader import EntryMode, raw_image
from harness.machine.machine import Machine
from harness.machine.memory import PAGE_SIZE
from harness.migrate.shape import backings_of
from harness.proxy.machine import ProxyMachine
from kvm_ioctl.handles import Kvm

RUN_TIMEOUT_S: Final = 30.0

# As in migrate_loops.c.
FIRST_BYTE: Final = 1 << 20
BLOCK_PAGES: Final = 32
_CODE_GPA: Final = Gpa(0xA000)
_FILL_BYTE: Final = b"\x5a"

_WORD_BYTES: Final = 8
_TABLES_BYTES: Final = 4 << 20
"""Left to proxies for what they take after the load."""


@dataclass(frozen=True)
class Size:
    """How much there is to move."""

    memory_mib: int
    dirty_pages: int
    """That are left when the machine is paused."""
    stride_pages: int = 2
    """From one to the next: with 1 they are one piece, with 2 nothing of them can be joined."""

    @property
    def stride_bytes(self) -> int:
        """From one dirty page to the next."""
        return self.stride_pages * PAGE_SIZE

    def __str__(self) -> str:
        pages = "pages in one piece" if self.stride_pages == 1 else "pages"
        return f"{self.memory_mib} MiB half in use, {self.dirty_pages} {pages} left"


class Load(Protocol):
    """A machine that can be moved again and again."""

    title: str
    """What a row says of it."""

    @property
    def machine(self) -> Machine:
        """The machine."""

    def dirty(self) -> None:
        """Have the guest write to as many pages as the size says."""


class PlainLoad:
    """A guest without inner ones."""

    title = "a plain VM"

    def __init__(self, kvm: Kvm, size: Size) -> None:
        image = raw_image(_dirtying_code(size), _CODE_GPA, EntryMode.LONG64)
        self.machine = Machine(kvm, image=image, memory_mib=size.memory_mib, irqchip=True)
        with _closed_on_error(self.machine):
            _fill(self.machine, FIRST_BYTE, size.memory_mib << 20)
            self.dirty()  # what is touched first is mapped now

    def dirty(self) -> None:
        """Run the guest once over its pages."""
        event = self.machine.vcpus[0].run(RUN_TIMEOUT_S)
        if not isinstance(event, PortOut):
            raise HarnessError(f"the guest that dirties pages stopped with {event}")


class NestedLoad:
    """A guest with L2 running, which dirties the pages."""

    title = "a VM with L2 running"

    def __init__(self, kvm: Kvm, size: Size) -> None:
        self.machine: ProxyMachine = ProxyMachine(kvm, memory_mib=size.memory_mib, irqchip=True)
        with _closed_on_error(self.machine):
            self._l2 = self.machine.level(2)
            self._l2.ping()
            # The rest of memory, but for some that the levels may want later.
            at, end = self.machine.pages.take(_TABLES_BYTES), size.memory_mib << 20
            self._first = at + _TABLES_BYTES
            _fill(self.machine, self._first, end)
            if self._first + size.dirty_pages * size.stride_bytes > end:
                raise HarnessError(f"{size}: more pages than there are")
            self._op = self._l2.exec_op(
                _dirtying_loop(size), rdi=self._first, rcx=size.dirty_pages, rax=0
            )
            self.dirty()

    def dirty(self) -> None:
        """Have L2 go over its pages once."""
        self._l2.do(self._op).regs  # noqa: B018 - raises GuestFault


def _dirtying_code(size: Size) -> bytes:
    """Return `_dirtying_loop` and a port exit, for ever."""
    body = b"\xbf" + FIRST_BYTE.to_bytes(4, "little")  # mov $FIRST_BYTE, %edi
    body += b"\xb9" + size.dirty_pages.to_bytes(4, "little")  # mov $pages, %ecx
    body += _dirtying_loop(size) + b"\xe6\xf0"  # out %al, $0xf0
    return body + bytes([0xEB, 256 - len(body) - 2])  # jmp to the start


def _dirtying_loop(size: Size) -> bytes:
    return (
        b"\xff\x07"  # incl (%rdi)
        + b"\x81\xc7" + size.stride_bytes.to_bytes(4, "little")  # add $stride, %edi
        + b"\xff\xc9"  # dec %ecx
        + b"\x75\xf4"  # jnz to the incl
    )  # fmt: skip


@contextlib.contextmanager
def _closed_on_error(machine: Machine) -> Iterator[None]:
    try:
        yield
    except BaseException:
        machine.close()
        raise


def _fill(machine: Machine, first: int, end: int) -> None:
    """Write every other block of pages full, each page beginning with its number."""
    rest = _FILL_BYTE * (PAGE_SIZE - _WORD_BYTES)
    [backing] = backings_of(machine)
    for page in range(first // PAGE_SIZE, end // PAGE_SIZE):
        if not page // BLOCK_PAGES % 2:
            at = page * PAGE_SIZE
            backing[at : at + PAGE_SIZE] = page.to_bytes(_WORD_BYTES, "little") + rest


def witness_of(machine: Machine) -> int:
    """Return the sum of the first words of all pages, the first MiB apart."""
    return sum(map(_sum_of_first_words, backings_of(machine)))


def _sum_of_first_words(backing: mmap.mmap) -> int:
    with memoryview(backing) as raw, raw.cast("Q") as words:
        return sum(words[FIRST_BYTE // _WORD_BYTES :: PAGE_SIZE // _WORD_BYTES])
