"""All cells of the matrix, by group. Each group is a generator: one line for each kind of change.

Addresses and values are chosen for the layout of `harness.model.layout`. Kernel:
`svm_leave_smm()`, `rsm_load_state_64()`, `rsm_load_state_32()`, `rsm_enter_protected_mode()`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Final

from harness.errors import NsvmError
from harness.model import layout
from harness.model.operations import Operation, SetCpuid, SetMsr, SetSlot, WriteHostSave, WriteVmcb
from harness.model.operations import WriteSaveArea as Save
from harness.svm.bits import Bits
from harness.svm.msrs import Cr0, Cr4, Efer, Msr
from harness.svm.smram import DEFAULT_SMBASE, SMRAM_GPRS, SMRAM_STATE_OFFSET
from harness.svm.vmcb import SegAttrib
from harness.tamper import vmcb12
from harness.tamper.cells import EFER_OF, EFER_SVME, LMA, Cell, Start

Cells = Iterator[Cell]

ONES: Final = (1 << 64) - 1
NON_CANONICAL: Final = 0x8000_0000_0000_0000
_BOTH: Final = (Start.L1, Start.L2)
_ALL: Final = (Start.PLAIN, Start.L1, Start.L2, Start.L2_NPT)
_FLAGS: Final = {"0": 0, "1": 1, "2": 2, "bit 63": 1 << 63, "all ones": ONES}


class UnknownCell(NsvmError):
    """The matrix has no such cell or group."""


def _forged(gpa: int = layout.VMCB_A_GPA, efer: int = EFER_SVME) -> dict[str, int]:
    return {"svm_guest_flag": 1, "svm_guest_vmcb_gpa": gpa, "efer": efer}


def _bit(kind: type[Bits], number: int) -> str:
    for name, field in kind.fields().items():
        if field.mask == 1 << number:
            return name
    return f"bit {number}"


def _svm_guest_flag() -> Cells:
    group = "svm guest flag"
    for start in _ALL:
        for word, flag in _FLAGS.items():
            kept = {"svm_guest_flag": flag}
            yield Cell(group, start, f"flag {word}", (Save(kept),))
            svme = {**kept, "svm_guest_vmcb_gpa": layout.VMCB_A_GPA, "efer": EFER_SVME}
            yield Cell(group, start, f"flag {word}, vmcb12, SVME", (Save(svme),))
            clear = {**svme, "efer": int(layout.EFER_ON)}
            yield Cell(group, start, f"flag {word}, vmcb12, no SVME", (Save(clear),))


def _efer() -> Cells:
    for start in (Start.L1, Start.L2):
        base = EFER_OF[start]
        for number in range(64):
            yield Cell(
                "efer", start, f"^ {_bit(Efer, number)}", (Save({"efer": base ^ 1 << number}),)
            )
        for word, value in _EFERS.items():
            yield Cell("efer", start, word, (Save({"efer": value}),))


_EFERS: Final = {
    "0": 0,
    "SVME alone": int(Efer.SVME.mask),
    "LMA alone": LMA,
    "LME, no LMA": EFER_SVME & ~LMA,
    "all that KVM knows": int(
        Efer.of(SCE=1, LME=1, LMA=1, NX=1, SVME=1, LMSLE=1, FFXSR=1, AUTOIBRS=1)
    ),
    "all ones": ONES,
}


def _cpuid() -> Cells:
    group, no_svm = "cpuid", (SetCpuid("svm", False),)
    for start in (Start.PLAIN, Start.L2_NO_SVM):
        before = no_svm if start is Start.PLAIN else ()
        yield Cell(group, start, "as it was", (), before)
        yield Cell(group, start, "flag 1, SVME", (Save(_forged()),), before)
        yield Cell(group, start, "flag 1, no SVME",
                   (Save(_forged(efer=int(layout.EFER_ON))),), before)  # fmt: skip
        yield Cell(group, start, "flag 0, SVME",
                   (Save({"svm_guest_flag": 0, "efer": EFER_SVME}),), before)  # fmt: skip
        yield Cell(group, start, "flag 0, no SVME",
                   (Save({"svm_guest_flag": 0, "efer": int(layout.EFER_ON)}),), before)  # fmt: skip
    yield Cell(group, Start.L1, "NPT absent", (), (SetCpuid("npt", False),))
    yield Cell(group, Start.L2_NPT, "NPT absent", (), (SetCpuid("npt", False),))
    yield Cell(group, Start.L1, "NX absent, EFER.NX",
               (Save({"efer": EFER_SVME | Efer.NX.mask}),), (SetCpuid("nx", False),))  # fmt: skip


_GPAS: Final = {
    "unaligned by 1": layout.VMCB_A_GPA + 1,
    "unaligned by 8": layout.VMCB_A_GPA + 8,
    "end of its page": layout.VMCB_A_GPA + 0xFFF,
    "bit 39": layout.VMCB_A_GPA | 1 << 39,
    "bit 40": layout.VMCB_A_GPA | 1 << 40,
    "bit 51": layout.VMCB_A_GPA | 1 << 51,
    "bit 52": layout.VMCB_A_GPA | 1 << 52,
    "bit 63": layout.VMCB_A_GPA | 1 << 63,
    "0": 0,
    "no memory": layout.NO_MEMORY_GPA,
    "in SMRAM": DEFAULT_SMBASE,
    "the save area": DEFAULT_SMBASE + SMRAM_STATE_OFFSET,
    "another vmcb12": layout.VMCB_B_GPA,
    "the host save page": layout.HSAVE_GPA,
    "L1's page tables": layout.PML4_GPA,
    "all ones": ONES,
    "last page": ONES & ~0xFFF,
}


def _vmcb12_address() -> Cells:
    for start in (Start.PLAIN, *_BOTH, Start.L2_NPT):
        for word, gpa in _GPAS.items():
            yield Cell("vmcb12 address", start, word, (Save(_forged(gpa)),))
        yield Cell("vmcb12 address", start, "its memory taken away",
                   (SetSlot("vmcb_a", False), Save(_forged())))  # fmt: skip
        other = WriteVmcb("b", {"save.rip": layout.IDLE_L1})
        yield Cell("vmcb12 address", start, "another vmcb12 with another RIP",
                   (other, Save(_forged(layout.VMCB_B_GPA))))  # fmt: skip


def _vmcb12_contents() -> Cells:
    for start in (Start.L2, Start.L2_NPT):
        for word, changes in {**vmcb12.CHECKED, **vmcb12.OTHERS}.items():
            yield Cell("vmcb12 contents", start, word, (WriteVmcb("a", changes),))
    for word, changes in vmcb12.CHECKED.items():
        forged = (WriteVmcb("a", changes), Save(_forged()))
        yield Cell("vmcb12 contents", Start.L1, f"{word}, flag forged", forged)


_HOST_SAVE: Final[Mapping[str, Mapping[str, int]]] = {
    "cr0 0": {"save.cr0": 0},
    "cr0 all ones": {"save.cr0": ONES},
    "cr0 NW, no CD": {"save.cr0": layout.CR0_ON | Cr0.NW.mask},
    "cr0 no PG": {"save.cr0": layout.CR0_ON & ~Cr0.PG.mask},
    "cr0 bit 40": {"save.cr0": layout.CR0_ON | 1 << 40},
    "cr3 no memory": {"save.cr3": layout.NO_MEMORY_GPA},
    "cr3 beyond MAXPHYADDR": {"save.cr3": layout.PML4_GPA | 1 << 51},
    "cr3 all ones": {"save.cr3": ONES},
    "cr4 no PAE": {"save.cr4": 0},
    "cr4 reserved bit": {"save.cr4": layout.CR4_ON | 1 << 30},
    "cr4 all ones": {"save.cr4": ONES},
    "efer no SVME": {"save.efer": layout.EFER_ON},
    "efer no LME": {"save.efer": int(Efer.SVME.mask)},
    "efer 0": {"save.efer": 0},
    "efer reserved bit": {"save.efer": EFER_SVME | 1 << 2},
    "efer all ones": {"save.efer": ONES},
    "rip 0": {"save.rip": 0},
    "rip not canonical": {"save.rip": NON_CANONICAL},
    "rip of L2": {"save.rip": layout.IDLE_L2},
    "rsp not canonical": {"save.rsp": NON_CANONICAL},
    "rflags 0": {"save.rflags": 0},
    "rflags VM": {"save.rflags": 1 << 17 | 2},
    "rflags TF": {"save.rflags": 1 << 8 | 2},
    "rflags high": {"save.rflags": 1 << 40 | 2},
    "rax": {"save.rax": 0x1234_5678},
    "cs no code": {"save.cs.attrib": int(layout.DATA_ATTRIB)},
    "cs L and D": {"save.cs.attrib": layout.CODE_ATTRIB | SegAttrib.DB.mask},
    "cs not present": {"save.cs.attrib": layout.CODE_ATTRIB & ~SegAttrib.P.mask},
    "ss CPL 3": {"save.ss.attrib": layout.DATA_ATTRIB | SegAttrib.DPL.mask, "save.cpl": 3},
    "cpl 3": {"save.cpl": 3},
    "gdtr": {"save.gdtr.base": NON_CANONICAL, "save.gdtr.limit": 0xFFFF_FFFF},
    "idtr": {"save.idtr.base": NON_CANONICAL, "save.idtr.limit": 0},
}


def _host_save() -> Cells:
    group = "host save page"
    for start in (Start.L2, Start.L2_NPT):
        for word, changes in _HOST_SAVE.items():
            yield Cell(group, start, word, (WriteHostSave(changes),))
    for start in (Start.L1, Start.L2):
        for word, how in _HOST_SAVE_PLACES.items():
            yield Cell(group, start, word, (*how, Save(_forged())))


def _hsave(gpa: int) -> tuple[Operation, ...]:
    return (SetMsr(Msr.MSR_VM_HSAVE_PA, gpa),)


_HOST_SAVE_PLACES: Final[Mapping[str, tuple[Operation, ...]]] = {
    "its memory taken away": (SetSlot("hsave", False),),
    "VM_HSAVE_PA 0": _hsave(0),
    "VM_HSAVE_PA no memory": _hsave(layout.NO_MEMORY_GPA),
    "VM_HSAVE_PA beyond MAXPHYADDR": _hsave(1 << 51),
    "VM_HSAVE_PA in SMRAM": _hsave(DEFAULT_SMBASE),
    "VM_HSAVE_PA is vmcb12": _hsave(layout.VMCB_A_GPA),
    "VM_HSAVE_PA is another vmcb12": _hsave(layout.VMCB_B_GPA),
}

_CR0_BITS: Final = (*range(6), 6, 15, 16, 17, 18, 19, 28, 29, 30, 31, 32, 63)
_CR0S: Final = {
    "0": 0,
    "PG, no PE": layout.CR0_ON & ~Cr0.PE.mask,
    "NW, CD": layout.CR0_ON | Cr0.NW.mask | Cr0.CD.mask,
    "all low ones": 0xFFFF_FFFF,
    "all ones": ONES,
}
_CR4_BITS: Final = (*range(32), 32, 63)
_CR3S: Final = {
    "0": 0,
    "PCD, PWT": layout.PML4_GPA | 0x18,
    "low bits": layout.PML4_GPA | 0xFFF,
    "no memory": layout.NO_MEMORY_GPA,
    "bit 39": layout.PML4_GPA | 1 << 39,
    "bit 40": layout.PML4_GPA | 1 << 40,
    "bit 51": layout.PML4_GPA | 1 << 51,
    "bit 52": layout.PML4_GPA | 1 << 52,
    "bit 63": layout.PML4_GPA | 1 << 63,
    "all ones": ONES,
}


def _cr0() -> Cells:
    for start in _BOTH:
        for number in _CR0_BITS:
            value = layout.CR0_ON ^ 1 << number
            yield Cell("cr0", start, f"^ {_bit(Cr0, number)}", (Save({"cr0": value}),))
        for word, value in _CR0S.items():
            yield Cell("cr0", start, word, (Save({"cr0": value}),))


def _cr4() -> Cells:
    for start in _BOTH:
        for number in _CR4_BITS:
            value = layout.CR4_ON ^ 1 << number
            yield Cell("cr4", start, f"^ {_bit(Cr4, number)}", (Save({"cr4": value}),))
        yield Cell("cr4", start, "all ones", (Save({"cr4": ONES}),))


def _cr3() -> Cells:
    for start in (*_BOTH, Start.L2_NPT):
        for word, value in _CR3S.items():
            yield Cell("cr3", start, word, (Save({"cr3": value}),))


_MODES: Final[Mapping[str, Mapping[str, int]]] = {
    "real mode": {"cr0": 0x10, "cr4": 0, "efer": 0},
    "real mode, SVME": {"cr0": 0x10, "cr4": 0, "efer": int(Efer.SVME.mask)},
    "no paging": {"cr0": 0x31, "cr4": 0, "efer": 0},
    "no paging, PAE, LME": {"cr0": 0x31, "efer": EFER_SVME},
    "32-bit paging": {"cr4": 0, "efer": int(Efer.SVME.mask)},
    "PAE paging": {"efer": int(Efer.SVME.mask)},
    "long mode, no PAE": {"cr4": 0},
    "all 0": {"cr0": 0, "cr3": 0, "cr4": 0, "efer": 0},
    "all ones": {"cr0": ONES, "cr3": ONES, "cr4": ONES, "efer": ONES},
}


def _modes() -> Cells:
    for start in _BOTH:
        for word, changes in _MODES.items():
            yield Cell("modes", start, word, (Save(changes),))


_DR: Final = {
    "0": 0,
    "bit 0": 1,
    "bit 16": 1 << 16,
    "bit 31": 1 << 31,
    "bit 32": 1 << 32,
    "bit 63": 1 << 63,
    "GD": 1 << 13,
    "low ones": 0xFFFF_FFFF,
    "all ones": ONES,
}


def _debug_registers() -> Cells:
    for start in _BOTH:
        for name in ("dr6", "dr7"):
            for word, value in _DR.items():
                yield Cell("dr6 dr7", start, f"{name} {word}", (Save({name: value}),))


_RIPS: Final = {
    "0": 0,
    "not canonical": NON_CANONICAL,
    "bit 32": 1 << 32 | layout.IDLE_L1,
    "no memory": layout.NO_MEMORY_GPA,
    "the other level's": layout.IDLE_L2,
    "all ones": ONES,
}
_TF: Final = 8


def _rip_and_rflags() -> Cells:
    group = "rip rflags"
    for start in _BOTH:
        for word, value in _RIPS.items():
            yield Cell(group, start, f"rip {word}", (Save({"rip": value}),))
        for number in (*range(22), 31, 32, 63):
            yield Cell(group, start, f"rflags bit {number}",
                       (Save({"rflags": 2 ^ 1 << number}),), stepped=number != _TF)  # fmt: skip
        yield Cell(group, start, "rflags 0", (Save({"rflags": 0}),))


def _general_registers() -> Cells:
    for start in _BOTH:
        for index, name in enumerate(SMRAM_GPRS):
            value = 0x8123_4567_89AB_CDEF
            yield Cell("gprs", start, name, (Save({f"gprs.{index}": value}),))


_SEGMENTS: Final[Mapping[str, Mapping[str, int]]] = {
    "all zero": {"selector": 0, "attributes": 0, "limit": 0, "base": 0},
    "all ones": {"selector": 0xFFFF, "attributes": 0xFFFF, "limit": 0xFFFF_FFFF, "base": ONES},
    "attributes 0": {"attributes": 0},
    "attributes all ones": {"attributes": 0xFFFF},
    "attributes 0x0f00": {"attributes": 0x0F00},
    "selector 0": {"selector": 0},
    "selector all ones": {"selector": 0xFFFF},
    "limit 0": {"limit": 0},
    "limit 0x12345": {"limit": 0x1_2345},
    "limit 0x7fffffff": {"limit": 0x7FFF_FFFF},
    "base high": {"base": 0xFFFF_8000_0000_0000},
    "base not canonical": {"base": NON_CANONICAL},
}
_ATTRIBUTES: Final = {
    "cs": {"L and D": 0xE09B, "32-bit": 0xC09B, "16-bit": 0x009B, "data": 0xA093,
           "conforming": 0xA09F, "DPL 3": 0xA0FB, "not present": 0xA01B},
    "ss": {"DPL 3": 0xC0F3, "not present": 0xC013, "code": 0xC09B},
    "ds": {"not accessed": 0xC092, "not present": 0xC013, "code": 0xC09B},
    "tr": {"not busy": 0x0089, "data": 0x0093, "not present": 0x000B},
    "ldtr": {"present": 0x0082, "code": 0x009B},
}  # fmt: skip


def _segments() -> Cells:
    for start in _BOTH:
        for name in ("cs", "ss", "ds", "es", "fs", "gs", "ldtr", "tr"):
            for word, parts in _SEGMENTS.items():
                changes = {f"{name}.{part}": value for part, value in parts.items()}
                yield Cell("segments", start, f"{name} {word}", (Save(changes),))
            for word, value in _ATTRIBUTES.get(name, {}).items():
                changes = {f"{name}.attributes": value}
                yield Cell("segments", start, f"{name} {word}", (Save(changes),))


_TABLES: Final[Mapping[str, Mapping[str, int]]] = {
    "limit 0": {"limit": 0},
    "limit over 16 bits": {"limit": 0x1_0FFF},
    "limit all ones": {"limit": 0xFFFF_FFFF},
    "base not canonical": {"base": NON_CANONICAL},
    "base all ones": {"base": ONES},
    "selector and attributes": {"selector": 0xFFFF, "attributes": 0xFFFF},
}


def _descriptor_tables() -> Cells:
    for start in _BOTH:
        for name in ("gdtr", "idtr"):
            for word, parts in _TABLES.items():
                changes = {f"{name}.{part}": value for part, value in parts.items()}
                yield Cell("descriptor tables", start, f"{name} {word}", (Save(changes),))


_SMBASES: Final = {"0x40000": 0x4_0000, "misaligned": 0x3_0001, "0": 0, "all ones": 0xFFFF_FFFF}
_REVISIONS: Final = {"0": 0, "without SMBASE relocation": 0x64, "32-bit form": 0x2_0000,
                     "all ones": 0xFFFF_FFFF}  # fmt: skip


def _smm_fields() -> Cells:
    group = "smm fields"
    for start in _BOTH:
        for word, value in _SMBASES.items():
            yield Cell(group, start, f"smbase {word}", (Save({"smbase": value}),))
        for word, value in _REVISIONS.items():
            yield Cell(group, start, f"revision {word}", (Save({"smm_revison": value}),))
        for name in _BYTES:
            for value in (1, 0xFF):
                yield Cell(group, start, f"{name} {value:#x}", (Save({name: value}),))
        yield Cell(group, start, "I/O restart", (Save(dict.fromkeys(_IO_RESTART, ONES)),))
        for name in _IGNORED:
            yield Cell(group, start, f"{name} all ones", (Save({name: ONES}),))


_BYTES: Final = ("io_inst_restart", "auto_hlt_restart", "amd_nmi_mask", "int_shadow")
_IO_RESTART: Final = ("io_restart_rip", "io_restart_rcx", "io_restart_rsi", "io_restart_rdi",
                      "io_restart_dword")  # fmt: skip
_IGNORED: Final = ("svm_guest_virtual_int", "ssp", "svm_guest_pat", "svm_host_efer",
                   "svm_host_cr4", "svm_host_cr3", "svm_host_cr0")  # fmt: skip

_LEGACY: Final[Mapping[str, Mapping[str, int]]] = {
    "as it was": {},
    "cr0 0": {"cr0": 0},
    "cr0 PG, no PE": {"cr0": 0x8000_0010},
    "cr0 NW, no CD": {"cr0": 0x31 | Cr0.NW.mask},
    "cr0 all ones": {"cr0": 0xFFFF_FFFF},
    "cr0 PG": {"cr0": 0x8000_0031},
    "cr3 all ones": {"cr3": 0xFFFF_FFFF},
    "cr4 PAE": {"cr4": int(Cr4.PAE.mask)},
    "cr4 PCIDE": {"cr4": int(Cr4.PCIDE.mask)},
    "cr4 bit 30": {"cr4": 1 << 30},
    "cr4 all ones": {"cr4": 0xFFFF_FFFF},
    "dr6 all ones": {"dr6": 0xFFFF_FFFF},
    "dr7 all ones": {"dr7": 0xFFFF_FFFF},
    "eip 0": {"eip": 0},
    "eip all ones": {"eip": 0xFFFF_FFFF},
    "eflags 0": {"eflags": 0},
    "eflags VM": {"eflags": 1 << 17 | 2},
    "eflags all but TF": {"eflags": 0xFFFF_FEFF},
    "cs 64-bit": {"cs.flags": 0xA0_9B00},
    "cs all ones": {"cs.flags": 0xFFFF_FFFF, "cs.limit": 0xFFFF_FFFF, "cs.base": 0xFFFF_FFFF},
    "ss DPL 3": {"ss.flags": 0xC0_F300},
    "ds all zero": {"ds.flags": 0, "ds.limit": 0, "ds.base": 0, "ds_sel": 0},
    "ds limit 0x7fffffff": {"ds.limit": 0x7FFF_FFFF},
    "tr all ones": {"tr.flags": 0xFFFF_FFFF, "tr_sel": 0xFFFF_FFFF},
    "ldtr code": {"ldtr.flags": 0x9B00},
    "gdtr limit over 16 bits": {"gdtr.limit": 0x1_0FFF},
    "idtr base all ones": {"idtr.base": 0xFFFF_FFFF},
    "smbase misaligned": {"smbase": 0x3_0001},
    "revision of the 64-bit form": {"smm_revision": 0x2_0064},
    "I/O restart": {"io_inst_restart": 0xFFFF, "io_restart_rip": 0xFFFF_FFFF},
    "auto halt restart": {"auto_hlt_restart": 0xFFFF},
    "int_shadow": {"int_shadow": 1},
    "gprs": {f"gprs.{index}": 0x89AB_CDE0 + index for index in range(8)},
}


def _legacy() -> Cells:
    yield Cell("legacy form", Start.LEGACY_L2, "no field for it", ())
    for word, changes in _LEGACY.items():
        tampering = (Save(changes, legacy=True),)
        yield Cell("legacy form", Start.LEGACY, word, tampering, goes_on=word not in _ABORTING)


_ABORTING: Final = ("ss DPL 3",)
"""QEMU 7.2 finds no stack for the exception of the first OUT, and aborts."""


GROUPS: Final[Mapping[str, Callable[[], Cells]]] = {
    "svm guest flag": _svm_guest_flag,
    "efer": _efer,
    "cpuid": _cpuid,
    "vmcb12 address": _vmcb12_address,
    "vmcb12 contents": _vmcb12_contents,
    "host save page": _host_save,
    "cr0": _cr0,
    "cr3": _cr3,
    "cr4": _cr4,
    "modes": _modes,
    "dr6 dr7": _debug_registers,
    "rip rflags": _rip_and_rflags,
    "gprs": _general_registers,
    "segments": _segments,
    "descriptor tables": _descriptor_tables,
    "smm fields": _smm_fields,
    "legacy form": _legacy,
}


def cells_of(group: str) -> list[Cell]:
    """Return the cells of a group.

    Raises UnknownCell: there is no such group.
    """
    if group not in GROUPS:
        raise UnknownCell(f"no group {group!r}: there are {', '.join(GROUPS)}")
    return list(GROUPS[group]())


def all_cells() -> list[Cell]:
    """Return every cell, in the order of the groups."""
    return [cell for group in GROUPS for cell in cells_of(group)]


def matching(expression: str | None) -> list[Cell]:
    """Return the cells whose names contain a text, in any case; all without one.

    Raises UnknownCell: none does.
    """
    wanted = (expression or "").casefold()
    found = [cell for cell in all_cells() if wanted in cell.name.casefold()]
    if not found:
        raise UnknownCell(f"no cell's name has {expression!r}: groups are {', '.join(GROUPS)}")
    return found
