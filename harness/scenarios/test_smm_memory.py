"""Nested state's memory across SMM: the SMI clears EFER.SVME, and nothing may be freed for that.

Kernel: svm_set_efer() keeps nested state while the vCPU is in SMM (is_smm()); svm_free_nested().
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from harness.errors import Unsupported
from harness.facts import nested_svm, smm
from harness.model.allocation import delta_bytes
from harness.probe.memcg import MemcgProbe
from harness.probe.page_alloc import PageAllocProbe
from harness.proxy.machine import ProxyMachine
from harness.proxy.program import triple_fault
from harness.scenarios.case import scenario
from harness.scenarios.context import Context
from harness.scenarios.l2 import proxy_machine
from harness.scenarios.measure import EXPECTED_POLICY, MEMORY_PROBES, read_settled
from harness.scenarios.migration_stops import change_events, outcome
from harness.svm.msrs import Efer, Msr
from kvm_ioctl.asm_kvm import kvm_vcpu_events

LEVELS: Final = (1, 2)
"""The level that the SMI interrupts."""
NESTED_BYTES: Final = delta_bytes(EXPECTED_POLICY)
_VCPUS: Final = 4
_ROUNDS: Final = 2
_LEAK_ROUNDS: Final = 3


def _nested_bytes(probe: PageAllocProbe) -> int:
    """Return the bytes that were allocated below EFER's setter or RSM and are held now."""
    held = probe.held_sites().items()
    return sum(site.size_bytes * count for site, count in held if site.is_nested)


def _nested_blocks(probe: PageAllocProbe) -> int:
    """Return how many blocks of nested state were allocated since arming."""
    probe.read_bytes()
    return sum(count for site, count in probe.sites.items() if site.is_nested)


def _ready(context: Context, level: int, vcpus: int = 1) -> ProxyMachine:
    """Return a machine whose levels, and whose handlers, have run before."""
    machine = proxy_machine(context, smm=True, vcpus=vcpus)
    for index in range(vcpus):
        machine.cpus[index].l1.enable_svm()
        machine.level(level, npt=False, vcpu=index).ping()
        machine.inject_smi(index).rsm()
    return machine


@scenario(needs=[nested_svm, smm], axes={"level": LEVELS, "probe": tuple(MEMORY_PROBES)}, levels=2)
def test_smm_neither_allocates_nor_frees(context: Context, level: int, probe: str) -> None:
    """In SMM a vCPU's nested state is held as it was, and after RSM too."""
    machine = _ready(context, level, _VCPUS)
    counter = context.enter(MEMORY_PROBES[probe]())
    if isinstance(counter, MemcgProbe) and counter.source == "memory.current":
        raise Unsupported(f"{counter.source} counts user pages too; memory.stat has no line kernel")
    before = read_settled(counter)
    for _ in range(_ROUNDS):
        handlers = [machine.inject_smi(index) for index in range(_VCPUS)]
        svme = [Efer(handler.rdmsr(Msr.MSR_EFER)).SVME for handler in handlers]
        context.expect("EFER.SVME in SMM", svme, [0] * _VCPUS)
        inside = read_settled(counter) - before
        context.expect_within("bytes in SMM", inside, 0, counter.resolution_bytes())
        for handler in handlers:
            handler.rsm()
    after = read_settled(counter) - before
    context.expect_within("bytes after RSM", after, 0, counter.resolution_bytes())


@scenario(needs=[nested_svm, smm], axes={"level": LEVELS}, levels=2)
def test_smm_makes_no_allocation_event(context: Context, level: int) -> None:
    """From SMI to RSM no block of nested state is allocated, freed and allocated again included."""
    machine = _ready(context, level)
    probe = context.enter(PageAllocProbe())
    for _ in range(_ROUNDS):
        machine.inject_smi().ping()
        machine.smm.rsm()
    context.expect("blocks allocated", _nested_blocks(probe), 0)


@scenario(needs=[nested_svm, smm])
def test_svme_cleared_in_the_save_area_keeps_memory(context: Context) -> None:
    """RSM with SVME=0 in the save area keeps nested state until SVME is next cleared outside."""
    machine = proxy_machine(context, smm=True)
    l1 = machine.l1
    l1.ping()
    machine.inject_smi().rsm()
    probe = context.enter(PageAllocProbe())
    l1.enable_svm()
    context.expect("bytes with SVME=1", _nested_bytes(probe), NESTED_BYTES)
    handler = machine.inject_smi()
    area = handler.save_area
    area.efer = Efer(area.efer).replace(SVME=0)
    handler.write_save_area(area)
    handler.rsm()
    context.expect("EFER.SVME after RSM", Efer(l1.rdmsr(Msr.MSR_EFER)).SVME, 0)
    context.expect("bytes after RSM", _nested_bytes(probe), NESTED_BYTES)
    _set_svme(machine, 1)
    context.expect("blocks allocated in all", _nested_blocks(probe), 2)
    _set_svme(machine, 0)
    context.expect("bytes with SVME=0", _nested_bytes(probe), 0)


def _set_svme(machine: ProxyMachine, svme: int) -> None:
    l1 = machine.l1
    l1.wrmsr(Msr.MSR_EFER, Efer(l1.rdmsr(Msr.MSR_EFER)).replace(SVME=svme))


@scenario(needs=[nested_svm, smm])
def test_svme_set_by_the_handler_is_freed_by_rsm(context: Context) -> None:
    """A handler that sets SVME has RSM free nested state and allocate it again: none is lost."""
    machine = _ready(context, 1)
    _set_svme(machine, 0)
    probe = context.enter(PageAllocProbe())
    _set_svme(machine, 1)
    context.expect("blocks at first", _nested_blocks(probe), 2)
    handler = machine.inject_smi()
    efer = Efer(handler.rdmsr(Msr.MSR_EFER))
    handler.wrmsr(Msr.MSR_EFER, efer.replace(SVME=1))
    context.expect("blocks after the handler's", _nested_blocks(probe), 2)
    handler.rsm()
    context.note("blocks after RSM", count=_nested_blocks(probe))
    context.expect("bytes after RSM", _nested_bytes(probe), NESTED_BYTES)
    _set_svme(machine, 0)
    context.expect("bytes with SVME=0", _nested_bytes(probe), 0)


@scenario(needs=[nested_svm, smm])
def test_svme_cleared_by_ioctl_in_smm_keeps_memory(context: Context) -> None:
    """KVM_SET_SREGS that clears SVME while smi.smm is set keeps nested state for the next time."""
    machine = proxy_machine(context, smm=True)
    machine.l1.ping()
    probe = context.enter(PageAllocProbe())
    machine.l1.enable_svm()
    vcpu = machine.vcpus[0].vcpu
    for smm_flag, svme in ((1, 1), (1, 0), (0, 0)):
        change_events(machine, _smm_of(smm_flag))
        sregs = vcpu.get_sregs()
        sregs.efer = Efer(sregs.efer).replace(SVME=svme)
        vcpu.set_sregs(sregs)
        context.expect(f"bytes, smm={smm_flag}, SVME={svme}", _nested_bytes(probe), NESTED_BYTES)
    _set_svme(machine, 1)
    context.expect("blocks allocated in all", _nested_blocks(probe), 2)
    _set_svme(machine, 0)
    context.expect("bytes with SVME=0", _nested_bytes(probe), 0)


def _smm_of(value: int) -> Callable[[kvm_vcpu_events], None]:
    """Return what sets smi.smm."""

    def change(events: kvm_vcpu_events) -> None:
        events.smi.smm = value

    return change


@scenario(
    needs=[nested_svm, smm],
    axes={"level": LEVELS, "end": ("close", "shutdown", "smm_by_ioctl")},
    levels=2,
)
def test_vm_that_ends_in_smm_leaks_nothing(context: Context, level: int, end: str) -> None:
    """A VM that is closed in SMM, or after a shutdown there, gives its nested state back."""
    probe = context.enter(PageAllocProbe())
    for _ in range(_LEAK_ROUNDS):
        with ProxyMachine(context.kvm, smm=True) as machine:
            machine.l1.enable_svm()
            machine.level(level, npt=False).ping()
            if end == "smm_by_ioctl":
                change_events(machine, _smm_of(1))
            else:
                handler = machine.inject_smi()
                handler.ping()
            if end == "shutdown":
                context.note("KVM_RUN", ended_in=str(outcome(handler, triple_fault())))
    context.expect("nested bytes held", _nested_bytes(probe), 0)
    context.expect("blocks allocated", _nested_blocks(probe), 2 * _LEAK_ROUNDS)
