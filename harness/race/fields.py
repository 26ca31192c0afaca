"""Fields of vmcb12 that are raced for, what proves a hit, and which kernels have the window.

Legal and illegal value differ in bits that nothing else changes. The template is legal, the writer
makes it illegal and legal again: VMRUN refuses, as a whole, every vmcb12 that holds the illegal
value when the checks read it. A write before the checks is thus a refusal, a write after the last
read of the field is a plain run: only reads on both sides of the write give what the proof asks
for. Before a field is raced for, both values are tried without a race; a kernel that does not
refuse the illegal one there does not check it, and nothing can be concluded (`unchecked`).

CS.base has no row: 6.1 and 6.12 read it a second time (`nested_vmcb02_prepare_control`), for soft
events whose delivery is interrupted, and L2 in 64-bit mode has no use for the first reading.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from harness.errors import NsvmError
from harness.race.attempt import (
    Attempt,
    Proof,
    exit_saved_it,
    field_of,
    l2_read_it,
    refused_late,
    third_value_saved,
)
from harness.svm.exit_codes import ExitCode
from harness.svm.msrs import Cr0, Cr4, Efer
from harness.svm.vmcb import Clean, SegAttrib

Version = tuple[int, int]

READ: Final[tuple[Version, ...]] = ((5, 10), (6, 1), (6, 12), (7, 3))
"""Kernels whose source the table speaks of; between two that differ it says nothing."""

Change = Callable[[int], int]


class NoSuchField(NsvmError):
    """A field that the table does not have."""


@dataclass(frozen=True)
class RacedField:
    """One row: a field, how it is spoilt, how L2 looks at it, and what is known of the kernels."""

    name: str
    illegal: Mapping[str, Change]
    """Fields of vmcb12 by `VmcbView`'s names, within 8 aligned bytes, and their other value."""
    proofs: tuple[Proof, ...]
    windows: tuple[Version, ...]
    """Of `READ`, those with two reads in one VMRUN."""
    source: str
    """The functions that read it."""
    why: str
    """Why the proof cannot come from one write before or after the whole VMRUN."""
    look: bytes = b""
    """L2's code that leaves what it sees in RAX."""
    checked: Version | None = READ[0]
    """The first of `READ` that refuses the illegal value; None: both are legal."""
    odd: Mapping[str, int] = field(default_factory=dict)
    """What the template of odd attempts has otherwise."""
    probe: str = ""
    """The field after #VMEXIT that tells whether the write came too late; by default its own."""
    hidden: int = 0
    """Bits of the 8 bytes that KVM sets or clears itself, whatever was loaded."""
    loud: bool = False
    """L2 speaks to userspace, which looks at KVM_GET_NESTED_STATE."""
    traced: bool = False
    """KVM's events of VMRUN are recorded; needs tracefs."""

    def expects_window(self, release: str) -> bool | None:
        """Say whether a kernel has the window by the table; None: the table does not reach it."""
        version = version_of(release)
        older = [known for known in READ if known <= version]
        newer = [known for known in READ if known >= version]
        if not older:
            return None
        says = {known in self.windows for known in (older[-1], *newer[:1])}
        return says.pop() if len(says) == 1 else None

    def expects_check(self, release: str) -> bool | None:
        """Say whether a kernel checks the field by the table; None: the table does not say."""
        version = version_of(release)
        if self.checked is not None and version >= self.checked:
            return True
        return False if version in READ else None


def version_of(release: str) -> Version:
    """Return (6, 1) for ``6.1.0-55-amd64``."""
    major, minor = release.split(".")[:2]
    digits = minor[: next((n for n, c in enumerate(minor) if not c.isdigit()), len(minor))]
    return int(major), int(digits or 0)


def field_named(name: str) -> RacedField:
    """Return a row by its name, in either case.

    Raises NoSuchField: there is none.
    """
    for row in FIELDS:
        if row.name.lower() == name.lower():
            return row
    raise NoSuchField(f"no field is called {name}; there are {', '.join(r.name for r in FIELDS)}")


def _to(value: int) -> Change:
    return lambda _: value


def _with(mask: int) -> Change:
    return lambda old: old | mask


def wbinvd_exit(attempt: Attempt) -> str:
    """L2 exited by an intercept that only the word without VMRUN's intercept has."""
    if attempt.reached_l2 and attempt.exit_code == ExitCode.SVM_EXIT_WBINVD:
        return "L2 ran and WBINVD, intercepted only without VMRUN's intercept, exited"
    return ""


def cached_asid_0(attempt: Attempt) -> str:
    """KVM_GET_NESTED_STATE returned ASID 0 while L2 ran."""
    if attempt.reached_l2 and attempt.record.seen == ASID_0_SEEN:
        return "L2 ran and KVM_GET_NESTED_STATE returned ASID 0"
    return ""


def other_rip_traced(attempt: Attempt) -> str:
    """The event of this VMRUN has one RIP, and L2 started at the other one."""
    plan, traced = attempt.plan, attempt.traced_rip
    started = {RIP_LEGAL_SEEN: plan.legal, RIP_ILLEGAL_SEEN: plan.illegal}.get(attempt.record.seen)
    if attempt.ran and started is not None and traced in {plan.legal, plan.illegal} - {started}:
        return f"traced with RIP {traced:#x}, L2 started at {started:#x}"
    return ""


def groups_disagree(attempt: Attempt) -> str:
    """One clean bit group was loaded and another one not, from one set of clean bits or the other.

    The two templates have different values in all groups. Proof is a #VMEXIT that saved some groups
    of one template and some of the other, when those before it were all of the same.
    """
    if not attempt.ran or attempt.previous is None:
        return ""
    before = [_template_of(attempt, attempt.previous, name) for name in CLEAN_PROBES]
    now = [_template_of(attempt, attempt.image, name) for name in CLEAN_PROBES]
    if None in before or None in now or len(set(before)) != 1 or len(set(now)) == 1:
        return ""
    which = ("loaded" if own == attempt.record.seq % 2 else "kept" for own in now)
    return ", ".join(f"{n} {w}" for n, w in zip(CLEAN_PROBES, which, strict=True))


def _template_of(attempt: Attempt, image: bytes, name: str) -> int | None:
    seen = field_of(image, name)
    values = [field_of(template, name) for template in attempt.plan.templates]
    return values.index(seen) if seen in values else None


CLEAN_PROBES: Final = ("save.ds.selector", "save.gdtr.limit", "save.dr7")
"""A field of each group that KVM tests in turn: SEG, DT, DR."""

RIP_LEGAL_SEEN: Final = 1
RIP_ILLEGAL_SEEN: Final = 2
"""What L2 reports where it started."""

_RIP_DISTANCE = 8
_START_HERE_OR_THERE: Final = bytes.fromhex(
    "b801000000 eb0a 90"  # mov eax, 1; jmp past the next line; nop
    "b802000000 4883ec10"  # mov eax, 2; sub rsp, 16
)

ASID_SEEN: Final = 1
ASID_0_SEEN: Final = 2
"""What userspace tells L2 of the cached ASID."""

_OLD: Final = ((5, 10),)
_SAVE_CACHE: Final = ((6, 1), (6, 12))
_TWICE: Final = (
    "5.10: nested_vmcb_check_save and nested_prepare_vmcb_save each read guest memory; "
    "6.1 up: nested_copy_vmcb_save_to_cache reads it once"
)
_ONCE: Final = "load_nested_vmcb_control, nested_copy_vmcb_control_to_cache: read once"
_L2_HAS_IT: Final = (
    "A vmcb12 that was illegal throughout is refused; L2 runs and has the value, so the checks "
    "read another one."
)
_HIGH: Final = _with(1 << 32)

FIELDS: Final = (
    RacedField(
        "EFER",
        {"efer": lambda old: Efer(old).replace(SVME=0, SCE=1)},
        (l2_read_it, exit_saved_it),
        _OLD,
        _TWICE + "; 5.10 sets SVME again (svm_set_efer of efer | EFER_SVME)",
        _L2_HAS_IT + " SCE marks the value without SVME, which KVM itself hides.",
        look=bytes.fromhex("b9800000c0 0f32 48c1e220 4809d0"),
        hidden=Efer.SVME.mask,
    ),
    RacedField(
        "CR0",
        {"cr0": _with(Cr0.NW.mask | Cr0.AM.mask)},
        (l2_read_it, exit_saved_it),
        _OLD,
        _TWICE,
        _L2_HAS_IT
        + " NW without CD is refused; AM marks that value, as KVM keeps NW from the CPU.",
        look=bytes.fromhex("0f20c0"),
        hidden=Cr0.NW.mask,
    ),
    RacedField(
        "CR3",
        {"cr3": _with(1 << 51)},
        (third_value_saved, exit_saved_it),
        _OLD,
        "5.10: nested_vmcb_check_save, then nested_svm_load_cr3, which checks again and fails "
        "late; 6.1 up: nested_copy_vmcb_save_to_cache reads it once",
        "The second check fails when L2 is half loaded, and #VMEXIT saves CR3, still L1's: a "
        "value that nobody wrote to vmcb12. A refusal by the first check saves nothing.",
        look=bytes.fromhex("0f20d8"),
    ),
    RacedField(
        "CR4",
        {"cr4": _with(Cr4.FSGSBASE.mask)},
        (l2_read_it, exit_saved_it, refused_late),
        _OLD,
        _TWICE,
        _L2_HAS_IT + " The guest's CPUID has no FSGSBASE, so the bit is refused; a CPU that has "
        "none refuses it too, but late, which saves state and a refusal by the checks does not.",
        look=bytes.fromhex("0f20e0"),
    ),
    RacedField(
        "DR6",
        {"dr6": _HIGH},
        (exit_saved_it, refused_late),
        _OLD,
        _TWICE,
        "The writer wrote the legal value back before L2 exited: the illegal one in vmcb12 is "
        "what #VMEXIT saved. L2 leaves DR6 alone; touching it loads the register.",
    ),
    RacedField(
        "DR7",
        {"dr7": _HIGH},
        (refused_late, exit_saved_it),
        _OLD,
        _TWICE,
        "The CPU refuses vmcb02: L2's state was loaded, and is saved, which a refusal by the "
        "checks does not do.",
    ),
    RacedField(
        "CS",
        {"save.cs.attrib": lambda old: SegAttrib(old).replace(L=1, DB=1)},
        (refused_late, exit_saved_it),
        _SAVE_CACHE,
        "6.1, 6.12: __nested_vmcb_check_save reads the cache, nested_vmcb02_prepare_save guest "
        "memory; 7.3: the cache; 5.10: not checked, read once",
        "L and D both set are refused by the checks, without saving state; loaded into vmcb02 "
        "the CPU refuses them, and the state is saved, or L2 runs and #VMEXIT saves them.",
        checked=(6, 1),
    ),
    RacedField(
        "clean",
        {"control.clean": _to(Clean.of(SW=1) | 0xFFFF)},
        (groups_disagree,),
        _SAVE_CACHE,
        "6.1, 6.12: nested_vmcb02_prepare_save reads guest memory for each group "
        "(vmcb_is_dirty); 7.3: the cache (vmcb12_is_dirty); 5.10: not used",
        "All bits change in one write: one read of them loads all groups, or keeps all.",
        checked=None,
        odd={"save.ds.selector": 0x2B, "save.gdtr.limit": 0xEF, "save.dr7": 0x700},
        probe="save.dr7",
    ),
    RacedField(
        "intercepts",
        {"intercept.vmrun": _to(0), "intercept.wbinvd": _to(1)},
        (wbinvd_exit,),
        (),
        _ONCE + ", checked and used from the cache",
        "WBINVD's intercept comes with the loss of VMRUN's in one word, which is refused.",
        look=bytes.fromhex("488b4308 48894310 0f09"),
    ),
    RacedField(
        "ASID",
        {"asid": _to(0)},
        (cached_asid_0,),
        (),
        _ONCE + ", checked in the cache, which KVM_GET_NESTED_STATE returns",
        "ASID 0 is refused; the cache that was checked is looked at while L2 runs.",
        # out dx, al to a port that nobody owns; userspace leaves what it saw in `seen`.
        look=bytes.fromhex("66baf605 ee 488b8388000000"),
        loud=True,
    ),
    RacedField(
        "RIP",
        {"rip": lambda old: old + _RIP_DISTANCE},
        (other_rip_traced,),
        (*_OLD, *_SAVE_CACHE),
        "5.10: nested_svm_vmrun for its event, nested_prepare_vmcb_save; 6.1, 6.12: "
        "enter_svm_guest_mode for its event and soft events, nested_vmcb02_prepare_save; 7.3: the "
        "cache",
        "Both are legal. The event belongs to this VMRUN, and so does L2's start: one read gives "
        "both the same RIP, whenever the write came.",
        checked=None,
        look=_START_HERE_OR_THERE,
        # L2 moves it at the other start.
        probe="rsp",
        traced=True,
    ),
)
"""In the order of `nsvm race` without --field: last what has KVM's code patched for its events."""
