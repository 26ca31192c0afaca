"""Sequences of operations, by seed: sequence k of seed S is the same everywhere.

A sequence is made of phrases, a few operations that belong together, chosen by weight and by a
rough sketch of where they lead. The sketch is no model: it is the same for all kernels, so that the
sequences are, and when it errs that is only another sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from random import Random
from typing import Any, Final

from harness.crosscheck import boundaries
from harness.errors import NsvmError
from harness.model import layout
from harness.model.operations import (
    Execute,
    GetNestedState,
    Init,
    Instruction,
    Operation,
    Resume,
    SetCpuid,
    SetMsr,
    SetNestedState,
    SetSlot,
    SetSmm,
    SetSregs,
    Smi,
    StepRsm,
    WriteHostSave,
    WriteSaveArea,
    WriteVmcb,
)
from harness.svm.msrs import Efer, Msr

LENGTH: Final = (20, 60)
"""Operations of a sequence, at least and at most."""

_SVME: Final = int(Efer.of(SVME=1))
_GPA: Final = {"a": layout.VMCB_A_GPA, "b": layout.VMCB_B_GPA}
_REPORTS_AGAIN: Final = {"save.rip": layout.IDLE_L2}
"""After #VMEXIT vmcb12 has the RIP of the instruction that exited."""

_IN_L2: Final = (
    *(Instruction.VMMCALL,) * 4,
    *(Instruction.NOP, Instruction.CPUID, Instruction.HLT, Instruction.UD2, Instruction.STGI),
    *(Instruction.CLGI, Instruction.VMRUN, Instruction.VMLOAD, Instruction.VMSAVE),
    *(Instruction.RSM, Instruction.RDMSR, Instruction.WRMSR),
)
_MSRS: Final = (int(Msr.MSR_EFER), int(Msr.MSR_VM_HSAVE_PA))


class UnknownFocus(NsvmError):
    """There is no such area."""


@dataclass
class Sketch:
    """About where the operations so far have led to."""

    svme: bool = False
    gm: bool = False
    smm: bool = False
    started: bool = False
    """The guest has run."""


Phrase = Callable[[Random, Sketch], Iterator[Operation]]


def sequence(seed: int, number: int, focus: str | None = None) -> tuple[Operation, ...]:
    """Return one sequence.

    Args:
        seed: of all sequences.
        number: which one of them.
        focus: an area of `AREAS` to do mostly; by default all alike.

    Raises UnknownFocus: there is no such area.

    """
    weights = _weights(focus)
    rng = Random(f"{seed}/{number}/{focus or ''}")
    sketch = Sketch()
    found: list[Operation] = list(_beginning(rng, sketch))
    length = rng.randint(*LENGTH)
    phrases = list(weights)
    while len(found) < length:
        [phrase] = rng.choices(phrases, [weights[each] for each in phrases])
        for operation in phrase(rng, sketch):
            found.append(operation)
            sketch.started |= isinstance(operation, Execute | Resume)
    return tuple(_fit_for_init(found[:length]))


def _fit_for_init(operations: list[Operation]) -> Iterator[Operation]:
    """Yield the operations; none that would not end where there is a local APIC in the kernel."""
    halts = any(isinstance(each, Init) for each in operations)
    for each in operations:
        if halts and isinstance(each, Execute) and each.instruction is Instruction.HLT:
            yield replace(each, instruction=Instruction.NOP)
        else:
            yield each


def _weights(focus: str | None) -> Mapping[Phrase, float]:
    if focus is not None and focus not in AREAS:
        raise UnknownFocus(f"no area is called {focus}: there are {', '.join(AREAS)}")
    found: dict[Phrase, float] = {}
    for area, phrases in AREAS.items():
        if area in _APART and area != focus:
            continue
        share = _OTHERS if focus not in (None, area) else 1.0
        for phrase, weight in phrases.items():
            found[phrase] = found.get(phrase, 0) + weight * share
    return found


# Phrases


def _beginning(rng: Random, sketch: Sketch) -> Iterator[Operation]:
    """Give, most of the time, what anything nested needs."""
    if rng.random() < 0.05:
        yield SetCpuid(rng.choice(("svm", "npt", "lm")), False)
    if rng.random() < 0.9:
        yield SetMsr(Msr.MSR_VM_HSAVE_PA, layout.HSAVE_GPA)
    if rng.random() < 0.9:
        yield from _svme_on(rng, sketch)


def _svme_on(rng: Random, sketch: Sketch) -> Iterator[Operation]:
    if sketch.smm:
        return
    sketch.svme = True
    yield _write_efer(rng, int(layout.EFER_ON) | _SVME)


def _svme_off(rng: Random, sketch: Sketch) -> Iterator[Operation]:
    sketch.svme = sketch.gm = False
    yield _write_efer(rng, int(layout.EFER_ON))


def _efer_boundary(rng: Random, sketch: Sketch) -> Iterator[Operation]:
    value = rng.choice(boundaries.EFERS)
    yield _write_efer(rng, value)
    if rng.random() < 0.7:
        yield from _svme_on(rng, sketch)


def _write_efer(rng: Random, value: int) -> Operation:
    how = rng.randrange(3)
    if how == 0:
        return SetMsr(Msr.MSR_EFER, value)
    if how == 1:
        return SetSregs({"efer": value})
    return Execute(
        Instruction.WRMSR, rax=value & 0xFFFF_FFFF, rdx=value >> 32, rcx=int(Msr.MSR_EFER)
    )


def _sregs(rng: Random, sketch: Sketch) -> Iterator[Operation]:
    name = rng.choice(list(boundaries.SREGS))
    yield SetSregs({name: rng.choice(boundaries.SREGS[name])})
    yield SetSregs(
        {
            "cr0": int(layout.CR0_ON),
            "cr4": int(layout.CR4_ON),
            "efer": int(layout.EFER_ON) | (_SVME if sketch.svme else 0),
        }
    )


def _gif(rng: Random, sketch: Sketch) -> Iterator[Operation]:
    what = rng.choice((Instruction.STGI, Instruction.STGI, Instruction.CLGI))
    yield Execute(what, user=rng.random() < 0.1)


def _get(rng: Random, sketch: Sketch) -> Iterator[Operation]:
    yield GetNestedState() if rng.random() < 0.7 else GetNestedState(rng.choice(boundaries.SIZES))


def _set_without_guest_mode(rng: Random, sketch: Sketch) -> Iterator[Operation]:
    sketch.gm = False
    size = 128 if rng.random() < 0.8 else rng.choice(boundaries.SIZES)
    yield SetNestedState(rng.choice((0, 0x100)), size=size)


def _set_guest_mode(rng: Random, sketch: Sketch) -> Iterator[Operation]:
    sketch.gm = sketch.svme
    flags = rng.choice((1, 3, 0x101, 0x103))
    yield SetNestedState(flags, vmcb_pa=rng.choice(list(_GPA.values())))
    yield from _look(rng, sketch)


def _set_boundary(rng: Random, sketch: Sketch) -> Iterator[Operation]:
    """Give a state with one thing that may be wrong in it."""
    pa = rng.choice(list(_GPA.values()))
    what = rng.randrange(5)
    if what == 0:
        yield SetNestedState(rng.choice(boundaries.FLAGS), vmcb_pa=pa)
    elif what == 1:
        yield SetNestedState(0x101, size=rng.choice(boundaries.SIZES), vmcb_pa=pa)
    elif what == 2:
        yield SetNestedState(0x101, vmcb_pa=rng.choice(boundaries.ADDRESSES))
    elif what == 3:
        yield SetNestedState(0x101, format=rng.choice((0, 2)), vmcb_pa=pa)
    else:
        name, value = _boundary(rng, {**boundaries.CONTROL, **boundaries.SAVE})
        yield SetNestedState(rng.choice((0x101, 1)), vmcb_pa=pa, changes={name: value})
    yield from _look(rng, sketch)


def _round_trip(rng: Random, sketch: Sketch) -> Iterator[Operation]:
    """Get, perhaps leave, and give back what was got; perhaps with one field changed."""
    yield GetNestedState()
    if rng.random() < 0.4:
        yield SetNestedState(0x100, size=128)
    changes = {}
    if rng.random() < 0.4:
        name, value = _boundary(rng, {**boundaries.CONTROL, **boundaries.SAVE})
        changes = {name: value}
    flags = rng.choice((1, 0x101, 0x103, 3))
    yield SetNestedState(flags, vmcb_pa=layout.VMCB_A_GPA, changes=changes, kept=True)
    yield from _look(rng, sketch)


def _vmrun(rng: Random, sketch: Sketch) -> Iterator[Operation]:
    if sketch.gm and rng.random() < 0.8:
        yield Execute(Instruction.VMMCALL)
    vmcb = rng.choice("ab")
    yield WriteVmcb(vmcb, _REPORTS_AGAIN)
    yield Execute(Instruction.VMRUN, rax=_GPA[vmcb])
    sketch.gm = sketch.svme


def _vmexit(rng: Random, sketch: Sketch) -> Iterator[Operation]:
    yield Execute(Instruction.VMMCALL)
    sketch.gm = False


def _vmrun_boundary(rng: Random, sketch: Sketch) -> Iterator[Operation]:
    """Run a vmcb12 with one value at the edge, then put the legal one back."""
    if sketch.gm:
        yield from _vmexit(rng, sketch)
    vmcb = rng.choice("ab")
    name, value = _boundary(rng, {**boundaries.CONTROL, **boundaries.SAVE})
    yield WriteVmcb(vmcb, {**_REPORTS_AGAIN, name: value})
    yield Execute(Instruction.VMRUN, rax=_GPA[vmcb])
    yield from _look(rng, sketch)
    yield Execute(Instruction.VMMCALL)
    yield WriteVmcb(vmcb, {name: layout.template_vmcb12().get(name, 0)})


def _vmrun_combined(rng: Random, sketch: Sketch) -> Iterator[Operation]:
    """Run a vmcb12 with several values that only matter together, then the legal one again."""
    if sketch.gm:
        yield from _vmexit(rng, sketch)
    changes = rng.choice(boundaries.COMBINED)
    yield WriteVmcb("a", {**_REPORTS_AGAIN, **changes})
    yield Execute(Instruction.VMRUN, rax=layout.VMCB_A_GPA)
    yield Execute(rng.choice(_IN_L2))
    yield Execute(Instruction.VMMCALL)
    template = layout.template_vmcb12()
    yield WriteVmcb("a", {name: template.get(name, 0) for name in changes})


def _vmrun_address(rng: Random, sketch: Sketch) -> Iterator[Operation]:
    if sketch.gm:
        yield from _vmexit(rng, sketch)
    user = rng.random() < 0.15
    yield Execute(Instruction.VMRUN, rax=rng.choice(boundaries.ADDRESSES), user=user)


def _hsave(rng: Random, sketch: Sketch) -> Iterator[Operation]:
    value = rng.choice((0, layout.HSAVE_GPA, layout.NO_MEMORY_GPA, layout.HSAVE_GPA | 1, 1 << 40))
    if rng.random() < 0.5:
        yield SetMsr(Msr.MSR_VM_HSAVE_PA, value)
    else:
        low, high = value & 0xFFFF_FFFF, value >> 32
        yield Execute(Instruction.WRMSR, rax=low, rdx=high, rcx=int(Msr.MSR_VM_HSAVE_PA))
    yield from _vmrun(rng, sketch)
    yield SetMsr(Msr.MSR_VM_HSAVE_PA, layout.HSAVE_GPA)


def _execute(rng: Random, sketch: Sketch) -> Iterator[Operation]:
    what = rng.choice(_IN_L2)
    rax, rcx = 0, 0
    if what in (Instruction.VMRUN, Instruction.VMLOAD, Instruction.VMSAVE):
        rax = rng.choice(boundaries.ADDRESSES) if rng.random() < 0.3 else layout.VMCB_B_GPA
    elif what in (Instruction.RDMSR, Instruction.WRMSR):
        rcx = rng.choice(_MSRS)
        rax = int(layout.EFER_ON) | _SVME if rcx == Msr.MSR_EFER else layout.HSAVE_GPA
    yield Execute(what, rax=rax, rcx=rcx, user=rng.random() < 0.15)


def _clean(rng: Random, sketch: Sketch) -> Iterator[Operation]:
    """Run one vmcb12 twice, changed in between, with a clean bit that says it was not."""
    if sketch.gm:
        yield from _vmexit(rng, sketch)
    vmcb = rng.choice("ab")
    bit = rng.choice(list(boundaries.BY_CLEAN_BIT))
    name, value = _boundary(rng, boundaries.BY_CLEAN_BIT[bit])
    yield WriteVmcb(vmcb, _REPORTS_AGAIN)
    yield Execute(Instruction.VMRUN, rax=_GPA[vmcb])
    yield Execute(Instruction.VMMCALL)
    if rng.random() < 0.3:
        yield rng.choice(
            (
                SetSregs({"efer": int(layout.EFER_ON)}),
                Execute(Instruction.VMRUN, rax=_GPA["b" if vmcb == "a" else "a"]),
                SetNestedState(0x100, size=128),
            )
        )
        yield from _svme_on(rng, sketch)
    clean = bit if rng.random() < 0.8 else 0xFFFF_FFFF
    yield WriteVmcb(vmcb, {**_REPORTS_AGAIN, name: value, "control.clean": clean})
    yield Execute(Instruction.VMRUN, rax=_GPA[vmcb])
    yield Execute(Instruction.VMMCALL)
    template = layout.template_vmcb12().get(name, 0)
    yield WriteVmcb(vmcb, {name: template, "control.clean": 0})


def _stale_memory(rng: Random, sketch: Sketch) -> Iterator[Operation]:
    """Change vmcb12 in memory while L2 runs: KVM goes by what it read."""
    yield from _vmrun(rng, sketch)
    name, value = _boundary(rng, boundaries.CONTROL)
    yield WriteVmcb("a", {name: value})
    yield GetNestedState()
    yield Execute(Instruction.VMMCALL)
    yield WriteVmcb("a", {name: layout.template_vmcb12().get(name, 0)})


def _smi(rng: Random, sketch: Sketch) -> Iterator[Operation]:
    yield Smi()
    if rng.random() < 0.9:
        yield Resume()
    sketch.smm = True


def _rsm(rng: Random, sketch: Sketch) -> Iterator[Operation]:
    yield Execute(Instruction.RSM)
    sketch.smm = False


def _smi_and_rsm(rng: Random, sketch: Sketch) -> Iterator[Operation]:
    """Interrupt L1 or L2 by an SMI, do something in SMM or to SMRAM, and leave."""
    if rng.random() < 0.6 and not sketch.smm:
        yield from _vmrun(rng, sketch)
    yield Smi()
    yield Resume()
    what = rng.randrange(8)
    if what < 3:
        name, value = _boundary(rng, boundaries.SAVE_AREA)
        yield WriteSaveArea({name: value})
    elif what == 3:
        yield WriteVmcb("a", dict([_boundary(rng, boundaries.CONTROL)]))
    elif what == 4:
        yield Execute(rng.choice((Instruction.VMRUN, Instruction.CLGI, Instruction.UD2)))
    elif what == 5:
        yield Execute(Instruction.WRMSR, rax=_SVME, rcx=int(Msr.MSR_EFER))
    elif what == 6:
        yield rng.choice((SetSregs({"efer": 0}), SetNestedState(0x100, size=128)))
    elif what == 7 and rng.random() < 0.5:
        yield WriteHostSave(dict([_boundary(rng, boundaries.SAVE)]))
    if rng.random() < 0.3:
        yield GetNestedState()
    yield StepRsm() if rng.random() < 0.15 else Execute(Instruction.RSM)
    yield from _look(rng, sketch)
    if what == 3:
        yield WriteVmcb("a", layout.template_control())
    sketch.smm = False


def _init(rng: Random, sketch: Sketch) -> Iterator[Operation]:
    """Let INIT come in L1 or in L2, with nested paging or without, or while GIF is 0."""
    where = rng.randrange(4)
    if where == 0:
        yield Execute(Instruction.CLGI)
    elif where < 3:
        if sketch.gm:
            yield from _vmexit(rng, sketch)
        control = {"control.nested_ctl": where - 1}
        yield WriteVmcb("a", {**_REPORTS_AGAIN, **layout.template_control(), **control})
        yield Execute(Instruction.VMRUN, rax=layout.VMCB_A_GPA)
    yield Init()
    yield from _look(rng, sketch)
    yield Resume()


def _smi_intercepted(rng: Random, sketch: Sketch) -> Iterator[Operation]:
    if sketch.gm:
        yield from _vmexit(rng, sketch)
    smi, template = boundaries.CONTROL["control.intercepts.3"][3], 0
    yield WriteVmcb("a", {**_REPORTS_AGAIN, "control.intercepts.3": smi})
    yield Execute(Instruction.VMRUN, rax=layout.VMCB_A_GPA)
    yield Smi()
    yield Resume()
    yield Execute(Instruction.STGI)
    yield Execute(Instruction.RSM)
    yield WriteVmcb("a", {"control.intercepts.3": template})


def _smm_flag(rng: Random, sketch: Sketch) -> Iterator[Operation]:
    # Real mode, as an SMI sets it, would be left no more.
    yield Execute(Instruction.RSM)
    yield SetSmm(True)
    if rng.random() < 0.5:
        yield from rng.choice((_svme_off, _get, _set_without_guest_mode, _gif))(rng, sketch)
    yield SetSmm(False)
    sketch.smm = sketch.gm = False
    yield from _svme_on(rng, sketch)


def _slot_away(rng: Random, sketch: Sketch) -> Iterator[Operation]:
    """Take memory away, do something that needs it, put it back."""
    what = rng.choice(("vmcb_a", "vmcb_a", "vmcb_b", "hsave", "msrpm", "iopm"))
    inside = rng.random() < 0.5
    if inside:
        yield from _vmrun(rng, sketch)
    yield SetSlot(what, False)
    phrases = (_vmrun, _vmexit, _set_guest_mode, _smi_and_rsm, _get)
    yield from rng.choice(phrases)(rng, sketch)
    yield SetSlot(what, True)


def _pages_request(rng: Random, sketch: Sketch) -> Iterator[Operation]:
    """Restore guest mode with a permission map that cannot be read at the next KVM_RUN."""
    msr = {"control.intercepts.3": boundaries.CONTROL["control.intercepts.3"][0]}
    if rng.random() < 0.5:
        yield SetSlot("msrpm", False)
        yield SetNestedState(0x101, vmcb_pa=layout.VMCB_A_GPA, changes=msr)
        yield Resume()
        yield Resume()
        yield SetSlot("msrpm", True)
    else:
        away = {"control.msrpm_base_pa": layout.NO_MEMORY_GPA}
        yield SetNestedState(0x101, vmcb_pa=layout.VMCB_A_GPA, changes=msr | away)
        yield Resume()
    sketch.gm = True
    yield from _look(rng, sketch)


def _msrpm_away(rng: Random, sketch: Sketch) -> Iterator[Operation]:
    if sketch.gm:
        yield from _vmexit(rng, sketch)
    msr = boundaries.CONTROL["control.intercepts.3"][0]
    yield WriteVmcb("b", {**_REPORTS_AGAIN, "control.intercepts.3": msr})
    yield SetSlot("msrpm", False)
    yield Execute(Instruction.VMRUN, rax=layout.VMCB_B_GPA)
    yield SetSlot("msrpm", True)
    yield WriteVmcb("b", {"control.intercepts.3": 0})


def _look(rng: Random, sketch: Sketch) -> Iterator[Operation]:
    """Go on by one step, so that what was prepared shows."""
    yield rng.choice(
        (
            Resume(),
            Resume(immediate=True),
            GetNestedState(),
            Execute(Instruction.NOP),
            Execute(Instruction.VMMCALL),
        )
    )


def _boundary(rng: Random, values: boundaries.Values) -> tuple[str, int]:
    name = rng.choice(list(values))
    return name, int(rng.choice(list(values[name])))


_OTHERS: Final = 0.15
"""Weight of what is not in focus: without it nothing gets anywhere."""

AREAS: Final[Mapping[str, Mapping[Any, float]]] = {
    "efer": {_svme_on: 3, _svme_off: 2, _efer_boundary: 2, _sregs: 1, _gif: 1, _execute: 1},
    "nested-state": {
        _get: 2,
        _set_without_guest_mode: 2,
        _set_guest_mode: 4,
        _set_boundary: 4,
        _round_trip: 3,
    },
    "vmrun": {
        _vmrun: 4,
        _vmexit: 2,
        _vmrun_boundary: 5,
        _vmrun_combined: 3,
        _vmrun_address: 2,
        _hsave: 1,
        _execute: 2,
        _stale_memory: 1,
    },
    "clean-bits": {_clean: 3},
    "smm": {_smi: 1, _rsm: 1, _smi_and_rsm: 5, _smi_intercepted: 1, _smm_flag: 2},
    "memory": {_slot_away: 2, _pages_request: 2, _msrpm_away: 1},
    "init": {_init: 2},
}
"""Kinds of phrases, by what they are about."""

_APART: Final = ("init",)
"""What is only done if asked for: it ends a sequence, and needs another machine."""
"""What `--focus` can choose, and the weights of its phrases."""
