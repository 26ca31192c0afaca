"""The operations that a proxy executes: one table for both ends.

An *instruction* is a line with its machine code: a thunk loads registers from the operation,
executes the code and stores the registers. A *control operation* is C in `guest_images/proxy.c`.
Opcodes, layouts and the code table of the guest's header are generated from here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Final

ARGUMENT_REGISTERS: Final = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "r8")
"""What an operation's arguments are loaded into, in order; its values come back from the same."""

MAX_CODE_BYTES: Final = 15
"""A slot of the guest's code table has 16 bytes and ends with RET."""

PAIR: Final = "edx:eax"
"""The value of an instruction that answers in two halves."""


class Control(IntEnum):
    """Opcodes of what is written in C."""

    NOP = 0x1000
    LOOP = 0x1001
    """Run the next `length` operations `rax` times, or until the word at `rbx` is `rcx`."""
    SPIN_UNTIL = 0x1002
    """Poll the word of `rdx` bytes at `rbx` until it is `rcx`, at most `rax` times."""
    EXEC = 0x1003
    """Call the code at `r8`; the other arguments are its registers."""
    SET_POLICY = 0x1004
    """Give vector `rax` the `Policy` `rcx`."""
    TRIPLE_FAULT = 0x1005
    WAIT_INTERRUPT = 0x1006
    """With interrupts on, wait until vector `rcx` was counted `rbx` times more; `rax` polls."""
    ENTER_GUEST = 0x1007
    """VMRUN of the VMCB at `rax`, registers at `rbx`, host state at `rcx`; see `EnterFlag`."""


class OpFlag(IntFlag):
    """Flags of any operation."""

    USER = 1 << 15
    """Execute at CPL 3."""


class LoopFlag(IntFlag):
    """Flags of LOOP."""

    STOP_ON_FAULT = 1 << 0


class WaitFlag(IntFlag):
    """Flags of WAIT_INTERRUPT."""

    HLT = 1 << 0
    """Halt between two looks, in place of PAUSE."""


class EnterFlag(IntFlag):
    """Flags of ENTER_GUEST."""

    HOST_STATE = 1 << 0
    """VMSAVE the host's and VMLOAD the guest's state before, and the reverse afterwards."""
    CLGI = 1 << 1
    STGI = 1 << 2
    """Set GIF again after #VMEXIT."""
    REPORT = 1 << 3
    """Report exit code, exit_info_1, exit_info_2 and exit_int_info, and add `rdx` to RIP."""


class Policy(IntEnum):
    """What the handler of a vector does."""

    FAULT = 0
    """Abandon the operation and report the exception."""
    COUNT = 1
    """Count it and go on."""
    COUNT_EOI = 2
    """Count it, tell the local APIC, go on."""


class Status(IntEnum):
    """How an operation ended."""

    NOT_RUN = 0
    DONE = 1
    FAULT = 2
    BOUND = 3
    """A wait gave up."""
    BAD_OPCODE = 4


@dataclass(frozen=True)
class Op:
    """One operation, ready to be encoded."""

    opcode: int
    name: str
    args: tuple[int, ...] = ()
    flags: int = 0
    length: int = 0
    value: str | None = None
    """The register that holds its value, `edx:eax`, or None."""
    bits: int = 64
    """Bits of that value that count."""

    @property
    def user(self) -> Op:
        """The same at CPL 3."""
        return self.flagged(OpFlag.USER)

    def flagged(self, flags: int) -> Op:
        """Return the same with more flags."""
        return Op(
            self.opcode,
            self.name,
            self.args,
            self.flags | flags,
            self.length,
            self.value,
            self.bits,
        )

    def __str__(self) -> str:
        args = ", ".join(
            f"{register}={value:#x}"
            for register, value in zip(ARGUMENT_REGISTERS, self.args, strict=False)
            if value
        )
        return f"{self.name}({args}){'@CPL3' if self.flags & OpFlag.USER else ''}"


@dataclass(frozen=True)
class Instruction:
    """A line of the table; calling it makes an operation: `RDMSR(rcx=0x10)`."""

    name: str
    text: str
    """What the GNU assembler makes the code from; a test does."""
    code: bytes
    inputs: tuple[str, ...] = ()
    value: str | None = None
    bits: int = 64

    def __call__(self, **registers: int) -> Op:
        """Return the operation with these registers; the others are 0.

        Raises TypeError: not an argument register.
        """
        unknown = registers.keys() - set(ARGUMENT_REGISTERS)
        if unknown:
            raise TypeError(f"{self.name}: {', '.join(sorted(unknown))} is no argument register")
        args = tuple(registers.get(name, 0) for name in ARGUMENT_REGISTERS)
        return Op(OPCODES[self.name], self.name, args, value=self.value, bits=self.bits)


def _line(
    name: str, text: str, code: str, inputs: str = "", value: str | None = None, bits: int = 64
) -> Instruction:
    return Instruction(name, text, bytes.fromhex(code), tuple(inputs.split()), value, bits)


def _debug_registers() -> Iterable[Instruction]:
    for n in range(8):
        read, write = f"0f21{0xC0 | n << 3:02x}", f"0f23{0xC0 | n << 3:02x}"
        yield _line(f"READ_DR{n}", f"mov %dr{n}, %rax", read, value="rax")
        yield _line(f"WRITE_DR{n}", f"mov %rax, %dr{n}", write, "rax")


INSTRUCTIONS: Final = (
    _line("NOP1", "nop", "90"),
    _line("RDMSR", "rdmsr", "0f32", "rcx", PAIR),
    _line("WRMSR", "wrmsr", "0f30", "rcx rax rdx"),
    _line("CPUID", "cpuid", "0fa2", "rax rcx"),
    _line("RDTSC", "rdtsc", "0f31", "", PAIR),
    _line("RDTSCP", "rdtscp", "0f01f9", "", PAIR),
    _line("RDPMC", "rdpmc", "0f33", "rcx", PAIR),
    _line("RDPRU", ".byte 0x0f, 0x01, 0xfd", "0f01fd", "rcx", PAIR),
    _line("XGETBV", "xgetbv", "0f01d0", "rcx", PAIR),
    _line("XSETBV", "xsetbv", "0f01d1", "rcx rax rdx"),
    # Control registers
    _line("READ_CR0", "mov %cr0, %rax", "0f20c0", value="rax"),
    _line("READ_CR2", "mov %cr2, %rax", "0f20d0", value="rax"),
    _line("READ_CR3", "mov %cr3, %rax", "0f20d8", value="rax"),
    _line("READ_CR4", "mov %cr4, %rax", "0f20e0", value="rax"),
    _line("READ_CR8", "mov %cr8, %rax", "440f20c0", value="rax"),
    _line("WRITE_CR0", "mov %rax, %cr0", "0f22c0", "rax"),
    _line("WRITE_CR2", "mov %rax, %cr2", "0f22d0", "rax"),
    _line("WRITE_CR3", "mov %rax, %cr3", "0f22d8", "rax"),
    _line("WRITE_CR4", "mov %rax, %cr4", "0f22e0", "rax"),
    _line("WRITE_CR8", "mov %rax, %cr8", "440f22c0", "rax"),
    _line("CLTS", "clts", "0f06"),
    _line("LMSW", "lmsw %ax", "0f01f0", "rax"),
    _line("SMSW", "smsw %rax", "480f01e0", value="rax"),
    *_debug_registers(),
    # Memory: the address is in RBX
    _line("LOAD1", "movzbl (%rbx), %eax", "0fb603", "rbx", "rax", 8),
    _line("LOAD2", "movzwl (%rbx), %eax", "0fb703", "rbx", "rax", 16),
    _line("LOAD4", "movl (%rbx), %eax", "8b03", "rbx", "rax", 32),
    _line("LOAD8", "movq (%rbx), %rax", "488b03", "rbx", "rax"),
    _line("STORE1", "movb %al, (%rbx)", "8803", "rbx rax"),
    _line("STORE2", "movw %ax, (%rbx)", "668903", "rbx rax"),
    _line("STORE4", "movl %eax, (%rbx)", "8903", "rbx rax"),
    _line("STORE8", "movq %rax, (%rbx)", "488903", "rbx rax"),
    _line("COPY", "rep movsb", "f3a4", "rsi rdi rcx"),
    _line("FILL", "rep stosb", "f3aa", "rdi rcx rax"),
    _line("FILL8", "rep stosq", "f348ab", "rdi rcx rax"),
    _line("ATOMIC_ADD", "lock xaddq %rax, (%rbx)", "f0480fc103", "rbx rax", "rax"),
    _line("CMPXCHG", "lock cmpxchgq %rcx, (%rbx)", "f0480fb10b", "rbx rax rcx", "rax"),
    _line("MOVAPS_LOAD", "movaps (%rbx), %xmm0", "0f2803", "rbx"),
    _line("FLDZ", "fldz", "d9ee"),
    # Descriptor tables and selectors
    _line("LGDT", "lgdt (%rbx)", "0f0113", "rbx"),
    _line("LIDT", "lidt (%rbx)", "0f011b", "rbx"),
    _line("SGDT", "sgdt (%rbx)", "0f0103", "rbx"),
    _line("SIDT", "sidt (%rbx)", "0f010b", "rbx"),
    _line("LLDT", "lldt %ax", "0f00d0", "rax"),
    _line("LTR", "ltr %ax", "0f00d8", "rax"),
    _line("SLDT", "sldt %eax", "0f00c0", value="rax", bits=16),
    _line("STR", "str %eax", "0f00c8", value="rax", bits=16),
    _line("MOV_SS", "movl %eax, %ss", "8ed0", "rax"),
    _line("MOV_DS", "movl %eax, %ds", "8ed8", "rax"),
    _line("MOV_FS", "movl %eax, %fs", "8ee0", "rax"),
    _line("SWAPGS", "swapgs", "0f01f8"),
    # Interrupts, waiting
    _line("CLI", "cli", "fa"),
    _line("STI", "sti", "fb"),
    _line("STI_NOP", "sti\nnop", "fb90"),
    _line("STI_NOP_CLI", "sti\nnop\ncli", "fb90fa"),
    _line("HLT", "hlt", "f4"),
    _line("STI_HLT", "sti\nhlt", "fbf4"),
    _line("PAUSE", "pause", "f390"),
    _line("MONITOR", "monitor", "0f01c8", "rax rcx rdx"),
    _line("MWAIT", "mwait", "0f01c9", "rax rcx"),
    _line("PUSHF", "pushfq\npopq %rax", "9c58", value="rax"),
    _line("POPF", "pushq %rax\npopfq", "509d", "rax"),
    _line("INT3", "int3", "cc"),
    _line("INT80", "int $0x80", "cd80"),
    _line("ICEBP", ".byte 0xf1", "f1"),
    _line("UD2", "ud2", "0f0b"),
    _line("DIV", "divq %rcx", "48f7f1", "rax rcx rdx", "rax"),
    # Ports
    _line("INB", "inb (%dx), %al", "ec", "rdx", "rax", 8),
    _line("INW", "inw (%dx), %ax", "66ed", "rdx", "rax", 16),
    _line("INL", "inl (%dx), %eax", "ed", "rdx", "rax", 32),
    _line("OUTB", "outb %al, (%dx)", "ee", "rdx rax"),
    _line("OUTW", "outw %ax, (%dx)", "66ef", "rdx rax"),
    _line("OUTL", "outl %eax, (%dx)", "ef", "rdx rax"),
    _line("INSB", "rep insb", "f36c", "rdx rdi rcx"),
    _line("OUTSB", "rep outsb", "f36e", "rdx rsi rcx"),
    # Caches and TLBs
    _line("INVLPG", "invlpg (%rbx)", "0f013b", "rbx"),
    _line("INVLPGA", "invlpga %rax, %ecx", "0f01df", "rax rcx"),
    _line("INVPCID", "invpcid (%rbx), %rax", "660f388203", "rbx rax"),
    _line("INVD", "invd", "0f08"),
    _line("WBINVD", "wbinvd", "0f09"),
    _line("WBNOINVD", "wbnoinvd", "f30f09"),
    # SVM and SMM
    _line("VMRUN", "vmrun %rax", "0f01d8", "rax"),
    _line("VMMCALL", "vmmcall", "0f01d9", "rax rbx rcx rdx rsi rdi", "rax"),
    _line("VMCALL", "vmcall", "0f01c1", "rax rbx rcx rdx rsi rdi", "rax"),
    _line("VMLOAD", "vmload %rax", "0f01da", "rax"),
    _line("VMSAVE", "vmsave %rax", "0f01db", "rax"),
    _line("STGI", "stgi", "0f01dc"),
    _line("CLGI", "clgi", "0f01dd"),
    _line("SKINIT", "skinit %eax", "0f01de", "rax"),
    _line("RSM", "rsm", "0faa"),
)
"""Every instruction; its opcode is its position. One more line is one more operation."""

OPCODES: Final = {line.name: opcode for opcode, line in enumerate(INSTRUCTIONS)}
BY_NAME: Final = {line.name: line for line in INSTRUCTIONS}


def instruction(name: str) -> Instruction:
    """Return a line of the table.

    Raises KeyError: no such line.
    """
    return BY_NAME[name]
