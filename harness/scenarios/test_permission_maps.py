"""MSR and I/O permission maps at their edges.

APM vol. 2, 15.10 IOIO Intercepts (15.10.1 I/O Permissions Map, 15.10.2 IN and OUT Behavior), 15.11
MSR Intercepts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from harness.facts import nested_svm
from harness.proxy.layout import PROXY_PORT
from harness.proxy.ops import Op, instruction
from harness.proxy.permissions import msrpm_bit
from harness.proxy.program import GP, inb, outb, rdmsr, wrmsr
from harness.proxy.vmexit import VmExit
from harness.scenarios.case import scenario
from harness.scenarios.context import Context
from harness.scenarios.l2 import expect_exit, expect_fault, proxy_machine
from harness.svm.exit_codes import ExitCode
from harness.svm.exit_info import IoioInfo
from harness.svm.msrs import Msr

HANG_S = 5.0


# MSRs

EDGES: Final = (
    *(0x0000_0000, 0x0000_1FFF, 0xC000_0000, 0xC000_1FFF, 0xC001_0000, 0xC001_1FFF),
    *(Msr.MSR_IA32_TSC, Msr.MSR_IA32_SYSENTER_CS, Msr.MSR_LSTAR, Msr.MSR_KERNEL_GS_BASE),
    *(Msr.MSR_EFER, Msr.MSR_IA32_CR_PAT, Msr.MSR_VM_HSAVE_PA),
)
OUTSIDE: Final = (
    *(0x0000_2000, 0x4000_0000, 0xBFFF_FFFF, 0xC000_2000, 0xC000_FFFF, 0xC001_2000),
    0xFFFF_FFFF,
)
_WRITE = 1


def _accesses(msr: int) -> tuple[tuple[Op, int], ...]:
    """Return RDMSR and WRMSR with the EXITINFO1 of their exits."""
    return (rdmsr(msr), 0), (wrmsr(msr, 0), _WRITE)


@scenario(
    needs=[nested_svm],
    axes={"msr": tuple(f"{msr:#x}" for msr in EDGES), "write": (False, True)},
    levels=2,
)
def test_msr_access_exits_if_its_bit_is_set(context: Context, msr: str, write: bool) -> None:
    """An access to an MSR whose bit is set exits before anything else about it is checked."""
    index = int(msr, 0)
    machine = proxy_machine(context, timeout_s=HANG_S)
    l2 = machine.l1.launch(vmcb={"intercept.msr_prot": 1})
    l2.msrpm.intercept(index, read=not write, write=write)
    op, info = _accesses(index)[write]
    exit_ = l2.run_to_exit(op)
    expect_exit(context, exit_, ExitCode.SVM_EXIT_MSR)
    context.expect("EXITINFO1", exit_.exit_info_1, info, hex)
    context.expect("ECX", exit_.gprs.rcx, index, hex)


_READABLE: Final = tuple(msr for msr in EDGES if msr in Msr._value2member_map_)


@scenario(needs=[nested_svm], axes={"msr": tuple(Msr(m).name for m in _READABLE)}, levels=2)
def test_only_its_own_bit_makes_an_msr_access_exit(context: Context, msr: str) -> None:
    """With all bits set but its own, the other direction's included, reading an MSR is L2's."""
    index = Msr[msr]
    l2 = proxy_machine(context, timeout_s=HANG_S).l1.launch(vmcb={"intercept.msr_prot": 1})
    l2.msrpm.fill(True)
    l2.msrpm.intercept(index, read=True, write=False, on=False)
    result = l2.do(rdmsr(index))
    context.expect("exception", str(result.fault), "None", str)


@scenario(needs=[nested_svm], axes={"msr": tuple(f"{m:#x}" for m in OUTSIDE)}, levels=2)
def test_msrs_outside_the_map_always_exit(context: Context, msr: str) -> None:
    """MSRs that the map does not cover exit for reads and writes, whatever the map holds."""
    index = int(msr, 0)
    assert msrpm_bit(index) is None
    machine = proxy_machine(context, timeout_s=HANG_S)
    l2 = machine.l1.launch(vmcb={"intercept.msr_prot": 1})
    for op, info in _accesses(index):
        exit_ = l2.run_to_exit(op)
        expect_exit(context, exit_, ExitCode.SVM_EXIT_MSR, str(op))
        context.expect("EXITINFO1", exit_.exit_info_1, info, hex)
        exit_.skip()
        l2.finish()


@scenario(needs=[nested_svm], levels=2)
def test_msr_map_counts_only_with_its_intercept(context: Context) -> None:
    """Without the MSR_PROT intercept a full map makes no access exit; unknown MSRs are #GP."""
    l2 = proxy_machine(context, timeout_s=HANG_S).l1.launch()
    l2.msrpm.fill(True)
    context.expect("RDMSR LSTAR", str(l2.do(rdmsr(Msr.MSR_LSTAR)).fault), "None", str)
    for index in (OUTSIDE[0], 0xC001_1FFF):
        expect_fault(context, f"RDMSR {index:#x}", l2.fault_of(rdmsr(index)), GP, 0)


@scenario(needs=[nested_svm], levels=2)
def test_rdmsr_at_cpl_3_is_gp_before_the_map(context: Context) -> None:
    """RDMSR at CPL 3 raises #GP in L2 even if the MSR is intercepted."""
    l2 = proxy_machine(context, timeout_s=HANG_S).l1.launch(msrpm=[Msr.MSR_LSTAR])
    expect_fault(context, "RDMSR", l2.fault_of(rdmsr(Msr.MSR_LSTAR).user), GP, 0)


@scenario(needs=[nested_svm], levels=2)
def test_msr_map_may_change_between_two_vmruns(context: Context) -> None:
    """Each VMRUN takes the map as it is in memory then."""
    l2 = proxy_machine(context, timeout_s=HANG_S).l1.launch(vmcb={"intercept.msr_prot": 1})
    context.expect("first RDMSR", str(l2.do(rdmsr(Msr.MSR_LSTAR)).fault), "None", str)
    l2.configure({})
    l2.msrpm.intercept(Msr.MSR_LSTAR)
    exit_ = l2.run_to_exit(rdmsr(Msr.MSR_LSTAR))
    expect_exit(context, exit_, ExitCode.SVM_EXIT_MSR)
    l2.msrpm.intercept(Msr.MSR_LSTAR, on=False)
    context.expect("resumed RDMSR", str(l2.finish()[0].fault), "None", str)


# Ports


@dataclass(frozen=True)
class Access:
    """An I/O instruction, the map's bit that is set, and whether that makes it exit."""

    port: int
    size: int
    bit: int
    exits: bool


ACCESSES: Final = {
    "first": Access(0, 1, 0, True),
    "next_to_first": Access(0, 1, 1, False),
    "last": Access(0xFFFF, 1, 0xFFFF, True),
    "before_last": Access(0xFFFF, 1, 0xFFFE, False),
    "word": Access(0x80, 2, 0x81, True),
    "behind_word": Access(0x80, 2, 0x82, False),
    "dword": Access(0x80, 4, 0x83, True),
    "behind_dword": Access(0x80, 4, 0x84, False),
    "before_dword": Access(0x80, 4, 0x7F, False),
    "over_a_byte": Access(0x87, 2, 0x88, True),
    "end_over_a_byte": Access(0x85, 4, 0x88, True),
    "behind_over_a_byte": Access(0x85, 4, 0x89, False),
    "over_a_page": Access(0x7FFF, 4, 0x8002, True),
    "wrap_word": Access(0xFFFF, 2, 0x1_0000, True),
    "wrap_dword": Access(0xFFFE, 4, 0x1_0001, True),
    "behind_wrap": Access(0xFFFE, 4, 0x1_0002, False),
}


@scenario(needs=[nested_svm], axes={"access": tuple(ACCESSES)}, levels=2)
def test_port_access_exits_if_any_of_its_bits_is_set(context: Context, access: str) -> None:
    """An access exits if the bit of any port that it touches is set, beyond 0xffff too."""
    case = ACCESSES[access]
    l2 = proxy_machine(context, timeout_s=HANG_S).l1.launch(vmcb={"intercept.ioio_prot": 1})
    l2.iopm.set_bit(case.bit)
    seen = l2.start(inb(case.port, case.size))
    context.expect("exits", isinstance(seen, VmExit), case.exits)
    if isinstance(seen, VmExit):
        expect_exit(context, seen, ExitCode.SVM_EXIT_IOIO)
        context.expect("port", IoioInfo(seen.exit_info_1).PORT, case.port, hex)


@scenario(needs=[nested_svm], axes={"port": (0, 0x87, 0xFFFF)}, levels=2)
def test_only_its_own_bit_makes_a_port_access_exit(context: Context, port: int) -> None:
    """With all bits set but its own, an access of one byte does not exit."""
    l2 = proxy_machine(context, timeout_s=HANG_S).l1.launch(vmcb={"intercept.ioio_prot": 1})
    l2.iopm.fill(True)
    l2.iopm.intercept(PROXY_PORT, 4, on=False)
    l2.iopm.intercept(port, on=False)
    context.expect("exception", str(l2.do(outb(port, 0)).fault), "None", str)


_SIZES = {1: {"SZ8": 1}, 2: {"SZ16": 1}, 4: {"SZ32": 1}}
IO_PORT: Final = 0x80


@scenario(needs=[nested_svm], axes={"size": (1, 2, 4), "direction": ("in", "out")}, levels=2)
def test_ioio_exit_describes_the_access(context: Context, size: int, direction: str) -> None:
    """EXITINFO1 of IN and OUT has port, direction and size, EXITINFO2 the next RIP."""
    l2 = proxy_machine(context, timeout_s=HANG_S).l1.launch(vmcb={"intercept.ioio_prot": 1})
    l2.intercept_port(IO_PORT, size)
    line = instruction(("IN" if direction == "in" else "OUT") + {1: "B", 2: "W", 4: "L"}[size])
    op = l2.exec_op(line.code, user=False, rdx=IO_PORT)
    exit_ = l2.run_to_exit(op)
    expect_exit(context, exit_, ExitCode.SVM_EXIT_IOIO)
    wanted = IoioInfo.of(PORT=IO_PORT, TYPE=int(direction == "in"), **_SIZES[size])
    context.expect("EXITINFO1", _without_addressing(exit_), wanted)
    context.expect("EXITINFO2", exit_.exit_info_2, op.args[-1] + len(line.code), hex)
    context.expect("RIP", exit_.vmcb["rip"], op.args[-1], hex)
    exit_.skip()
    context.expect("what follows", str(l2.finish()[0].fault), "None", str)


def _without_addressing(exit_: VmExit) -> IoioInfo:
    """Leave out the address size, another scenario's, and SEG, valid only with decode assists."""
    return IoioInfo(exit_.exit_info_1).replace(SEG=0, A64=0, A32=0, A16=0)


_STRINGS = {
    "insb": (bytes.fromhex("6c"), {"TYPE": 1, "SZ8": 1}),
    "insw": (bytes.fromhex("666d"), {"TYPE": 1, "SZ16": 1}),
    "outsb": (bytes.fromhex("6e"), {"SZ8": 1}),
    "outsl": (bytes.fromhex("6f"), {"SZ32": 1}),
    "rep_insb": (bytes.fromhex("f36c"), {"TYPE": 1, "SZ8": 1, "REP": 1}),
    "rep_outsb": (bytes.fromhex("f36e"), {"SZ8": 1, "REP": 1}),
    "rep_outsw": (bytes.fromhex("f3666f"), {"SZ16": 1, "REP": 1}),
}


@scenario(needs=[nested_svm], axes={"string": tuple(_STRINGS)}, levels=2)
def test_ioio_exit_describes_string_instructions(context: Context, string: str) -> None:
    """EXITINFO1 of INS and OUTS has port, direction, STR, REP and size."""
    code, fields = _STRINGS[string]
    l2 = proxy_machine(context, timeout_s=HANG_S).l1.launch(vmcb={"intercept.ioio_prot": 1})
    l2.intercept_port(IO_PORT, 4)
    at = l2.scratch
    op = l2.exec_op(code, user=False, rdx=IO_PORT, rcx=2, rsi=at, rdi=at)
    exit_ = l2.run_to_exit(op)
    expect_exit(context, exit_, ExitCode.SVM_EXIT_IOIO)
    wanted = IoioInfo.of(PORT=IO_PORT, STR=1, **fields)
    context.expect("EXITINFO1", _without_addressing(exit_), wanted)
    context.expect("EXITINFO2", exit_.exit_info_2, op.args[-1] + len(code), hex)
    context.expect("RCX", exit_.gprs.rcx, 2)


_ADDRESS_SIZES = {"64": (b"", {"A64": 1}), "32": (b"\x67", {"A32": 1})}
"""Prefix and EXITINFO1 by address size."""


@scenario(needs=[nested_svm], axes={"address_bits": tuple(_ADDRESS_SIZES)}, levels=2)
def test_ioio_exit_has_the_address_size(context: Context, address_bits: str) -> None:
    """EXITINFO1 of a string instruction has the address size."""
    prefix, fields = _ADDRESS_SIZES[address_bits]
    l2 = proxy_machine(context, timeout_s=HANG_S).l1.launch(vmcb={"intercept.ioio_prot": 1})
    l2.intercept_port(IO_PORT)
    code = prefix + _STRINGS["outsb"][0]
    exit_ = l2.run_to_exit(l2.exec_op(code, user=False, rdx=IO_PORT, rsi=l2.scratch))
    expect_exit(context, exit_, ExitCode.SVM_EXIT_IOIO)
    seen = IoioInfo(exit_.exit_info_1)
    sizes = IoioInfo.of(A64=seen.A64, A32=seen.A32, A16=seen.A16)
    context.expect("address size", sizes, IoioInfo.of(**fields))


@scenario(needs=[nested_svm], levels=2)
def test_io_map_counts_only_with_its_intercept(context: Context) -> None:
    """Without the IOIO_PROT intercept a full map makes no access exit."""
    l2 = proxy_machine(context, timeout_s=HANG_S).l1.launch()
    l2.iopm.fill(True)
    context.expect("exception of IN", str(l2.do(inb(IO_PORT)).fault), "None", str)


@scenario(needs=[nested_svm], levels=2)
def test_port_access_at_cpl_3_is_gp_before_the_map(context: Context) -> None:
    """IN at CPL 3 without permission from TSS raises #GP in L2 even if the port is intercepted."""
    l2 = proxy_machine(context, timeout_s=HANG_S).l1.launch(iopm=[IO_PORT])
    expect_fault(context, "IN", l2.fault_of(inb(IO_PORT).user), GP, 0)
