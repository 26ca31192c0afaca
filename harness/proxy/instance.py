"""One proxy's 64 KiB in guest memory: how Python sets it up and talks through it."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from harness.errors import ScenarioFailure
from harness.machine.addresses import Gpa
from harness.machine.memory import GuestMemory
from harness.proxy.layout import (
    CODE_OFFSET,
    CODE_SIZE,
    IDT_OFFSET,
    INSTANCE_MAGIC,
    NMI_STACK_TOP,
    OPS_PER_PAGE,
    PROGRAM_OFFSET,
    RESULTS_OFFSET,
    SCRATCH_OFFSET,
    STACK_TOP,
    TABLES_OFFSET,
    TRAP_STACK_TOP,
    TSS_OFFSET,
    Eoi,
    proxy_instance,
)
from harness.proxy.ops import Op, Policy
from harness.proxy.paging import PAGE, PageAllocator
from harness.proxy.program import NMI, OP_SIZE, Result, decode_results, encode
from harness.svm.msrs import Cr0, Cr4, Efer

TSS_LIMIT: Final = 0x67
GDT_LIMIT: Final = 0xFF
IDT_LIMIT: Final = 0xFFF

_GDT: Final = (
    0,
    0x00AF_9B00_0000_FFFF,  # GDT_CS64
    0x00CF_9300_0000_FFFF,  # GDT_DS
    0x00CF_9B00_0000_FFFF,  # GDT_CS32
    0x00CF_F300_0000_FFFF,  # GDT_USER_DS
    0x00AF_FB00_0000_FFFF,  # GDT_USER_CS64
    0x00CF_FB00_0000_FFFF,  # GDT_USER_CS32
)
_GDT_16: Final = (0x000F_9B00_0000_FFFF, 0x000F_9300_0000_FFFF)  # GDT_CS16, GDT_DS16

PROXY_CR0: Final = Cr0.of(PE=1, MP=1, ET=1, NE=1, WP=1, PG=1)
PROXY_CR4: Final = Cr4.of(PAE=1, OSFXSR=1, OSXMMEXCPT=1)


@dataclass(frozen=True)
class Context:
    """The state that a proxy is entered in, whoever loads it: KVM_SET_SREGS, VMRUN, the SMI."""

    rip: int
    rsp: int
    rdi: int
    cr3: int
    efer: int
    gdt_base: int
    idt_base: int
    tss_base: int
    cr0: int = PROXY_CR0
    cr4: int = PROXY_CR4


class Instance:
    """A proxy's mailbox, tables and stacks."""

    def __init__(
        self, memory: GuestMemory, pages: PageAllocator, gpa: Gpa, name: str, as_id: int = 0
    ) -> None:
        self.memory = memory
        self.gpa = gpa
        self.name = name
        self.as_id = as_id
        self.sent: list[Op] = []
        """The program that it was given last."""
        self._pages = pages
        self._buffers = (int(gpa) + PROGRAM_OFFSET, int(gpa) + RESULTS_OFFSET, OPS_PER_PAGE)
        self._code_at = 0

    def set_up(self, vcpu: int, level: int, cr3: int, efer: int) -> None:
        """Write header, GDT and TSS; the proxy itself makes its IDT."""
        policy = bytearray([Policy.FAULT] * 32 + [Policy.COUNT_EOI] * 224)
        policy[NMI] = Policy.COUNT
        header = proxy_instance(
            magic=INSTANCE_MAGIC, vcpu=vcpu, level=level, cr3=cr3, cr4=PROXY_CR4, cr0=PROXY_CR0
        )
        header.self = self.gpa
        header.efer = efer & ~Efer.LMA.mask
        header.policy[:] = bytes(policy)
        self.memory.write_struct(self.gpa, header, self.as_id)
        self._write_tables()

    def context(self, rip: int, cr3: int, efer: int) -> Context:
        """Return the state to enter this instance in."""
        return Context(
            rip=rip,
            rsp=self.gpa + STACK_TOP,
            rdi=self.gpa,
            cr3=cr3,
            efer=efer,
            gdt_base=self.gpa + TABLES_OFFSET,
            idt_base=self.gpa + IDT_OFFSET,
            tss_base=self.gpa + TSS_OFFSET,
        )

    def _write_tables(self) -> None:
        tss = self.gpa + TSS_OFFSET
        low = TSS_LIMIT | (tss & 0xFF_FFFF) << 16 | 0x8B << 40 | (tss >> 24 & 0xFF) << 56
        gdt = struct.pack(f"<{len(_GDT)}Q", *_GDT) + struct.pack("<QQ", low, tss >> 32)
        gdt += struct.pack("<QQ", *_GDT_16)
        self._write(TABLES_OFFSET, gdt)
        ring0, ist1, ist2 = (self.gpa + top for top in (STACK_TOP, TRAP_STACK_TOP, NMI_STACK_TOP))
        data = struct.pack("<IQ", 0, ring0).ljust(0x24, b"\0") + struct.pack("<QQ", ist1, ist2)
        # The I/O map base beyond the limit: no port is allowed at CPL 3.
        self._write(TSS_OFFSET, data.ljust(0x66, b"\0") + struct.pack("<H", TSS_LIMIT + 1))

    # Programs

    def send(self, ops: Sequence[Op]) -> None:
        """Put a program into the mailbox; it runs when the proxy is resumed."""
        self._reserve(len(ops))
        program, results, _ = self._buffers
        self.memory.write(Gpa(program), encode(ops), self.as_id)
        self.memory.write(Gpa(results), bytes(len(ops) * OP_SIZE), self.as_id)
        self.sent = list(ops)
        self["program"], self["results"], self["count"] = program, results, len(ops)
        self["request"] = self["request"] + 1

    @property
    def idle(self) -> bool:
        """Whether the proxy has done everything that it was sent."""
        return self["request"] == self["done"]

    def results(self) -> list[Result]:
        """Return the results of the last program.

        Raises ScenarioFailure: the mailbox was scribbled over.
        """
        self.check()
        size = len(self.sent) * OP_SIZE
        return decode_results(self.sent, self.memory.read(Gpa(self._buffers[1]), size, self.as_id))

    def check(self) -> None:
        """Look whether the mailbox is what Python made it.

        Raises ScenarioFailure: it is not.
        """
        expected = {
            "magic": INSTANCE_MAGIC,
            "self": int(self.gpa),
            "program": self._buffers[0],
            "results": self._buffers[1],
            "count": len(self.sent),
        }
        if not self.sent:
            expected = {name: expected[name] for name in ("magic", "self")}
        for name, value in expected.items():
            if self[name] != value:
                raise ScenarioFailure(
                    f"{self.name}: its mailbox was scribbled over: "
                    f"{name} is {self[name]:#x}, was {value:#x}"
                )

    def _reserve(self, count: int) -> None:
        if count > self._buffers[2]:
            capacity = max(count, 2 * self._buffers[2])
            size = capacity * OP_SIZE
            # Ordinary memory, for the SMI handler too: it sees that as well.
            self._buffers = (int(self._pages.take(size)), int(self._pages.take(size)), capacity)

    # Single fields

    def __getitem__(self, name: str) -> int:
        """Return a field of the header."""
        place: Any = getattr(proxy_instance, name)
        return self.memory.read_int(Gpa(self.gpa + place.offset), place.size, self.as_id)

    def __setitem__(self, name: str, value: int) -> None:
        """Write a field of the header."""
        place: Any = getattr(proxy_instance, name)
        self.memory.write_int(Gpa(self.gpa + place.offset), place.size, value, self.as_id)

    def header(self) -> proxy_instance:
        """Return a copy of the whole header."""
        return self.memory.read_struct(proxy_instance, self.gpa, self.as_id)

    def counted(self, vector: int) -> int:
        """Return how often a vector was raised."""
        at = proxy_instance.vectors.offset + 4 * vector
        return self.memory.read_int(Gpa(self.gpa + at), 4, self.as_id)

    def vector_log(self) -> list[int]:
        """Return the last vectors in order; up to 64, from oldest to newest."""
        header = self.header()
        log, count = bytes(header.log), header.log_count
        if count <= len(log):
            return list(log[:count])
        at = count % len(log)
        return list(log[at:] + log[:at])

    def clear_vectors(self) -> None:
        """Forget all counts and the log."""
        vectors: Any = proxy_instance.vectors
        self.memory.write(Gpa(self.gpa + vectors.offset), bytes(vectors.size), self.as_id)
        self["log_count"] = 0

    def set_policy(self, vector: int, policy: Policy) -> None:
        """Say what the handler of a vector does from now on."""
        at = proxy_instance.policy.offset + vector
        self.memory.write_int(Gpa(self.gpa + at), 1, policy, self.as_id)

    def set_eoi(self, how: Eoi) -> None:
        """Say how handlers reach the local APIC."""
        self["eoi"] = how

    # Code and data of scenarios

    @property
    def scratch_gva(self) -> int:
        """24 KiB that nothing else uses."""
        return self.gpa + SCRATCH_OFFSET

    @property
    def code_gva(self) -> int:
        """A page for code that `put_code` fills."""
        return self.gpa + CODE_OFFSET

    def put_code(self, code: bytes) -> int:
        """Write code where the proxy may execute it; return its address.

        Old code is overwritten when the page is full, but not by less than a page of newer code.
        """
        size = -(-len(code) // 16) * 16
        if size > PAGE:
            at = self._pages.take(size)
            self.memory.write(at, code)
            return int(at)
        if self.as_id or self._code_at + size > CODE_SIZE:
            if self.as_id:
                # SMRAM has its entry there.
                at = self._pages.take()
                self.memory.write(at, code)
                return int(at)
            self._code_at = 0
        at = Gpa(self.code_gva + self._code_at)
        self.memory.write(at, code)
        self._code_at += size
        return int(at)

    def _write(self, offset: int, data: bytes) -> None:
        self.memory.write(Gpa(self.gpa + offset), data, self.as_id)
