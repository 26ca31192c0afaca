"""What VMRUN refuses, what it must not refuse, and what is left behind when it did.

APM vol. 2, 15.5.1 Basic Operation (Canonicalization and Consistency Checks), 15.20 Event Injection,
15.25.3 Enabling Nested Paging. The kernel: `nested_svm_vmrun`, `nested_vmcb_check_save` and
`nested_vmcb_check_controls`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from harness.facts import nested_svm, npt
from harness.machine.addresses import Gpa
from harness.machine.cpuid import CpuidPolicy
from harness.proxy.failure import GuestStopped
from harness.proxy.guest_level import GuestLevel
from harness.proxy.layout import GDT_CS32
from harness.proxy.level import ENTER_DEFAULT, Level
from harness.proxy.ops import EnterFlag
from harness.proxy.program import PF, read_cr
from harness.proxy.vmexit import VmExit
from harness.scenarios.case import scenario
from harness.scenarios.context import Context
from harness.scenarios.l2 import TIMEOUT_S, expect_exit, gif_of, proxy_machine
from harness.svm.exit_codes import VMEXIT_INVALID, ExitCode, describe
from harness.svm.msrs import Cr0, Cr4, Efer
from harness.svm.vmcb import IOPM_SIZE, MSRPM_SIZE, EventInj, SegAttrib
from kvm_ioctl.exits import InternalErrorExit

ADDRESS_BITS: Final = 36
"""MAXPHYADDR of the guests here; smaller than any host's, so that KVM's own checks are seen."""
LIMIT: Final = 1 << ADDRESS_BITS

HANG_S: Final = 5.0
"""An L2 that cannot go on hangs if it takes longer."""
PAGE: Final = 0x1000
VMMCALL: Final = bytes.fromhex("0f01d9")

Fields = Mapping[str, int]
"""VMCB fields to change."""
Change = Callable[[GuestLevel], Fields]
"""The same, from a guest as it was launched."""


def _set(**fields: int) -> Change:
    """Return a change of save or control fields to constants; `__` stands for a dot."""
    return lambda l2: {name.replace("__", "."): value for name, value in fields.items()}


def _or(**bits: int) -> Change:
    """Return a change that sets further bits of fields."""
    return lambda l2: {name: l2.vmcb[name] | value for name, value in bits.items()}


def _clear(**bits: int) -> Change:
    """Return a change that clears bits of fields."""
    return lambda l2: {name: l2.vmcb[name] & ~value for name, value in bits.items()}


def _inject(type_: int, vector: int) -> Change:
    return _set(event_inj=EventInj.of(VALID=1, TYPE=type_, VEC=vector))


def _legacy_pae(l2: GuestLevel) -> Fields:
    """Return a guest in 32-bit PAE mode; its CR3 still is the 64-bit tables'."""
    attrib = SegAttrib(l2.vmcb["save.cs.attrib"]).replace(L=0, DB=1)
    efer = Efer(l2.vmcb["efer"]).replace(LME=0, LMA=0)
    return {"efer": efer, "save.cs.attrib": attrib, "save.cs.selector": GDT_CS32}


CODE64_AND_32: Final = SegAttrib.of(P=1, S=1, G=1, L=1, DB=1, TYPE=0xB)

ILLEGAL_SAVE: Final[Mapping[str, Change]] = {
    "efer.SVME=0": _clear(efer=Efer.SVME.mask),
    "efer.bit9": _or(efer=1 << 9),
    "efer.bit31": _or(efer=1 << 31),
    "efer.bit63": _or(efer=1 << 63),
    "cr0.CD=0,NW=1": _or(cr0=Cr0.NW.mask),
    "cr0.bit32": _or(cr0=1 << 32),
    "cr0.bit63": _or(cr0=1 << 63),
    "cr3.bit_maxphyaddr": _or(cr3=LIMIT),
    "cr3.bit52": _or(cr3=1 << 52),
    "cr3.bit63": _or(cr3=1 << 63),
    "cr4.bit15": _or(cr4=1 << 15),
    "cr4.bit19": _or(cr4=1 << 19),
    "cr4.bit32": _or(cr4=1 << 32),
    "cr4.bit63": _or(cr4=1 << 63),
    "dr6.bit32": _or(dr6=1 << 32),
    "dr6.bit63": _or(dr6=1 << 63),
    "dr7.bit32": _or(dr7=1 << 32),
    "dr7.bit63": _or(dr7=1 << 63),
    "LME,PG,PAE=0": _clear(cr4=Cr4.PAE.mask),
    "LME,PG,PE=0": _clear(cr0=Cr0.PE.mask),
    "LME,PG,PAE,CS.L,CS.D": _set(save__cs__attrib=CODE64_AND_32),
}

ILLEGAL_CONTROL: Final[Mapping[str, Change]] = {
    "intercept.vmrun=0": lambda l2: {"intercept.vmrun": 0},
    "asid=0": _set(asid=0),
    "nested_cr3=maxphyaddr": _or(nested_cr3=LIMIT),
    "nested_cr3.bit63": _or(nested_cr3=1 << 63),
    "msrpm=maxphyaddr": _set(msrpm_base_pa=LIMIT),
    "msrpm=last_page": _set(msrpm_base_pa=LIMIT - PAGE),
    "msrpm.bit63": _or(msrpm_base_pa=1 << 63),
    "iopm=maxphyaddr": _set(iopm_base_pa=LIMIT),
    "iopm=last_but_one_page": _set(iopm_base_pa=LIMIT - 2 * PAGE),
    "iopm.bit63": _or(iopm_base_pa=1 << 63),
    "event_inj.TYPE=1": _inject(1, 0x40),
    "event_inj.TYPE=5": _inject(5, 0x40),
    "event_inj.TYPE=6": _inject(6, 0x40),
    "event_inj.TYPE=7": _inject(7, 0x40),
    "event_inj.EXEPT.VEC=2": _inject(3, 2),
    "event_inj.EXEPT.VEC=31": _inject(3, 31),
    "event_inj.EXEPT.VEC=32": _inject(3, 32),
}

ILLEGAL: Final = {**ILLEGAL_SAVE, **ILLEGAL_CONTROL}
"""VMCBs that VMRUN must refuse, each illegal in one respect only."""


def _l1(context: Context, timeout_s: float = TIMEOUT_S) -> Level:
    policy = CpuidPolicy(physical_address_bits=ADDRESS_BITS)
    return proxy_machine(context, cpuid=policy, memory_mib=32, timeout_s=timeout_s).l1


def _guest(l1: Level, *, npt: bool = True, flags: EnterFlag = ENTER_DEFAULT) -> GuestLevel:
    """Return a guest whose code is one VMMCALL, that leaves nothing to chance: SHUTDOWN exits."""
    l2 = l1.launch(vmcb={"intercept.shutdown": 1}, npt=npt, enter_flags=flags)
    l2.vmcb["rip"] = l2.instance.put_code(VMMCALL)
    return l2


def _is_refusal(exit_: VmExit) -> bool:
    """Tell a refused VMRUN by the low half of its code; the whole of it is a case of its own."""
    return exit_.exit_code & 0xFFFF_FFFF == VMEXIT_INVALID & 0xFFFF_FFFF


def _expect_refused(context: Context, exit_: VmExit) -> None:
    seen = "VMEXIT_INVALID" if _is_refusal(exit_) else describe(exit_.exit_code)
    context.expect("exit of an illegal VMCB", seen, "VMEXIT_INVALID", str)


@scenario(needs=[nested_svm, npt], axes={"field": tuple(ILLEGAL)}, levels=2)
def test_illegal_vmcb_is_refused(context: Context, field: str) -> None:
    """VMRUN of a VMCB that fails a consistency check exits with VMEXIT_INVALID; L1 goes on."""
    l2 = _guest(_l1(context))
    l2.vmcb.update(ILLEGAL[field](l2))
    rip = l2.vmcb["rip"]
    exit_ = l2.enter()
    _expect_refused(context, exit_)
    context.expect("RIP of the guest that never ran", exit_.vmcb["rip"], rip, hex)
    context.expect("L1 alive", l2.host.ping(), True)


LEGAL: Final[Mapping[str, Change]] = {
    "unchanged": _set(),
    "cr0.CD=1,NW=0": _or(cr0=Cr0.CD.mask),
    "cr0.CD=1,NW=1": _or(cr0=Cr0.CD.mask | Cr0.NW.mask),
    "cr3.PCD,PWT": _or(cr3=0x18),
    "cr3.low_bits": _or(cr3=0xFFF),
    "cr4.TSD,PGE,MCE,DE": _or(cr4=Cr4.of(TSD=1, PGE=1, MCE=1, DE=1)),
    "dr6.low_half": _set(dr6=0xFFFF_FFFF),
    "dr7.low_half": _set(dr7=0xFFFF_0400),
    "efer.SCE,NX": _or(efer=Efer.of(SCE=1, NX=1)),
    "rflags.bit1=0": _set(rflags=0),
    "asid=max": lambda l2: {"asid": l2.host.cpuid(0x8000_000A)["rbx"] & 0xFFFF_FFFF - 1},
    "msrpm=last_pages": _set(msrpm_base_pa=LIMIT - MSRPM_SIZE),
    "msrpm.low_bits": _or(msrpm_base_pa=0xFFF),
    "iopm=last_pages": _set(iopm_base_pa=LIMIT - IOPM_SIZE),
    "iopm.low_bits": _or(iopm_base_pa=0xFFF),
    "nested_cr3.PCD,PWT": _or(nested_cr3=0x18),
    "event_inj.VALID=0": _set(event_inj=EventInj.of(TYPE=7, VEC=0xFF)),
    "event_inj_err": _set(event_inj_err=0xFFFF_FFFF),
    "tlb_ctl=3": _set(tlb_ctl=3),
    "tlb_ctl=7": _set(tlb_ctl=7),
    "int_vector": _set(int_vector=0xFF),
    "clean.reserved": _set(clean=0x7FFF_E000),
    "exit_fields": _set(exit_code=VMEXIT_INVALID, exit_info_1=~0, exit_info_2=~0),
}
"""VMCBs next to illegal ones that VMRUN must take."""


@scenario(needs=[nested_svm, npt], axes={"field": tuple(LEGAL)}, levels=2)
def test_legal_vmcb_enters_l2(context: Context, field: str) -> None:
    """VMRUN of a VMCB that fails no consistency check enters L2, however odd its values."""
    l2 = _guest(_l1(context))
    l2.vmcb.update({name: value % (1 << 64) for name, value in LEGAL[field](l2).items()})
    exit_ = l2.enter()
    expect_exit(context, exit_, ExitCode.SVM_EXIT_VMMCALL)
    context.expect("L1 alive", l2.host.ping(), True)


@scenario(needs=[nested_svm, npt], axes={"npt": (True, False)}, levels=2)
def test_cr3_without_memory_enters_l2(context: Context, npt: bool) -> None:
    """A CR3 below MAXPHYADDR with no memory behind it is legal: L2 is entered, and faults."""
    l2 = _guest(_l1(context), npt=npt)
    # Intercepted: what becomes of a #PF that L2 cannot take is the claim of the next scenario.
    l2.vmcb.update({"cr3": LIMIT - PAGE, "intercept.excp.14": 1})
    expected = ExitCode.SVM_EXIT_NPF if npt else ExitCode.SVM_EXIT_EXCP_BASE + PF
    expect_exit(context, l2.enter(), expected)


@scenario(needs=[nested_svm], levels=2)
def test_fault_without_page_tables_ends_l2(context: Context) -> None:
    """An L2 that can take no exception, its CR3 has no memory, shuts down or stops KVM_RUN.

    The APM leaves reads of no memory open: KVM may tell userspace instead that it cannot go on.
    """
    l2 = _guest(_l1(context, HANG_S), npt=False)
    l2.vmcb["cr3"] = LIMIT - PAGE
    try:
        exit_ = l2.enter()
    except GuestStopped as stopped:
        context.expect("KVM_RUN's exit", type(stopped.event).__name__, InternalErrorExit.__name__)
        return
    expect_exit(context, exit_, ExitCode.SVM_EXIT_SHUTDOWN)


@scenario(needs=[nested_svm, npt], levels=2)
def test_nested_cr3_without_memory_enters_l2(context: Context) -> None:
    """An nCR3 below MAXPHYADDR with no memory behind it is legal: L2 is entered, and faults."""
    l2 = _guest(_l1(context))
    l2.vmcb["nested_cr3"] = LIMIT - PAGE
    expect_exit(context, l2.enter(), ExitCode.SVM_EXIT_NPF)


@scenario(needs=[nested_svm], levels=2)
def test_nested_cr3_is_not_checked_without_nested_paging(context: Context) -> None:
    """With NP_ENABLE=0 the value of nCR3 does not matter."""
    l2 = _guest(_l1(context), npt=False)
    l2.vmcb["nested_cr3"] = (1 << 64) - 1
    expect_exit(context, l2.enter(), ExitCode.SVM_EXIT_VMMCALL)


# What a refused VMRUN leaves behind. KVM refuses in two places: before it touches anything
# ("early") and when it loads L2's state ("late").


@dataclass(frozen=True)
class Refusal:
    """A way to be refused."""

    prepare: Callable[[GuestLevel], None]
    npt: bool = True


def _asid_0(l2: GuestLevel) -> None:
    l2.vmcb["asid"] = 0


def _svme_0(l2: GuestLevel) -> None:
    l2.vmcb["efer"] = l2.vmcb["efer"] & ~Efer.SVME.mask


def _msrpm_without_memory(l2: GuestLevel) -> None:
    l2.vmcb.update({"intercept.msr_prot": 1, "msrpm_base_pa": LIMIT - MSRPM_SIZE})


def _reserved_pdpte(l2: GuestLevel) -> None:
    machine = l2.cpu.machine
    table = machine.pages.take()
    # Bits 8:5 and 2:1 of a PDPTE of legacy PAE paging must be zero (APM vol. 2, 5.2.3).
    machine.memory.write_int(Gpa(table), 8, l2.tables.root | 1 << 5 | 1)
    l2.vmcb.update(_legacy_pae(l2))
    l2.vmcb["cr3"] = table


REFUSALS: Final[Mapping[str, Refusal]] = {
    "early_control": Refusal(_asid_0),
    "early_save": Refusal(_svme_0),
    "late_msrpm": Refusal(_msrpm_without_memory),
    "late_pdpte": Refusal(_reserved_pdpte, npt=False),
}


def _refused(
    context: Context, refusal: str, *, flags: EnterFlag = ENTER_DEFAULT, **fields: int
) -> VmExit:
    how = REFUSALS[refusal]
    l2 = _guest(_l1(context), npt=how.npt, flags=flags)
    how.prepare(l2)
    l2.vmcb.update(fields)
    exit_ = l2.enter()
    _expect_refused(context, exit_)
    return exit_


@scenario(needs=[nested_svm, npt], axes={"refusal": tuple(REFUSALS)}, levels=2)
def test_refusal_is_minus_one_in_all_64_bits(context: Context, refusal: str) -> None:
    """The exit code of a refused VMRUN is -1 in all 64 bits."""
    exit_ = _refused(context, refusal)
    context.expect("exit code", exit_.exit_code, VMEXIT_INVALID, hex)


@scenario(needs=[nested_svm, npt], axes={"refusal": tuple(REFUSALS)}, levels=2)
def test_refusal_clears_gif(context: Context, refusal: str) -> None:
    """A refused VMRUN ends as a #VMEXIT: GIF is 0 afterwards."""
    exit_ = _refused(context, refusal, flags=ENTER_DEFAULT & ~EnterFlag.STGI)
    context.expect("GIF", gif_of(exit_.host), False)


@scenario(needs=[nested_svm, npt], axes={"refusal": tuple(REFUSALS)}, levels=2)
def test_refusal_clears_eventinj(context: Context, refusal: str) -> None:
    """A refused VMRUN ends as a #VMEXIT: EVENTINJ.V in the VMCB is 0 afterwards."""
    event = EventInj.of(VALID=1, TYPE=3, VALID_ERR=1, VEC=13)
    exit_ = _refused(context, refusal, event_inj=event, event_inj_err=0x18)
    context.expect("EVENTINJ.V", EventInj(exit_.vmcb["control.event_inj"]).VALID, 0)


@scenario(needs=[nested_svm, npt], axes={"refusal": tuple(REFUSALS)}, levels=2)
def test_refusal_reports_no_event(context: Context, refusal: str) -> None:
    """A refused VMRUN injected nothing: EXITINTINFO.V is 0."""
    event = EventInj.of(VALID=1, TYPE=0, VEC=0x40)
    exit_ = _refused(context, refusal, event_inj=event)
    context.expect("EXITINTINFO.V", exit_.exit_int_info.VALID, 0)


@scenario(needs=[nested_svm, npt], axes={"refusal": ("early_control", "early_save")}, levels=2)
def test_refusal_leaves_the_save_area(context: Context, refusal: str) -> None:
    """A VMRUN that is refused at its checks changes nothing of the state save area."""
    # Without VMLOAD and VMSAVE around it, which write there.
    flags = EnterFlag.STGI | EnterFlag.REPORT
    how = REFUSALS[refusal]
    l2 = _guest(_l1(context), npt=how.npt, flags=flags)
    how.prepare(l2)
    before = l2.vmcb.save.as_bytes()
    exit_ = l2.enter()
    _expect_refused(context, exit_)
    context.expect("state save area", exit_.vmcb.save.as_bytes() == before, True)


@scenario(needs=[nested_svm, npt], axes={"refusal": tuple(REFUSALS)}, levels=2)
def test_refusal_leaves_l1_as_it_was(context: Context, refusal: str) -> None:
    """After a refused VMRUN, L1 has its own control registers and page tables."""
    how = REFUSALS[refusal]
    l1 = _l1(context)
    l2 = _guest(l1, npt=how.npt)
    program = [read_cr(0), read_cr(3), read_cr(4)]
    before = [result.value for result in l1.run(program)]
    how.prepare(l2)
    _expect_refused(context, l2.enter())
    after = [result.value for result in l1.run(program)]
    context.expect("CR0, CR3, CR4", [hex(value) for value in after], [hex(v) for v in before])


@scenario(needs=[nested_svm, npt], axes={"refusal": tuple(REFUSALS)}, levels=2)
def test_mended_vmcb_enters_l2(context: Context, refusal: str) -> None:
    """A VMCB that was refused enters L2 once it is mended: nothing of the refusal sticks."""
    how = REFUSALS[refusal]
    l2 = _guest(_l1(context), npt=how.npt)
    launched = l2.vmcb.read()
    for _ in range(3):
        how.prepare(l2)
        _expect_refused(context, l2.enter())
        l2.vmcb.write(launched)
        expect_exit(context, l2.enter(), ExitCode.SVM_EXIT_VMMCALL)
        l2.vmcb.write(launched)
