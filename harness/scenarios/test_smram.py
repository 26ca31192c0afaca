"""The SMRAM state save area, field by field: what an SMI writes, and that RSM brings it back.

APM vol. 2, 10.2.3 SMRAM State-Save Area; kernel: enter_smm_save_state_64(), _32(),
rsm_load_state_64(), _32(), svm_enter_smm(), svm_leave_smm().
"""

from __future__ import annotations

import os
from typing import Any, Final

from harness.crosscheck.bench import BareBench
from harness.crosscheck.observe import registers_after
from harness.crosscheck.settings import setting_for
from harness.errors import ScenarioFailure
from harness.facts import nested_svm, npt, smm
from harness.model import layout
from harness.model.knobs import SETTINGS, Knobs
from harness.model.model import STEPPED
from harness.model.operations import Operation, Resume, Smi, StepRsm
from harness.model.save_area import SIZE_BYTES as SAVE_AREA_BYTES
from harness.scenarios.case import scenario
from harness.scenarios.context import Context
from harness.svm.smram import (
    DEFAULT_SMBASE,
    SMRAM_GPRS,
    SMRAM_STATE_OFFSET,
    kvm_smram_state_32,
    kvm_smram_state_64,
)
from harness.tamper.cells import Cell, Start
from harness.tamper.interrupted import area_32, area_64, difference
from kvm_ioctl.handles import Vcpu

_STARTS: Final = (Start.PLAIN.value, Start.L1.value, Start.L2.value, Start.L2_NPT.value)
_IN_L2: Final = (Start.L2, Start.L2_NPT)
_LIMITS: Final = (0, 0xFFFF, 0xF_FFFF, 0x10_0FFF, 0x7FFF_FFFF, 0xFFFF_FFFF)
_RIPS: Final = (0x9000, 0x1_0000_9000, 0xFFFF_FFFF_8100_0000)
_HOST_SAVE: Final = ("efer", "cr0", "cr3", "rip", "rsp", "rax", "rflags", "cpl")


def _knobs() -> Knobs:
    return SETTINGS[setting_for(os.uname().release)]


def _bench(context: Context, start: Start) -> BareBench:
    """Return a bench that stands in the context that an SMI is to interrupt."""
    bench: BareBench = context.enter(BareBench(context.kvm, cure=False))
    *ways, _smi, _resume = Cell("", start, "", ()).into_smm()
    for operation in ways:
        _done(bench, operation)
    return bench


def _done(bench: BareBench, operation: Operation) -> dict[str, Any]:
    outcome = bench.apply(operation)
    if outcome.result not in ("ok", "report"):
        raise ScenarioFailure(f"{operation}: {outcome.result}")
    return dict(outcome.seen)


def _fill(vcpu: Vcpu) -> None:
    """Give every register that code can do without a value of its own."""
    regs = vcpu.get_regs()
    for index, name in enumerate(SMRAM_GPRS):
        if name != "rsp":
            setattr(regs, name, 0x0123_4567_8900_0000 + (index << 32) + index)
    vcpu.set_regs(regs)
    sregs, debug = vcpu.get_sregs(), vcpu.get_debugregs()
    sregs.fs.base, sregs.gs.base = 0x1_2345_6000, 0xFFFF_8000_0000_1000
    sregs.fs.selector, sregs.gs.limit = layout.USER_DS, 0xF_FFFF
    sregs.cr2 = 0xDEAD_B000
    vcpu.set_sregs(sregs)
    debug.db[0], debug.dr6 = 0x1234, debug.dr6 | 1
    vcpu.set_debugregs(debug)


def _fill_32(vcpu: Vcpu) -> None:
    regs = vcpu.get_regs()
    for index, name in enumerate(("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp")):
        setattr(regs, name, 0x8900_0000 + index)
    vcpu.set_regs(regs)


def _area(bench: BareBench, kind: Any) -> Any:
    return kind.from_bytes(bench.smram_bytes(SMRAM_STATE_OFFSET, SAVE_AREA_BYTES))


def _expect_none(what: str, lines: list[str]) -> None:
    if lines:
        raise ScenarioFailure(f"{what}: {'; '.join(lines[:8])}")


@scenario(needs=[nested_svm, npt, smm], axes={"interrupts": _STARTS}, levels=2)
def test_smram_has_every_register(context: Context, interrupts: str) -> None:
    """Each field of the 64-bit save area is a register of what the SMI interrupted, or 0."""
    start = Start(interrupts)
    bench = _bench(context, start)
    _fill(bench.vcpu)
    gpa = layout.VMCB_A_GPA if start in _IN_L2 else None
    expected = area_64(bench.vcpu, smbase=DEFAULT_SMBASE, int_shadow=0, vmcb12_gpa=gpa)
    before = registers_after(bench.vcpu)
    _done(bench, Smi())
    context.expect("in SMM", _done(bench, Resume())["smm"], True)
    _expect_none("save area", difference(_area(bench, kvm_smram_state_64), expected))
    _expect_back(context, bench, before, start in _IN_L2)


@scenario(needs=[nested_svm, smm])
def test_smram_has_every_register_in_its_legacy_form(context: Context) -> None:
    """Without CPUID LM each field of the 32-bit save area is a register, or 0."""
    bench = _bench(context, Start.LEGACY)
    _fill_32(bench.vcpu)
    expected = area_32(bench.vcpu, smbase=DEFAULT_SMBASE, int_shadow=0)
    before = registers_after(bench.vcpu)
    _done(bench, Smi())
    context.expect("in SMM", _done(bench, Resume())["smm"], True)
    _expect_none("save area", difference(_area(bench, kvm_smram_state_32), expected))
    _expect_back(context, bench, before, in_l2=False)


def _expect_back(context: Context, bench: BareBench, before: dict[str, int], in_l2: bool) -> None:
    """Leave SMM and compare all registers with those before the SMI."""
    outcome = bench.apply(StepRsm())
    context.expect("RSM", outcome.result, STEPPED)
    context.expect("GUEST_MODE", outcome.seen["guest_mode"], in_l2)
    lines = [
        f"{name}: {outcome.seen[name]:#x}, was {value:#x}"
        for name, value in before.items()
        if outcome.seen[name] != value
    ]
    _expect_none("after RSM", lines)


@scenario(
    needs=[nested_svm, smm],
    axes={"interrupts": (Start.L1.value, Start.L2.value), "limit": _LIMITS},
    levels=2,
)
def test_smram_keeps_segment_limits(context: Context, interrupts: str, limit: int) -> None:
    """RSM brings back the limit that a segment had when the SMI came."""
    bench = _bench(context, Start(interrupts))
    sregs = bench.vcpu.get_sregs()
    sregs.ds.limit = sregs.fs.limit = limit
    sregs.ds.g = sregs.fs.g = limit > 0xF_FFFF
    bench.vcpu.set_sregs(sregs)
    _done(bench, Smi())
    _done(bench, Resume())
    seen = bench.apply(StepRsm()).seen
    for name in ("ds", "fs"):
        context.expect(f"limit of {name}", seen[f"after.{name}.limit"], limit)


@scenario(
    needs=[nested_svm, smm],
    axes={"interrupts": (Start.L1.value, Start.L2.value), "rip": _RIPS},
    levels=2,
)
def test_smram_keeps_rip(context: Context, interrupts: str, rip: int) -> None:
    """RSM by a handler in real mode comes back to all 64 bits of RIP."""
    bench = _bench(context, Start(interrupts))
    regs = bench.vcpu.get_regs()
    regs.rip = rip
    bench.vcpu.set_regs(regs)
    _done(bench, Smi())
    seen = _done(bench, Resume())
    context.expect("RIP in the save area", seen["smram.rip"], rip)
    context.expect("RIP after RSM", bench.apply(StepRsm()).seen["after.rip"], rip)


@scenario(needs=[nested_svm, npt, smm], axes={"nested_paging": (False, True)}, levels=2)
def test_smi_in_l2_keeps_l1_in_the_host_save_page(context: Context, nested_paging: bool) -> None:
    """While an SMI that came in L2 is handled, VM_HSAVE_PA+0x400 is L1's state at VMRUN.

    Not CR4.MCE, which KVM's own CR4 brings in: scenario smi_leaves_control_registers_of_l1. A
    kernel that keeps the state to itself leaves the page alone.
    """
    start = Start.L2_NPT if nested_paging else Start.L2
    bench: BareBench = context.enter(BareBench(context.kvm, cure=False))
    *ways, vmrun, smi, resume = Cell("", start, "", ()).into_smm()
    for operation in ways:
        _done(bench, operation)
    _done(bench, vmrun)
    l1 = _l1_at_vmrun(bench)
    _done(bench, smi)
    seen = _done(bench, resume)
    if _knobs().l1_state_in_smm == "kernel":
        l1 = dict.fromkeys(l1, 0)
    lines = [
        f"{name}: {seen[f'hsave.save.{name}']:#x}, not {value:#x}"
        for name, value in l1.items()
        if seen[f"hsave.save.{name}"] != value
    ]
    context.note("fields compared", fields=len(l1), of="kernel" if not any(l1.values()) else "page")
    _expect_none("VM_HSAVE_PA + 0x400", lines)


def _l1_at_vmrun(bench: BareBench) -> dict[str, int]:
    """Return L1's state as KVM_GET_NESTED_STATE has it while L2 runs."""
    prefix = "nested.save."
    seen = bench.observe()
    names = (*_HOST_SAVE, *(f"{s}.{part}" for s in ("es", "cs", "ss", "ds")
             for part in ("selector", "attrib", "limit", "base")),
             *(f"{t}.{part}" for t in ("gdtr", "idtr") for part in ("limit", "base")))  # fmt: skip
    return {name: seen[prefix + name] for name in names}
