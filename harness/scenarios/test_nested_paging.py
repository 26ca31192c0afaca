"""Nested paging faults: who causes them, how they are described, how they are mended.

APM vol. 2, 15.25 Nested Paging (15.25.6 Nested versus Guest Page Faults, Fault Ordering; 15.25.5
Nested Table Walk), 15.30.4 TSC offset.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from harness.facts import nested_svm, npt
from harness.machine.addresses import Gpa
from harness.proxy.guest_level import GuestLevel
from harness.proxy.ops import Op
from harness.proxy.paging import PAGE, Pte
from harness.proxy.program import load, rdmsr, rdtsc, simple, store
from harness.proxy.vmexit import VmExit
from harness.scenarios.case import scenario
from harness.scenarios.context import Context
from harness.scenarios.l2 import expect_exit, expect_no_fault, proxy_machine
from harness.svm.exit_codes import ExitCode
from harness.svm.exit_info import NpfInfo
from harness.svm.msrs import Msr

HANG_S = 5.0
_VALUE = 0x1122_3344_5566_7788


@dataclass(frozen=True)
class NestedFault:
    """An entry of the nested tables, an access of L2, and EXITINFO1."""

    info: NpfInfo
    clear: int = 0
    set_: int = 0
    write: bool = False
    fetch: bool = False


def _final(**fields: int) -> NpfInfo:
    # The nested walk of a final address is a user access whatever L2's CPL.
    return NpfInfo.of(GUEST_FINAL=1, US=1, **fields)


FAULTS: Final = {
    "absent_read": NestedFault(_final(), clear=Pte.P),
    "absent_write": NestedFault(_final(RW=1), clear=Pte.P, write=True),
    "absent_fetch": NestedFault(_final(ID=1), clear=Pte.P, fetch=True),
    "read_only_write": NestedFault(_final(P=1, RW=1), clear=Pte.W, write=True),
    "supervisor_read": NestedFault(_final(P=1), clear=Pte.U),
    "supervisor_write": NestedFault(_final(P=1, RW=1), clear=Pte.U, write=True),
    "no_execute_fetch": NestedFault(_final(P=1, ID=1), set_=Pte.NX, fetch=True),
    "reserved_read": NestedFault(_final(P=1, RSV=1), set_=1 << 51),
}

_RET = b"\xc3"
_JUMP = b"\xff\xe3"
"""jmp *%rbx"""


def _access(l2: GuestLevel, gva: int, *, write: bool, fetch: bool) -> Op:
    if fetch:
        return l2.exec_op(_JUMP, user=False, rbx=gva)
    return store(gva, _VALUE) if write else load(gva)


def _expect_npf(context: Context, exit_: VmExit, info: NpfInfo, gpa: int) -> None:
    expect_exit(context, exit_, ExitCode.SVM_EXIT_NPF)
    context.expect("EXITINFO1", NpfInfo(exit_.exit_info_1), info)
    context.expect("EXITINFO2", exit_.exit_info_2, gpa, hex)


@scenario(needs=[nested_svm, npt], axes={"fault": tuple(FAULTS)}, levels=2)
def test_nested_fault_is_described_and_can_be_mended(context: Context, fault: str) -> None:
    """#NPF reports access and address in EXITINFO1 and 2; mended by L1, the access succeeds."""
    kind = FAULTS[fault]
    machine = proxy_machine(context, timeout_s=HANG_S)
    l2 = machine.l1.launch()
    gpa = l2.scratch + PAGE
    machine.memory.write(Gpa(gpa), _RET + bytes(15))
    assert l2.npt is not None
    whole = l2.npt.entry(gpa)
    l2.npt.protect(gpa, clear=kind.clear, set_=kind.set_)
    exit_ = l2.run_to_exit(_access(l2, gpa, write=kind.write, fetch=kind.fetch))
    _expect_npf(context, exit_, kind.info, gpa)
    l2.npt.set_entry(gpa, whole)
    expect_no_fault(context, "the access", l2.finish()[0].fault)


@scenario(needs=[nested_svm, npt], axes={"offset": (0, 8, 0xFF8)}, levels=2)
def test_nested_fault_has_the_address_to_the_byte(context: Context, offset: int) -> None:
    """EXITINFO2 of #NPF is the guest physical address that L2 accessed, not just its page."""
    l2 = proxy_machine(context, timeout_s=HANG_S).l1.launch()
    gpa = l2.scratch + PAGE + offset
    assert l2.npt is not None
    l2.npt.unmap(gpa)
    _expect_npf(context, l2.run_to_exit(load(gpa)), _final(), gpa)


FAR_GVA: Final = 0x300_0000
"""In memory, in 2 MiB where nothing else is."""

_TABLE_FAULTS: Final = {
    "absent": (Pte.P, NpfInfo.of(GUEST_PAGE_TABLE=1, US=1, RW=1)),
    "read_only": (Pte.W, NpfInfo.of(GUEST_PAGE_TABLE=1, US=1, RW=1, P=1)),
}


@scenario(needs=[nested_svm, npt], axes={"fault": tuple(_TABLE_FAULTS)}, levels=2)
def test_nested_fault_in_the_guest_walk_says_so(context: Context, fault: str) -> None:
    """A nested fault on L2's page table has bit 33 of EXITINFO1 set, and is a user write."""
    clear, info = _TABLE_FAULTS[fault]
    l2 = proxy_machine(context, timeout_s=HANG_S).l1.launch()
    # Splitting the large page there makes a table that nothing else of L2 needs.
    l2.tables.protect(FAR_GVA)
    entry_gpa = l2.tables.walk(FAR_GVA).entry_gpa
    assert l2.npt is not None
    l2.npt.protect(entry_gpa, clear=clear)
    _expect_npf(context, l2.run_to_exit(load(FAR_GVA)), info, entry_gpa)


@scenario(needs=[nested_svm, npt], levels=2)
def test_guest_fault_goes_before_the_nested_one(context: Context) -> None:
    """Where L2's own tables forbid an access it is L2's #PF, even if L1 maps nothing there."""
    l2 = proxy_machine(context, timeout_s=HANG_S).l1.launch()
    gva = l2.scratch + PAGE
    l2.tables.unmap(gva)
    assert l2.npt is not None
    l2.npt.unmap(gva)
    fault = l2.fault_of(load(gva))
    context.expect("exception", fault.vector if fault else None, 14)


@scenario(needs=[nested_svm, npt], levels=2)
def test_nested_tables_translate(context: Context) -> None:
    """L2's physical addresses go through nested_cr3: another page, another value."""
    machine = proxy_machine(context, timeout_s=HANG_S)
    l2 = machine.l1.launch()
    gpa, target = l2.scratch + PAGE, l2.scratch + 2 * PAGE
    machine.memory.write_int(Gpa(target), 8, _VALUE)
    assert l2.npt is not None
    l2.npt.map(gpa, target)
    context.expect("what L2 reads", l2.read(gpa), _VALUE, hex)
    l2.write(gpa, ~_VALUE % (1 << 64))
    context.expect("what is in memory", machine.memory.read_int(Gpa(target), 8), ~_VALUE % 2**64)
    context.expect("what is below", machine.memory.read_int(Gpa(gpa), 8), 0)


@scenario(needs=[nested_svm, npt], levels=2)
def test_writes_set_dirty_in_nested_tables(context: Context) -> None:
    """A write of L2 sets A and D in the nested entry, a read A only."""
    l2 = proxy_machine(context, timeout_s=HANG_S).l1.launch()
    assert l2.npt is not None
    for page, op, wanted in ((1, load, Pte.A), (2, store, Pte.A | Pte.D)):
        gpa = l2.scratch + page * PAGE
        l2.npt.protect(gpa, clear=Pte.A | Pte.D)
        expect_no_fault(context, op.__name__, l2.do(op(gpa) if op is load else store(gpa, 1)).fault)
        seen = l2.npt.entry(gpa) & (Pte.A | Pte.D)
        context.expect(f"flags after {op.__name__}", Pte(seen), Pte(wanted))


@scenario(needs=[nested_svm, npt], axes={"flags": ("0", "U", "A,D,U")}, levels=2)
def test_unchecked_bits_in_l2s_entry_do_not_grant(context: Context, flags: str) -> None:
    """An entry without P grants nothing, whatever its other bits."""
    l2 = proxy_machine(context, timeout_s=HANG_S).l1.launch()
    gpa = l2.scratch + PAGE
    value = 0 if flags == "0" else sum(Pte[name] for name in flags.split(","))
    assert l2.npt is not None
    l2.npt.set_entry(gpa, gpa | value)
    _expect_npf(context, l2.run_to_exit(load(gpa)), _final(), gpa)


@scenario(needs=[nested_svm], axes={"npt": (True, False)}, levels=2)
def test_l2_invlpg_shows_a_changed_mapping(context: Context, npt: bool) -> None:
    """After INVLPG L2 sees what its own tables say now, with nested and with shadow paging."""
    machine = proxy_machine(context, timeout_s=HANG_S)
    l2 = machine.l1.launch(npt=npt)
    gva, other = l2.scratch + PAGE, l2.scratch + 2 * PAGE
    machine.memory.write_int(Gpa(other), 8, _VALUE)
    l2.tables.protect(gva)
    context.expect("before", l2.read(gva), 0, hex)
    entry_gpa = l2.tables.walk(gva).entry_gpa
    new = l2.tables.entry(other)
    # L2 writes the entry itself: a hypervisor that shadows must notice.
    results = l2.run(
        [store(entry_gpa, new), l2.exec_op(b"\x0f\x01\x3b", user=False, rbx=gva), load(gva)]
    )
    context.expect("after", results[-1].value, _VALUE, hex)


# TSC offset

OFFSETS: Final = {"zero": 0, "plus": 1 << 45, "minus": -(1 << 24)}
READERS: Final[dict[str, Callable[[], Op]]] = {
    "rdtsc": rdtsc,
    "rdtscp": lambda: simple("RDTSCP"),
    "rdmsr": lambda: rdmsr(Msr.MSR_IA32_TSC),
}


@scenario(
    needs=[nested_svm],
    axes={"offset": tuple(OFFSETS), "reader": tuple(READERS)},
    levels=2,
)
def test_l2_tsc_is_l1s_plus_the_offset(context: Context, offset: str, reader: str) -> None:
    """L2's TSC is L1's plus tsc_offset, and #VMEXIT gives L1 its own back."""
    machine = proxy_machine(context, timeout_s=HANG_S)
    l1 = machine.l1
    value = OFFSETS[offset]
    l2 = l1.launch(vmcb={"tsc_offset": value})
    # The clock of a machine that is just made starts at 0: no wrap below it.
    l1.wrmsr(Msr.MSR_IA32_TSC, 1 << 40)
    before = l1.do(rdtsc()).value
    seen = l2.do(READERS[reader]()).value
    after = l1.do(rdtsc()).value
    context.note("TSC", before=before, l2=seen, after=after)
    context.expect("L1's TSC goes on", before < after, True)
    context.expect("L2's TSC is between", before <= (seen - value) % (1 << 64) <= after, True)
