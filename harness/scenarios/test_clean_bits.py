"""What VMRUN takes from memory: clean bits, ASIDs and TLB control.

APM vol. 2, 15.15 VMCB State Caching, 15.16 TLB Control. A set clean bit says that L1 has not
changed a group of fields since the last #VMEXIT of this VMCB: what VMRUN does with a field that was
changed nevertheless is open, what it does with all others is not. The kernel:
`nested_vmcb02_prepare_save` with `last_vmcb12_gpa` for an anchor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from harness.errors import ScenarioFailure
from harness.facts import nested_svm, npt
from harness.machine.addresses import Gpa
from harness.proxy.guest_level import GuestLevel
from harness.proxy.level import ENTER_DEFAULT, Level
from harness.proxy.ops import instruction
from harness.proxy.paging import PAGE
from harness.proxy.program import enter_guest, load, vmmcall
from harness.proxy.vmcb_view import VmcbView
from harness.scenarios.case import scenario
from harness.scenarios.context import Context
from harness.scenarios.l2 import expect_exit, proxy_machine
from harness.svm.exit_codes import ExitCode, describe
from harness.svm.msrs import Cr0, Efer, Msr
from harness.svm.vmcb import MSRPM_SIZE, Clean

VMMCALL: Final = bytes.fromhex("0f01d9")
ALL_CLEAN: Final = 0xFFFF_FFFF


@dataclass(frozen=True)
class Group:
    """A clean bit, a field of its group, and code that leaves what L2 sees of it in RBX."""

    bit: str
    field: str
    new: Callable[[int], int]
    code: bytes
    seen: Callable[[int], int] = lambda new: new
    """What RBX holds for a new value."""


_SGDT: Final = bytes.fromhex("4883ec100f010424488b1c244883c41081e3ffff0000")
"""sub rsp, 16; sgdt [rsp]; mov rbx, [rsp]; add rsp, 16; and ebx, 0xffff."""
_SIDT: Final = _SGDT.replace(bytes.fromhex("0f0104"), bytes.fromhex("0f010c"))

GROUPS: Final[Mapping[str, Group]] = {
    "CR.cr0": Group("CR", "cr0", lambda old: old | Cr0.TS.mask, bytes.fromhex("0f20c3")),
    "CR.cr3": Group("CR", "cr3", lambda old: old | 0x18, bytes.fromhex("0f20db")),
    "CR.cr4": Group("CR", "cr4", lambda old: old | 4, bytes.fromhex("0f20e3")),
    "DR.dr6": Group("DR", "dr6", lambda old: old | 5, bytes.fromhex("0f21f3")),
    "DR.dr7": Group("DR", "dr7", lambda old: old | 0x300, bytes.fromhex("0f21fb")),
    "DT.gdtr": Group("DT", "save.gdtr.limit", lambda _: 0x6F, _SGDT),
    "DT.idtr": Group("DT", "save.idtr.limit", lambda _: 0xDFF, _SIDT),
    "SEG.ds": Group("SEG", "save.ds.selector", lambda _: 0x2B, bytes.fromhex("31db8cdb")),
    "SEG.es": Group("SEG", "save.es.selector", lambda _: 0x2B, bytes.fromhex("31db8cc3")),
    "CR2.cr2": Group("CR2", "cr2", lambda _: 0x1234_5000, bytes.fromhex("0f20d3")),
    "INTR.V_TPR": Group("INTR", "int_ctl.V_TPR", lambda _: 7, bytes.fromhex("440f20c3")),
    "TSC.offset": Group("INTERCEPTS", "tsc_offset", lambda _: 1 << 50,
                        bytes.fromhex("0f3148c1e2204809d04889c348c1eb32"), lambda _: 1),
}  # fmt: skip
"""A field of every group that has one to be seen from inside."""


def _guest(l1: Level, group: Group) -> GuestLevel:
    # With V_INTR_MASKING, CR8 is V_TPR.
    l2 = l1.launch(vmcb={"int_ctl.V_INTR_MASKING": 1})
    l2.vmcb["rip"] = l2.instance.put_code(group.code + VMMCALL)
    return l2


def _run(context: Context, l2: GuestLevel) -> int:
    """Run the guest's code from its start; return what it found."""
    start = l2.vmcb["rip"]
    exit_ = l2.enter()
    expect_exit(context, exit_, ExitCode.SVM_EXIT_VMMCALL)
    l2.vmcb["rip"] = start
    return int(l2.gprs.rbx)


def _change(group: Group, view: VmcbView) -> int:
    """Give the field a new value; return what L2 will see of it."""
    new = group.new(view[group.field])
    view[group.field] = new
    return group.seen(new)


@scenario(needs=[nested_svm], axes={"group": tuple(GROUPS)}, levels=2)
def test_dirty_group_is_loaded(context: Context, group: str) -> None:
    """A field whose clean bit is 0 is loaded from the VMCB, all others marked clean or not."""
    row = GROUPS[group]
    l2 = _guest(proxy_machine(context).l1, row)
    before = _run(context, l2)
    expected = _change(row, l2.vmcb)
    l2.vmcb["control.clean"] = Clean(ALL_CLEAN).replace(**{row.bit: 0})
    seen = _run(context, l2)
    context.note("seen", before=hex(before), after=hex(seen))
    context.expect(f"{row.field} in L2", seen, expected, hex)


@scenario(needs=[nested_svm], axes={"group": tuple(GROUPS)}, levels=2)
def test_clean_bits_of_another_vmcb_mean_nothing(context: Context, group: str) -> None:
    """Clean bits speak of the VMCB at the same address: another one is loaded whole."""
    row = GROUPS[group]
    l1 = proxy_machine(context).l1
    first, second = _guest(l1, row), _guest(l1, row)
    _run(context, first)
    expected = _change(row, second.vmcb)
    second.vmcb["control.clean"] = ALL_CLEAN
    context.expect(f"{row.field} of another VMCB", _run(context, second), expected, hex)
    # And back: the last VMCB was the other one.
    expected = _change(row, first.vmcb)
    first.vmcb["control.clean"] = ALL_CLEAN
    context.expect(f"{row.field} of the first again", _run(context, first), expected, hex)


@scenario(needs=[nested_svm], axes={"group": tuple(GROUPS)}, levels=2)
def test_field_changed_under_its_clean_bit_is_old_or_new(context: Context, group: str) -> None:
    """A field that was changed although its clean bit is set has its old value or its new one."""
    row = GROUPS[group]
    l2 = _guest(proxy_machine(context).l1, row)
    old = _run(context, l2)
    new = _change(row, l2.vmcb)
    l2.vmcb["control.clean"] = ALL_CLEAN
    seen = _run(context, l2)
    context.note("took", value="new" if seen == new else "old")
    if seen not in (old, new):
        raise ScenarioFailure(f"{row.field}: expected {old:#x} or {new:#x}, saw {seen:#x}")


NEVER_CACHED: Final[Mapping[str, tuple[str, int]]] = {
    "rax": ("rax", 0x1234),
    "rsp": ("rsp", 0),
    "rflags": ("rflags", 0x3),
    "event_inj": ("event_inj", 0x8000_0040),
}


@scenario(needs=[nested_svm], axes={"field": ("rip", *NEVER_CACHED)}, levels=2)
def test_uncached_field_is_loaded_always(context: Context, field: str) -> None:
    """RIP, RSP, RAX, RFLAGS and EVENTINJ have no clean bit: they are loaded at every VMRUN."""
    l2 = proxy_machine(context).l1.launch()
    context.expect("L2 answers", l2.ping(), True)
    exit_ = l2.run_to_exit(vmmcall(0x5555))
    exit_.vmcb["control.clean"] = ALL_CLEAN
    old_rip = exit_.vmcb["rip"]
    exit_.vmcb["rip"] = l2.instance.put_code(VMMCALL)
    if field != "rip":
        name, value = NEVER_CACHED[field]
        exit_.vmcb[name] = l2.vmcb["rsp"] - 0x40 if name == "rsp" else value
    wanted = exit_.vmcb[field if field != "event_inj" else "rip"]
    again = l2.resume_to_exit()
    expect_exit(context, again, ExitCode.SVM_EXIT_VMMCALL)
    context.expect("RIP moved", again.vmcb["rip"] != old_rip, True)
    if field == "event_inj":
        context.expect("times the event was taken", l2.counted(0x40), 1)
    else:
        context.expect(field, again.vmcb[field], wanted, hex)


@scenario(needs=[nested_svm], axes={"svme_toggled": (False, True)}, levels=2)
def test_unchanged_vmcb_may_be_all_clean(context: Context, svme_toggled: bool) -> None:
    """A VMCB that was not changed runs with all clean bits set, EFER.SVME toggled or not."""
    l1 = proxy_machine(context).l1
    l2 = _guest(l1, GROUPS["DT.gdtr"])
    limit = _run(context, l2)
    l2.vmcb["control.clean"] = ALL_CLEAN
    if svme_toggled:
        _toggle_svme(l1)
    context.expect("GDTR limit in L2", _run(context, l2), limit, hex)


def _toggle_svme(l1: Level) -> None:
    efer = Efer(l1.rdmsr(Msr.MSR_EFER))
    for svme in (0, 1):
        l1.wrmsr(Msr.MSR_EFER, efer.replace(SVME=svme))


@scenario(needs=[nested_svm], axes={"group": tuple(GROUPS)}, levels=2)
def test_clean_bits_mean_nothing_once_svme_was_cleared(context: Context, group: str) -> None:
    """What was cached goes with EFER.SVME: a field that was changed is loaded, clean or not."""
    row = GROUPS[group]
    l1 = proxy_machine(context).l1
    l2 = _guest(l1, row)
    _run(context, l2)
    _toggle_svme(l1)
    expected = _change(row, l2.vmcb)
    l2.vmcb["control.clean"] = ALL_CLEAN
    context.expect(f"{row.field} in L2", _run(context, l2), expected, hex)


@scenario(needs=[nested_svm], levels=2)
def test_first_vmrun_ignores_clean_bits(context: Context) -> None:
    """The very first VMRUN of a CPU has nothing cached: all clean bits set change nothing."""
    l2 = _guest(proxy_machine(context).l1, GROUPS["DT.gdtr"])
    limit = l2.vmcb["save.gdtr.limit"]
    l2.vmcb["control.clean"] = ALL_CLEAN
    context.expect("GDTR limit in L2", _run(context, l2), limit, hex)


@scenario(needs=[nested_svm], levels=2)
def test_clean_vmcb_at_address_0_is_loaded(context: Context) -> None:
    """A VMCB at physical address 0 with all clean bits set is loaded at its first VMRUN."""
    machine = proxy_machine(context)
    l2 = _guest(machine.l1, GROUPS["DT.gdtr"])
    l2.vmcb["control.clean"] = ALL_CLEAN
    VmcbView(machine.memory, Gpa(0)).write(l2.vmcb.read())
    l1 = machine.l1
    gprs = l1.scratch
    result = l1.do(enter_guest(0, gprs, l1.host_state_gpa, flags=ENTER_DEFAULT))
    context.expect("exit code", result.values[0], ExitCode.SVM_EXIT_VMMCALL, describe)


@scenario(needs=[nested_svm], axes={"bit": ("INTERCEPTS", "PERM_MAP")}, levels=2)
def test_dirty_intercepts_are_loaded(context: Context, bit: str) -> None:
    """Intercepts and permission map addresses whose clean bit is 0 are loaded from the VMCB."""
    machine = proxy_machine(context)
    l2 = machine.l1.launch(vmcb={"intercept.msr_prot": 1})
    index = Msr.MSR_LSTAR
    expect_exit(context, l2.run_to_exit(vmmcall()), ExitCode.SVM_EXIT_VMMCALL)
    l2.vmcb["rip"] += len(VMMCALL)
    l2.finish()
    l2.vmcb["control.clean"] = Clean(ALL_CLEAN).replace(**{bit: 0})
    l2.leave()
    if bit == "INTERCEPTS":
        l2.vmcb["intercept.cpuid"] = 1
        exit_ = l2.run_to_exit(instruction("CPUID")())
        expect_exit(context, exit_, ExitCode.SVM_EXIT_CPUID)
        return
    other = machine.pages.take(MSRPM_SIZE)
    machine.memory.write(other, b"\xff" * MSRPM_SIZE)
    l2.vmcb["msrpm_base_pa"] = other
    exit_ = l2.run_to_exit(instruction("RDMSR")(rcx=index))
    expect_exit(context, exit_, ExitCode.SVM_EXIT_MSR)


# ASIDs and the TLB


@scenario(needs=[nested_svm], axes={"asid": ("1", "2", "max")}, levels=2)
def test_any_asid_but_0_runs(context: Context, asid: str) -> None:
    """Every ASID from 1 to the last that CPUID offers runs L2."""
    l1 = proxy_machine(context).l1
    last = (l1.cpuid(0x8000_000A)["rbx"] & 0xFFFF_FFFF) - 1
    l2 = l1.launch(vmcb={"asid": last if asid == "max" else int(asid)})
    context.note("asid", value=l2.vmcb["asid"])
    context.expect("L2 answers", l2.ping(), True)


def _invlpga(l2: GuestLevel, gva: int) -> None:
    l2.host.do(instruction("INVLPGA")(rax=gva, rcx=l2.vmcb["asid"])).regs  # noqa: B018


def _tlb_ctl(value: int) -> Callable[[GuestLevel, int], None]:
    def flush(l2: GuestLevel, gva: int) -> None:
        l2.vmcb["tlb_ctl"] = value

    return flush


def _other_asid(l2: GuestLevel, gva: int) -> None:
    l2.vmcb["asid"] += 1


FLUSHES: Final[Mapping[str, Callable[[GuestLevel, int], None]]] = {
    "tlb_ctl=1": _tlb_ctl(1),
    "tlb_ctl=3": _tlb_ctl(3),
    "tlb_ctl=7": _tlb_ctl(7),
    "asid": _other_asid,
    "INVLPGA": _invlpga,
}
"""What makes L2 see a page-table entry that L1 changed (3 and 7 with FlushByAsid, or flush all)."""


@scenario(needs=[nested_svm, npt], axes={"flush": tuple(FLUSHES), "npt": (True, False)}, levels=2)
def test_flush_shows_changed_translation(context: Context, flush: str, npt: bool) -> None:
    """After TLB control, another ASID or INVLPGA, L2 uses the page tables as they are now."""
    l2, page = _two_pages(context, npt=npt)
    context.expect("word before", l2.read(page), 1)
    l2.host.make_current()
    l2.tables.map(page, page + PAGE)
    FLUSHES[flush](l2, page)
    context.expect("word after", l2.read(page), 2)
    _expect_no_exit(context, l2)


@scenario(needs=[nested_svm, npt], levels=2)
def test_flush_shows_changed_nested_translation(context: Context) -> None:
    """After TLB_CONTROL=1, L2 uses the nested page tables as they are now."""
    l2, page = _two_pages(context, npt=True)
    context.expect("word before", l2.read(page), 1)
    l2.host.make_current()
    assert l2.npt is not None
    l2.npt.map(page, page + PAGE)
    l2.vmcb["tlb_ctl"] = 1
    context.expect("word after", l2.read(page), 2)


@scenario(needs=[nested_svm, npt], axes={"npt": (True, False)}, levels=2)
def test_vmexit_does_not_flush_l1(context: Context, npt: bool) -> None:
    """L1 and L2 keep their own translations of one address over many VMRUNs."""
    l2, page = _two_pages(context, npt=npt)
    l2.tables.map(page, page + PAGE)
    for _ in range(3):
        context.expect("word in L1", l2.host.read(page), 1)
        context.expect("word in L2", l2.read(page), 2)


def _two_pages(context: Context, *, npt: bool) -> tuple[GuestLevel, int]:
    """Return a guest, and the first of two pages that hold 1 and 2."""
    machine = proxy_machine(context)
    l2 = machine.l1.launch(npt=npt)
    page = int(machine.pages.take(2 * PAGE))
    for number in (0, 1):
        machine.memory.write_int(Gpa(page + number * PAGE), 8, number + 1)
    # Split to 4 KiB now: what changes later is one entry.
    l2.tables.map(page, page)
    return l2, page


def _expect_no_exit(context: Context, l2: GuestLevel) -> None:
    context.expect("L2 answers", l2.do(load(l2.scratch)).ok, True)
