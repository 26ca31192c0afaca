"""The guest that operations work on: what lies where, and the states that everything starts from.

One vCPU, one memory, one set of page tables for L1 and L2: pages of 2 MiB, identity, and the same
once more as nested page tables (`nested_cr3`). Those lie apart: KVM write-protects the tables that
it shadows, and QEMU's page walk of L2 writes to what it walks. Where both were the same, KVM could
emulate what L2 executed, but never finish to deliver an exception. Address space 1 (SMM) has a
backing of its own for `smram`; everything else in it is an alias.

Fields are named as the structs of `harness.svm` name them, with dots: `control.asid`,
`control.intercepts.3`, `save.cs.selector`. Pure data: who writes it into a machine is elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from harness.model.operations import Instruction
from harness.svm.intercepts import Intercept
from harness.svm.msrs import Cr0, Cr4, Efer
from harness.svm.smram import DEFAULT_SMBASE, SMM_ENTRY_OFFSET
from harness.svm.vmcb import IOPM_SIZE, MSRPM_SIZE, VMCB_SIZE, SegAttrib

Fields = Mapping[str, int]


@dataclass(frozen=True)
class Slot:
    """A part of the guest's memory that `SetSlot` can take away."""

    gpa: int
    size_bytes: int


BASE: Final = Slot(0, 0x2_0000)
"""Tables, code and stacks. It is never taken away."""

SLOTS: Final[Mapping[str, Slot]] = {
    "smram": Slot(DEFAULT_SMBASE, 0x1_0000),
    "vmcb_a": Slot(0x10_0000, VMCB_SIZE),
    "vmcb_b": Slot(0x10_2000, VMCB_SIZE),
    "hsave": Slot(0x10_4000, VMCB_SIZE),
    "msrpm": Slot(0x10_8000, MSRPM_SIZE),
    "iopm": Slot(0x11_0000, IOPM_SIZE),
}
"""By the names that `SetSlot` takes. `smram` is that of address space 1 (SMM)."""

VMCB_A_GPA: Final = SLOTS["vmcb_a"].gpa
VMCB_B_GPA: Final = SLOTS["vmcb_b"].gpa
HSAVE_GPA: Final = SLOTS["hsave"].gpa
MSRPM_GPA: Final = SLOTS["msrpm"].gpa
IOPM_GPA: Final = SLOTS["iopm"].gpa
NO_MEMORY_GPA: Final = 0x40_0000
"""A legal address, page-aligned, where there never is memory."""

SMM_ENTRY_GPA: Final = DEFAULT_SMBASE + SMM_ENTRY_OFFSET

# Within BASE

GDT_GPA: Final = 0x1000
PML4_GPA: Final = 0x2000
"""CR3 of L1 and L2."""
PDPT_GPA: Final = 0x3000
PD_GPA: Final = 0x4000
"""512 pages of 2 MiB: the first GiB, identity."""
IDT_GPA: Final = 0x5000
TSS_GPA: Final = 0x6000
HANDLERS_GPA: Final = 0x7000
SNIPPETS_GPA: Final = 0x8000
IDLE_L1: Final = 0x9000
"""A report to the host, for ever: where L1 stands before its first instruction."""
IDLE_L2: Final = 0x9100
"""The same for L2: the template's RIP."""
STACK_TOP: Final = 0xC000
L2_STACK_TOP: Final = 0xE000
EXCEPTION_STACK_TOP: Final = 0x1_0000
"""The TSS's RSP0."""
NESTED_PML4_GPA: Final = 0x1_1000
"""The template's nested_cr3."""
NESTED_PDPT_GPA: Final = 0x1_2000
NESTED_PD_GPA: Final = 0x1_3000

NESTED_HIGH_PD_GPA: Final = 0x1_4000
NESTED_HIGH_PT_GPA: Final = 0x1_5000
"""Of the nested tables only: they have memory at `RESET_VECTOR`, and L1 has none there."""
RESET_VECTOR: Final = 0xFFFF_FFF0
RESET_CODE_GPA: Final = 0x9FF0
"""What the nested tables have there: a report, the same bytes in 16-bit code."""

GDT_LIMIT: Final = 0x3F
IDT_LIMIT: Final = 0xFFF
KERNEL_CS: Final = 0x08
KERNEL_DS: Final = 0x10
USER_DS: Final = 0x18 | 3
USER_CS: Final = 0x20 | 3
TSS_SELECTOR: Final = 0x28

CODE_ATTRIB: Final = SegAttrib.of(G=1, L=1, P=1, S=1, TYPE=11)
DATA_ATTRIB: Final = SegAttrib.of(G=1, DB=1, P=1, S=1, TYPE=3)
TSS_ATTRIB: Final = SegAttrib.of(P=1, TYPE=11)

CR0_ON: Final = Cr0.of(PG=1, ET=1, NE=1, PE=1)
CR4_ON: Final = Cr4.of(PAE=1)
EFER_ON: Final = Efer.of(LMA=1, LME=1)
"""L1 starts with SVME clear."""
RFLAGS_ON: Final = 2
RFLAGS_TF: Final = 1 << 8
DR6_RESET: Final = 0xFFFF_0FF0
DR7_RESET: Final = 0x400
PAT_RESET: Final = 0x0007_0406_0007_0406

SNIPPET_BYTES: Final = 16
INSTRUCTION_BYTES: Final[Mapping[Instruction, int]] = {
    instruction: {"nop": 1, "hlt": 1, "cpuid": 2, "rdmsr": 2, "wrmsr": 2, "rsm": 2, "ud2": 2}.get(
        instruction.value, 3
    )
    for instruction in Instruction
}
"""The length of each; a report follows it."""
REPORT_BYTES: Final = 2
"""The length of a report (OUT); RIP stands behind it, at a jump back to it."""

INTERCEPTED: Final = (Intercept.INTERCEPT_VMRUN, Intercept.INTERCEPT_VMMCALL)
"""What the template intercepts: VMMCALL is the way out of L2."""


def snippet_gpa(instruction: Instruction) -> int:
    """Return where an instruction lies in 64-bit code at CPL 0; a report follows it."""
    return SNIPPETS_GPA + list(Instruction).index(instruction) * SNIPPET_BYTES


def segments() -> dict[str, int]:
    """Return ES, CS, SS, DS, GDTR and IDTR of L1 and L2, by the names of `vmcb_save_area`."""
    found: dict[str, int] = {}
    for name in ("es", "cs", "ss", "ds"):
        code = name == "cs"
        found |= {
            f"{name}.selector": KERNEL_CS if code else KERNEL_DS,
            f"{name}.attrib": int(CODE_ATTRIB if code else DATA_ATTRIB),
            f"{name}.limit": 0xFFFF_FFFF,
            f"{name}.base": 0,
        }
    return found | {
        "gdtr.base": GDT_GPA,
        "gdtr.limit": GDT_LIMIT,
        "idtr.base": IDT_GPA,
        "idtr.limit": IDT_LIMIT,
    }


def l1_save() -> dict[str, int]:
    """Return L1's first registers, by the names of `vmcb_save_area`; what is missing is 0."""
    return segments() | {
        "efer": int(EFER_ON),
        "cr0": int(CR0_ON),
        "cr3": PML4_GPA,
        "cr4": int(CR4_ON),
        "dr6": DR6_RESET,
        "dr7": DR7_RESET,
        "rflags": RFLAGS_ON,
        "rip": IDLE_L1,
        "rsp": STACK_TOP,
        "g_pat": PAT_RESET,
    }


def template_control() -> dict[str, int]:
    """Return the control area of a legal vmcb12: `control.asid` and so on; the rest is 0."""
    words: dict[str, int] = {}
    for intercept in INTERCEPTED:
        name = f"control.intercepts.{int(intercept.word)}"
        words[name] = words.get(name, 0) | intercept.mask
    return words | {
        "control.iopm_base_pa": IOPM_GPA,
        "control.msrpm_base_pa": MSRPM_GPA,
        "control.asid": 1,
        "control.nested_cr3": NESTED_PML4_GPA,
    }


def template_save() -> dict[str, int]:
    """Return the save area of a legal vmcb12, L2's state: `save.cr0` and so on; the rest is 0."""
    l2 = l1_save() | {
        "efer": int(EFER_ON.replace(SVME=1)),
        "rip": IDLE_L2,
        "rsp": L2_STACK_TOP,
    }
    return {f"save.{name}": value for name, value in l2.items()}


def template_vmcb12() -> dict[str, int]:
    """Return what both vmcb12 hold at the start."""
    return template_control() | template_save()


def template_nested_state() -> dict[str, int]:
    """Return the data that a `SetNestedState` without changes gives.

    The template's control area, and L1's save area with SVME set.
    """
    l1 = l1_save() | {"efer": int(EFER_ON.replace(SVME=1))}
    return template_control() | {f"save.{name}": value for name, value in l1.items()}
