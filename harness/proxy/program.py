"""Programs for proxies: how operations are written, encoded, and what comes back."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from harness.errors import ScenarioFailure
from harness.machine.errors import MachineError
from harness.proxy.layout import MAX_LOOP_DEPTH
from harness.proxy.ops import (
    ARGUMENT_REGISTERS,
    PAIR,
    Control,
    EnterFlag,
    LoopFlag,
    Op,
    Policy,
    Status,
    WaitFlag,
    instruction,
)

T = TypeVar("T")

Program = Op | Iterable["Op | Iterable[Op]"]
"""One operation, or operations and blocks (`loop`) of them."""

_OP: Final = struct.Struct(f"<HHI{len(ARGUMENT_REGISTERS)}Q")
_RESULT: Final = struct.Struct(f"<II{len(ARGUMENT_REGISTERS)}Q")
OP_SIZE: Final = _OP.size

_MASK64 = (1 << 64) - 1

_VECTOR_NAMES: Final = {
    0: "#DE", 1: "#DB", 2: "NMI", 3: "#BP", 4: "#OF", 5: "#BR", 6: "#UD", 7: "#NM", 8: "#DF",
    10: "#TS", 11: "#NP", 12: "#SS", 13: "#GP", 14: "#PF", 16: "#MF", 17: "#AC", 18: "#MC",
    19: "#XF", 21: "#CP", 29: "#VC", 30: "#SX",
}  # fmt: skip

DE, DB, NMI, BP, OF, BR, UD, NM, DF = range(9)
TS, NP, SS, GP, PF = range(10, 15)
MF, AC, MC, XF = range(16, 20)


def vector_name(vector: int) -> str:
    """Return the manual's name of a vector (APM vol. 2, table 8-1), or its number."""
    return _VECTOR_NAMES.get(vector, f"vector {vector:#x}")


class ProgramError(MachineError):
    """A program that cannot be encoded."""


@dataclass(frozen=True)
class Fault:
    """An exception that ended an operation."""

    vector: int
    error_code: int
    cr2: int
    """Only of a page fault, else 0."""
    rip: int
    cs: int
    rflags: int
    rsp: int

    @property
    def cpl(self) -> int:
        """The privilege level that it was raised at."""
        return self.cs & 3

    def __str__(self) -> str:
        address = f", cr2={self.cr2:#x}" if self.vector == PF else ""
        return f"{vector_name(self.vector)}(error={self.error_code:#x}{address}, rip={self.rip:#x})"


class GuestFault(ScenarioFailure):
    """An operation raised an exception where a value was wanted."""

    def __init__(self, op: Op, fault: Fault) -> None:
        super().__init__(f"{op} raised {fault}")
        self.op = op
        self.fault = fault


@dataclass(frozen=True)
class Result:
    """What came of one operation."""

    op: Op
    status: Status
    values: tuple[int, ...]
    """The registers afterwards, as in `ops.ARGUMENT_REGISTERS`; of a control operation, its own."""
    fault: Fault | None = None

    @property
    def ok(self) -> bool:
        """Whether it ended without an exception."""
        return self.status is Status.DONE

    @property
    def vector(self) -> int | None:
        """The exception's vector, or None."""
        return self.fault.vector if self.fault else None

    @property
    def regs(self) -> Mapping[str, int]:
        """The registers afterwards, by name.

        Raises GuestFault: it raised an exception.
        """
        if self.fault is not None:
            raise GuestFault(self.op, self.fault)
        return dict(zip(ARGUMENT_REGISTERS, self.values, strict=True))

    @property
    def value(self) -> int:
        """The value that it is for: EDX:EAX of RDMSR, RAX of a load, ...

        Raises GuestFault: it raised an exception.
        Raises ScenarioFailure: it gave up waiting, or was not run.
        """
        if self.fault is not None:
            raise GuestFault(self.op, self.fault)
        if self.status is not Status.DONE:
            raise ScenarioFailure(f"{self.op}: {self.status.name}")
        if self.op.value == PAIR:
            return (self.values[3] & 0xFFFF_FFFF) << 32 | self.values[0] & 0xFFFF_FFFF
        return self.values[0] & (1 << self.op.bits) - 1

    def __str__(self) -> str:
        if self.fault is not None:
            return f"{self.op} -> {self.fault}"
        shown = f" -> {self.value:#x}" if self.ok and self.op.value else ""
        return f"{self.op}{shown}" if self.ok else f"{self.op} -> {self.status.name}"


def flatten(program: Program) -> list[Op]:
    """Return a program's operations in order, those inside blocks included.

    Raises ProgramError: loops that do not fit, or are too deep; what is no operation.
    """
    if isinstance(program, Op):
        return [program]
    ops: list[Op] = []
    for item in _items(program):
        ops.extend([item] if isinstance(item, Op) else _items(item))
    for op in ops:
        if not isinstance(op, Op):
            raise ProgramError(f"{op!r} is no operation")
    _check_loops(ops, 0, len(ops), 0)
    return ops


def _items(block: Iterable[T]) -> Iterable[T]:
    if not isinstance(block, Iterable):
        raise ProgramError(f"{block!r} is no operation")
    return block


def _check_loops(ops: Sequence[Op], at: int, end: int, depth: int) -> None:
    if depth > MAX_LOOP_DEPTH:
        raise ProgramError(f"loops are nested deeper than {MAX_LOOP_DEPTH}")
    while at < end:
        op = ops[at]
        length = op.length if op.opcode == Control.LOOP else 0
        if at + 1 + length > end:
            raise ProgramError(f"a loop over {length} operations has only {end - at - 1}")
        if length:
            _check_loops(ops, at + 1, at + 1 + length, depth + 1)
        at += 1 + length


def encode(ops: Iterable[Op]) -> bytes:
    """Return operations as the guest reads them (`layout.proxy_op`).

    Raises ProgramError: an argument that fits no register.
    """
    return b"".join(_encode_op(op) for op in ops)


def _encode_op(op: Op) -> bytes:
    args = (*op.args, *([0] * (len(ARGUMENT_REGISTERS) - len(op.args))))
    if any(not -(1 << 63) <= arg <= _MASK64 for arg in args):
        raise ProgramError(f"{op.name}: an argument has more than 64 bits")
    return _OP.pack(op.opcode, op.flags, op.length, *(arg & _MASK64 for arg in args))


def decode_results(ops: Sequence[Op], data: bytes) -> list[Result]:
    """Return the results of operations from the guest's bytes (`layout.proxy_result`).

    Raises ScenarioFailure: the guest wrote something that is no result.
    """
    return [_decode(op, *_RESULT.unpack_from(data, i * _RESULT.size)) for i, op in enumerate(ops)]


def _decode(op: Op, status: int, vector: int, *values: int) -> Result:
    if status not in Status._value2member_map_:
        raise ScenarioFailure(f"{op}: the mailbox holds no result (status {status:#x})")
    fault = None
    if status == Status.FAULT:
        fault = Fault(vector, *values[:6])
    return Result(op, Status(status), values, fault)


# How operations are written


def rdmsr(index: int) -> Op:
    """RDMSR; the value is EDX:EAX."""
    return instruction("RDMSR")(rcx=index)


def wrmsr(index: int, value: int) -> Op:
    """WRMSR of 64 bits."""
    return instruction("WRMSR")(rcx=index, rax=value & 0xFFFF_FFFF, rdx=value >> 32 & 0xFFFF_FFFF)


def cpuid(leaf: int, subleaf: int = 0) -> Op:
    """CPUID; the registers are in `Result.regs`."""
    return instruction("CPUID")(rax=leaf, rcx=subleaf)


def rdtsc() -> Op:
    """RDTSC, a time stamp."""
    return instruction("RDTSC")()


def read_cr(number: int) -> Op:
    """MOV from a control register: 0, 2, 3, 4 or 8."""
    return instruction(f"READ_CR{number}")()


def write_cr(number: int, value: int) -> Op:
    """MOV to a control register: 0, 2, 3, 4 or 8."""
    return instruction(f"WRITE_CR{number}")(rax=value)


def read_dr(number: int) -> Op:
    """MOV from a debug register."""
    return instruction(f"READ_DR{number}")()


def write_dr(number: int, value: int) -> Op:
    """MOV to a debug register."""
    return instruction(f"WRITE_DR{number}")(rax=value)


def load(gva: int, width: int = 8) -> Op:
    """Read memory of 1, 2, 4 or 8 bytes."""
    return instruction(f"LOAD{width}")(rbx=gva)


def store(gva: int, value: int, width: int = 8) -> Op:
    """Write memory of 1, 2, 4 or 8 bytes."""
    return instruction(f"STORE{width}")(rbx=gva, rax=value)


def copy(source: int, target: int, count: int) -> Op:
    """REP MOVSB of `count` bytes."""
    return instruction("COPY")(rsi=source, rdi=target, rcx=count)


def fill(target: int, value: int, count: int) -> Op:
    """REP STOSB of `count` bytes."""
    return instruction("FILL")(rdi=target, rax=value, rcx=count)


def atomic_add(gva: int, value: int) -> Op:
    """LOCK XADD of 8 bytes; the value is what was there before."""
    return instruction("ATOMIC_ADD")(rbx=gva, rax=value)


def inb(port: int, width: int = 1) -> Op:
    """IN of 1, 2 or 4 bytes."""
    return instruction({1: "INB", 2: "INW", 4: "INL"}[width])(rdx=port)


def outb(port: int, value: int, width: int = 1) -> Op:
    """OUT of 1, 2 or 4 bytes."""
    return instruction({1: "OUTB", 2: "OUTW", 4: "OUTL"}[width])(rdx=port, rax=value)


def simple(name: str) -> Op:
    """Any instruction without arguments: `simple("STGI")`."""
    return instruction(name)()


def vmmcall(rax: int = 0, **registers: int) -> Op:
    """VMMCALL with these registers."""
    return instruction("VMMCALL")(rax=rax, **registers)


def vmrun(vmcb_pa: int) -> Op:
    """Execute a bare VMRUN: the guest's registers come back as values, GIF stays 0."""
    return instruction("VMRUN")(rax=vmcb_pa)


def nop() -> Op:
    """Do nothing."""
    return Op(Control.NOP, "NOP")


def loop(
    count: int,
    body: Iterable[Op | Iterable[Op]],
    *,
    until_gva: int = 0,
    until_value: int = 0,
    stop_on_fault: bool = True,
) -> tuple[Op, ...]:
    """Run operations `count` times, or until an 8-byte word has a value.

    Results are those of the last iteration; the loop's own are the iterations done (`values[0]`)
    and the operations that did not succeed (`values[1]`).
    """
    ops = flatten(body)
    flags = LoopFlag.STOP_ON_FAULT if stop_on_fault else 0
    head = Op(Control.LOOP, "LOOP", (count, until_gva, until_value), flags, len(ops), value="rax")
    return (head, *ops)


def spin_until(gva: int, value: int, *, width: int = 8, polls: int = 1 << 24) -> Op:
    """Poll memory until it has a value; Status.BOUND after so many polls."""
    return Op(Control.SPIN_UNTIL, "SPIN_UNTIL", (polls, gva, value, width), value="rax")


def exec_at(gva: int, **registers: int) -> Op:
    """Call code that ends with RET; registers but R8 are loaded, and come back as values."""
    args = tuple(registers.get(name, 0) for name in ARGUMENT_REGISTERS[:-1])
    return Op(Control.EXEC, "EXEC", (*args, gva), value="rax")


def set_policy(vector: int, policy: Policy) -> Op:
    """Say what the handler of a vector does from now on."""
    return Op(Control.SET_POLICY, "SET_POLICY", (vector, 0, policy))


def triple_fault() -> Op:
    """Raise an exception without an IDT."""
    return Op(Control.TRIPLE_FAULT, "TRIPLE_FAULT")


def wait_interrupt(vector: int, *, count: int = 1, polls: int = 1 << 24, hlt: bool = False) -> Op:
    """With interrupts on, wait until a vector was counted; Status.BOUND after so many polls."""
    flags = WaitFlag.HLT if hlt else 0
    return Op(Control.WAIT_INTERRUPT, "WAIT_INTERRUPT", (polls, count, vector), flags, value="rax")


def enter_guest(
    vmcb_pa: int,
    gprs_gva: int,
    host_pa: int,
    *,
    flags: EnterFlag = EnterFlag.HOST_STATE | EnterFlag.STGI | EnterFlag.REPORT,
    rip_advance: int = 0,
) -> Op:
    """VMRUN with the guest's registers; returns after #VMEXIT.

    With EnterFlag.REPORT the values are exit_code, exit_info_1, exit_info_2 and exit_int_info.
    """
    args = (vmcb_pa, gprs_gva, host_pa, rip_advance)
    return Op(Control.ENTER_GUEST, "ENTER_GUEST", args, flags)
