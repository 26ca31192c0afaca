"""Code outside long mode, with descriptor tables of its own, as L1 or as L2, and how it ends.

Every exception, and the end of the code, comes to a HLT with the vector in EAX and the error code
in EBX: to userspace from L1 (KVM_EXIT_HLT), to L1 from L2 (SVM_EXIT_HLT). One use ends a level:
nothing leads back to its proxy. APM vol. 2, 4.7 Legacy Segment Descriptors, 8.7 Legacy
Protected-Mode Interrupt Control Transfers, 8.6 Real-Mode Interrupt Control Transfers, 12.2.2 Task
State Segment.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from harness.errors import ScenarioFailure
from harness.machine.addresses import Gpa
from harness.proxy.guest_level import GuestLevel
from harness.proxy.level import Level
from harness.proxy.program import AC, DF, GP, NP, PF, SS, TS, vector_name
from harness.proxy.vmexit import VmExit
from harness.scenarios.modes import MODES
from harness.svm.exit_codes import ExitCode
from harness.svm.msrs import Efer
from harness.svm.vmcb import SegAttrib
from kvm_ioctl.asm_kvm import kvm_dtable, kvm_regs, kvm_segment
from kvm_ioctl.exits import HltExit

VM86: Final = "virtual_8086"

LOW: Final = 0x1_0000
"""Below 1 MiB for real mode; proxies use nothing below 2 MiB but SMRAM and their image."""
GDT: Final = LOW + 0x0800
TSS: Final = LOW + 0x0900
OTHER_TSS: Final = LOW + 0x0A00
CODE: Final = LOW + 0x2000
OTHER_CODE: Final = LOW + 0x3000
_STUBS = LOW + 0x1000
_STACK_TOP = 0x7000
USER_STACK_TOP: Final = 0x7800
OTHER_STACK_TOP: Final = 0x7C00
TSS_LIMIT: Final = 0x67

CODE_0: Final = 0x08
DATA_0: Final = 0x10
CODE_3: Final = 0x1B
DATA_3: Final = 0x23
TSS_SELECTOR: Final = 0x28
CODE_1: Final = 0x31
OTHER_TSS_SELECTOR: Final = 0x38
TASK_GATE_SELECTOR: Final = 0x40
NO_SELECTOR: Final = 0x60
"""Beyond all descriptors, within the limit: a null descriptor."""
_GDT_LIMIT = 0x7F

END_VECTOR: Final = 0x81
"""INT of this vector is the end of the code: from any CPL, and from virtual-8086 mode."""
TASK_GATE_VECTOR: Final = 0x82
RING_1_VECTOR: Final = 0x83
"""A gate to ring 1, whose stack is `NO_SELECTOR`'s: #TS from CPL 3."""
_VECTORS = (*range(32), END_VECTOR)
_WITH_ERROR_CODE = (DF, TS, NP, SS, GP, PF, AC, 21, 29, 30)
_END = bytes((0xCD, END_VECTOR))

RFLAGS_NT: Final = 1 << 14
_RFLAGS_VM86 = 1 << 17 | 3 << 12 | 2

_DESCRIPTOR_TYPE_OFFSET = 5
_BUSY = 2
_STUB_SIZE = 16
_HLT = b"\xf4"
_GATE_32 = 0x8E
_GATE_TASK = 0x85
_DPL_3 = 0x60
_DATA_SEGMENTS = ("ss", "ds", "es", "fs", "gs")


@dataclass(frozen=True)
class Ending:
    """How code ended: by an exception, at its end, or (L2) by an exit to L1."""

    what: str
    """The exception's name, `the end`, or the exit's name."""
    error_code: int = 0

    def __str__(self) -> str:
        return f"{self.what}({self.error_code:#x})" if self.error_code else self.what


THE_END: Final = Ending("the end")


def raised(vector: int, error_code: int = 0) -> Ending:
    """Return the ending by an exception."""
    return Ending(vector_name(vector), error_code)


class BareCode:
    """Tables in low memory, and the state to enter code with, for one mode and CPL."""

    def __init__(self, level: Level, mode: str, cpl: int = 0) -> None:
        self.level = level
        self._memory = level.cpu.machine.memory
        self._16_bit = mode == "real"
        self._segmented = mode in ("real", VM86)
        self._write_tables()
        base = MODES["protected" if mode == VM86 else mode]
        self.state = {
            name: value
            for name, value in base.state(level).items()
            if name in ("cr0", "cr3", "cr4", "efer")
        }
        self.state |= self._segments(3 if mode == VM86 else cpl)
        self.state["rflags"] = _RFLAGS_VM86 if mode == VM86 else 2

    # Running

    def put(self, code: bytes, **registers: int) -> dict[str, int]:
        """Write code, with its end, and return the whole state to enter it with."""
        self._memory.write(Gpa(CODE), code + _END)
        rip = CODE - LOW if self._segmented else CODE
        return self.state | {"rip": rip, "rax": 0} | registers

    def run_in_l1(self, code: bytes, **registers: int) -> Ending:
        """Run code as L1, with EFER.SVME set, in place of the proxy.

        Raises ScenarioFailure: it ended in something else than its HLT.
        """
        self.level.enable_svm()
        runner = self.level.cpu.runner
        state = self.put(code, **registers)
        _load(self.level, state)
        event = runner.run(self.level.cpu.machine.timeout_s)
        regs = runner.vcpu.get_regs()
        if not isinstance(event, HltExit):
            raise ScenarioFailure(f"KVM_RUN came back with {event}, RIP={regs.rip:#x}")
        return _ending(regs.rax, regs.rbx)

    def enter_l2(self, code: bytes, **registers: int) -> VmExit:
        """Run code as L2 in place of the proxy, HLT intercepted; return its #VMEXIT.

        Raises ProxyError: the level is no guest.
        """
        guest = self.level
        if not isinstance(guest, GuestLevel):
            raise ScenarioFailure(f"{guest.name} is no guest")
        state = self.put(code, **registers)
        in_vmcb = {name: value for name, value in state.items() if name not in _GPRS}
        guest.configure(in_vmcb | {"intercept.hlt": 1})
        guest.set_gprs(**{name: state.get(name, 0) for name in _GPRS})
        return guest.enter()

    def run_in_l2(self, code: bytes, **registers: int) -> Ending:
        """Run code as L2 and return how it ended; an exit counts by its name."""
        return ending_of(self.enter_l2(code, **registers))

    # Tables

    def write_tss(self, at: int, **fields: int) -> None:
        """Write a 32-bit TSS: `eip`, `eflags`, `esp`, `cs`, ... as in APM figure 12-2."""
        for name, value in fields.items():
            self._memory.write_int(Gpa(at + TSS_FIELDS[name]), 4, value)

    def make_busy(self, selector: int) -> None:
        """Set the busy bit of a TSS descriptor, as of a task that another one is nested in."""
        at = Gpa(GDT + selector + _DESCRIPTOR_TYPE_OFFSET)
        self._memory.write_int(at, 1, self._memory.read_int(at, 1) | _BUSY)

    def _stub(self, vector: int) -> int:
        return _STUBS + _VECTORS.index(vector) * _STUB_SIZE

    def _write_tables(self) -> None:
        for vector in _VECTORS:
            self._memory.write(Gpa(self._stub(vector)), self._stub_code(vector))
            if self._16_bit:
                place = struct.pack("<HH", self._stub(vector) - LOW, LOW >> 4)
                self._memory.write(Gpa(LOW + 4 * vector), place)
            else:
                dpl = _DPL_3 if vector in (3, 4, END_VECTOR) else 0
                self._gate(vector, CODE_0, _GATE_32 | dpl, self._stub(vector))
        if not self._16_bit:
            self._gate(RING_1_VECTOR, CODE_1, _GATE_32 | _DPL_3, self._stub(END_VECTOR))
            self._gate(TASK_GATE_VECTOR, OTHER_TSS_SELECTOR, _GATE_TASK | _DPL_3, 0)
        self._memory.write(Gpa(GDT), struct.pack("<9Q", *_GDT))
        self.write_tss(TSS, esp0=LOW + _STACK_TOP, ss0=DATA_0, ss1=NO_SELECTOR | 1)

    def _stub_code(self, vector: int) -> bytes:
        if self._16_bit:
            return b"\x31\xdb\xb8" + struct.pack("<H", vector) + _HLT
        take_error = b"\x5b" if vector in _WITH_ERROR_CODE else b"\x31\xdb"
        return take_error + b"\xb8" + struct.pack("<I", vector) + _HLT

    def _gate(self, vector: int, selector: int, kind: int, target: int) -> None:
        gate = struct.pack("<HHBBH", target & 0xFFFF, selector, 0, kind, target >> 16)
        self._memory.write(Gpa(LOW + 8 * vector), gate)

    def _segments(self, cpl: int) -> dict[str, int]:
        fields = {
            "gdtr.base": GDT, "gdtr.limit": _GDT_LIMIT, "idtr.base": LOW, "idtr.limit": 0x7FF,
            "tr.selector": TSS_SELECTOR, "tr.base": TSS, "tr.limit": TSS_LIMIT,
            # Available, not busy: the VMCB does not show the bit, and QEMU aborts on it.
            "tr.attrib": SegAttrib.of(P=1, TYPE=0x9), "cpl": cpl,
        }  # fmt: skip
        if self._segmented:
            selectors = dict.fromkeys(("cs", *_DATA_SEGMENTS), LOW >> 4)
            code = SegAttrib.of(P=1, S=1, DPL=cpl, TYPE=0xB if self._16_bit else 3)
            data, limit, base = code.replace(TYPE=3), 0xFFFF, LOW
            fields["rsp"] = USER_STACK_TOP
        else:
            selectors = {"cs": CODE_3 if cpl else CODE_0}
            selectors |= dict.fromkeys(_DATA_SEGMENTS, DATA_3 if cpl else DATA_0)
            code = SegAttrib.of(P=1, S=1, G=1, DB=1, DPL=cpl, TYPE=0xB)
            data, limit, base = code.replace(TYPE=3), 0xFFFF_FFFF, 0
            fields["rsp"] = LOW + (USER_STACK_TOP if cpl else _STACK_TOP)
        for name, selector in selectors.items():
            attrib = code if name == "cs" else data
            fields |= {f"{name}.selector": selector, f"{name}.attrib": attrib}
            fields |= {f"{name}.limit": limit, f"{name}.base": base}
        return fields


def _descriptor(base: int, limit: int, kind: int) -> int:
    """Return a descriptor of 8 bytes; `kind` is its bits 55:52 and 47:40, as in `SegAttrib`."""
    value = limit & 0xFFFF | (base & 0xFF_FFFF) << 16 | (kind & 0xFF) << 40
    return value | (limit >> 16 & 0xF) << 48 | (kind >> 8) << 52 | (base >> 24) << 56


_FLAT_CODE = SegAttrib.of(P=1, S=1, G=1, DB=1, TYPE=0xB)
_FLAT_DATA = _FLAT_CODE.replace(TYPE=3)
_GDT = (
    0,
    _descriptor(0, 0xF_FFFF, _FLAT_CODE),
    _descriptor(0, 0xF_FFFF, _FLAT_DATA),
    _descriptor(0, 0xF_FFFF, _FLAT_CODE.replace(DPL=3)),
    _descriptor(0, 0xF_FFFF, _FLAT_DATA.replace(DPL=3)),
    _descriptor(TSS, TSS_LIMIT, SegAttrib.of(P=1, TYPE=0xB)),
    _descriptor(0, 0xF_FFFF, _FLAT_CODE.replace(DPL=1)),
    _descriptor(OTHER_TSS, TSS_LIMIT, SegAttrib.of(P=1, TYPE=0x9)),
    OTHER_TSS_SELECTOR << 16 | _GATE_TASK << 40,
)

TSS_FIELDS: Final[Mapping[str, int]] = {
    name: 4 * position
    for position, name in enumerate((
        "link", "esp0", "ss0", "esp1", "ss1", "esp2", "ss2", "cr3", "eip", "eflags",
        "eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi",
        "es", "cs", "ss", "ds", "fs", "gs", "ldt", "io_map",
    ))
}  # fmt: skip
"""Offsets in a 32-bit TSS."""

_GPRS = ("rbx", "rcx", "rdx", "rsi", "rdi", "rbp")


def ending_of(exit_: VmExit) -> Ending:
    """Return how code in L2 ended."""
    if exit_.exit_code == ExitCode.SVM_EXIT_HLT:
        return _ending(exit_.vmcb["rax"], exit_.gprs.rbx)
    return Ending(exit_.name, exit_.exit_info_1)


def _ending(rax: int, rbx: int) -> Ending:
    vector = rax & 0xFFFF
    return THE_END if vector == END_VECTOR else raised(vector, rbx & 0xFFFF_FFFF)


def _load(level: Level, state: Mapping[str, int]) -> None:
    """Put L1's vCPU into a state that has the VMCB's names."""
    vcpu = level.cpu.runner.vcpu
    sregs = vcpu.get_sregs()
    for name in ("cs", *_DATA_SEGMENTS, "tr"):
        setattr(sregs, name, _segment(state, name))
    sregs.ldt = kvm_segment(unusable=1)
    sregs.gdt = kvm_dtable(base=state["gdtr.base"], limit=state["gdtr.limit"])
    sregs.idt = kvm_dtable(base=state["idtr.base"], limit=state["idtr.limit"])
    sregs.cr0, sregs.cr3, sregs.cr4 = state["cr0"], state["cr3"], state["cr4"]
    sregs.efer = Efer(state["efer"])
    vcpu.set_sregs(sregs)
    registers = {name: state.get(name, 0) for name in ("rax", *_GPRS, "rip", "rsp", "rflags")}
    vcpu.set_regs(kvm_regs(**registers))


def _segment(state: Mapping[str, int], name: str) -> kvm_segment:
    attrib = SegAttrib(state[f"{name}.attrib"])
    return kvm_segment(
        selector=state[f"{name}.selector"],
        base=state[f"{name}.base"],
        limit=state[f"{name}.limit"],
        type=attrib.TYPE,
        present=attrib.P,
        dpl=attrib.DPL,
        db=attrib.DB,
        s=attrib.S,
        l=attrib.L,
        g=attrib.G,
    )
