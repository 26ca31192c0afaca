"""The Python side of the ioctl benchmarks: the loops of ioctl_loops.c, by way of `kvm_ioctl`.

Each does what the harness does for one such operation, conveniences included; the C side does what
a C program would. Runs inside a host. Standard library only.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from errno import EEXIST
from functools import partial
from time import monotonic_ns

from harness.errors import HarnessError
from harness.machine.addresses import Gpa
from harness.machine.console import PortOut
from harness.machine.loader import EntryMode, raw_image
from harness.machine.machine import Machine
from harness.machine.vcpu import MachineVcpu
from kvm_ioctl.asm_kvm import kvm_nested_state
from kvm_ioctl.capabilities import Cap
from kvm_ioctl.cstruct import CStruct
from kvm_ioctl.exits import IoExit
from kvm_ioctl.handles import Kvm, KvmError, Vcpu, Vm

RUN_TIMEOUT_S = 30.0
"""Of one KVM_RUN that the watchdog watches; the others end with the call that they are part of."""

_MOST_MSRS = 255  # as in ioctl_loops.c
_MSR_ENTRY_BYTES = 16  # struct kvm_msr_entry
_CODE_GPA = Gpa(0xA000)

_EXIT_LOOP = bytes.fromhex("ffc0 e6f0 ebfa")
"""inc %eax; out %al, $0xf0; jmp back. As in ioctl_loops.c."""


@dataclass(frozen=True)
class Work:
    """What one run of a loop did; but for the time it is the same in C and in Python.

    `done` is how many rounds went well, `witness` a number that the kernel gave and that shows what
    was done.
    """

    done: int
    witness: int
    seconds: float

    def same_as(self, other: Work) -> bool:
        """Tell whether both did the same."""
        return (self.done, self.witness) == (other.done, other.witness)


@dataclass(frozen=True)
class Part:
    """A part of a vCPU's state: the methods of `Vcpu` that read and write it."""

    name: str
    get: str
    set: str


PARTS = {
    part.name: part
    for part in (
        Part("regs", "get_regs", "set_regs"),
        Part("sregs", "get_sregs", "set_sregs"),
        Part("xcrs", "get_xcrs", "set_xcrs"),
        Part("debugregs", "get_debugregs", "set_debugregs"),
        Part("mp_state", "get_mp_state", "set_mp_state"),
        Part("events", "get_vcpu_events", "set_vcpu_events"),
        Part("lapic", "get_lapic", "set_lapic"),
        Part("xsave", "get_xsave", "set_xsave"),
        Part("msrs", "get_msrs", "set_msrs"),
        Part("nested", "get_nested_state", "set_nested_state"),
    )
}
"""All parts, as they are called in ioctl_loops.c; what a host does not have is left out there."""


@dataclass(frozen=True)
class Stateful:
    """One part of one vCPU, read once: ready to be read and written over and over."""

    get: Callable[[], object]
    set: Callable[[], object]
    size_bytes: int


def _open_vcpu(kvm: Kvm) -> tuple[Vm, Vcpu]:
    vm = kvm.create_vm()
    if vm.check_extension(Cap.KVM_CAP_IRQCHIP):
        vm.create_irqchip()
    vcpu = vm.create_vcpu(0)
    vcpu.set_cpuid2(kvm.supported_cpuid())
    return vm, vcpu


def _kept_msrs(kvm: Kvm, vcpu: Vcpu) -> dict[int, int]:
    """Return the first MSRs of KVM's list that can be read and written back."""
    kept: dict[int, int] = {}
    for index in kvm.msr_index_list():
        value = vcpu.get_msrs([index], skip_refused=True)
        if value and vcpu.set_msrs(value) == 1 and len(kept) < _MOST_MSRS:
            kept |= value
    return kept


def _stateful(kvm: Kvm, vcpu: Vcpu, part: Part) -> Stateful:
    if part.name == "msrs":
        values = _kept_msrs(kvm, vcpu)
        size_bytes = len(values) * _MSR_ENTRY_BYTES
        indices = list(values)
        return Stateful(partial(vcpu.get_msrs, indices), partial(vcpu.set_msrs, values), size_bytes)
    if part.name == "nested" and not vcpu.vm.check_extension(Cap.KVM_CAP_NESTED_STATE):
        raise HarnessError("KVM_CAP_NESTED_STATE: not offered")
    get = getattr(vcpu, part.get)
    payload: CStruct = get()
    size_bytes = payload.allocated_bytes
    if isinstance(payload, kvm_nested_state):
        size_bytes = payload.size
    return Stateful(get, partial(getattr(vcpu, part.set), payload), size_bytes)


def refused_parts(kvm: Kvm) -> dict[str, str]:
    """Return the parts that this host cannot read or cannot write back, and why."""
    refused = {}
    vm, vcpu = _open_vcpu(kvm)
    with vm:
        for part in PARTS.values():
            try:
                _stateful(kvm, vcpu, part).set()
            except (KvmError, HarnessError) as e:
                refused[part.name] = str(e)
    return refused


def _seconds_since(start_ns: int) -> float:
    return (monotonic_ns() - start_ns) / 1e9


def _state(kvm: Kvm, count: int, names: Iterable[str], *, write: bool) -> Work:
    vm, vcpu = _open_vcpu(kvm)
    with vm:
        parts = [_stateful(kvm, vcpu, PARTS[name]) for name in names]
        steps = [part.set if write else part.get for part in parts]
        done = 0
        start = monotonic_ns()
        for done in range(1, count + 1):  # noqa: B007
            for step in steps:
                step()
        return Work(done, sum(part.size_bytes for part in parts), _seconds_since(start))


def get_state(kvm: Kvm, count: int, parts: Iterable[str]) -> Work:
    """Read these parts of a vCPU's state; the witness is their bytes."""
    return _state(kvm, count, parts, write=False)


def set_state(kvm: Kvm, count: int, parts: Iterable[str]) -> Work:
    """Write these parts of a vCPU's state; the witness is their bytes."""
    return _state(kvm, count, parts, write=True)


def api_version(kvm: Kvm, count: int, parts: Iterable[str]) -> Work:
    """Issue KVM_GET_API_VERSION, which does nothing; the witness is the sum of the answers."""
    done = witness = 0
    start = monotonic_ns()
    for done in range(1, count + 1):  # noqa: B007
        witness += kvm.api_version
    return Work(done, witness, _seconds_since(start))


def check_extension(kvm: Kvm, count: int, parts: Iterable[str]) -> Work:
    """Issue KVM_CHECK_EXTENSION; the witness is the sum of the answers."""
    done = witness = 0
    start = monotonic_ns()
    for done in range(1, count + 1):  # noqa: B007
        witness += kvm.check_extension(Cap.KVM_CAP_NR_MEMSLOTS)
    return Work(done, witness, _seconds_since(start))


def _run_loop(kvm: Kvm, count: int, until_port: Callable[[MachineVcpu], int]) -> Work:
    """Run the guest of `_EXIT_LOOP` for `count` exits; the witness is what the guest counted."""
    image = raw_image(_EXIT_LOOP, _CODE_GPA, EntryMode.LONG64)
    with Machine(kvm, image=image, memory_mib=1) as machine:
        runner = machine.vcpus[0]
        until_port(runner)  # what is touched first is mapped now
        before = runner.vcpu.get_regs().rax
        done = 0
        start = monotonic_ns()
        for done in range(1, count + 1):  # noqa: B007
            until_port(runner)
        seconds = _seconds_since(start)
        return Work(done, runner.vcpu.get_regs().rax - before, seconds)


def _enter_to_port(runner: MachineVcpu) -> int:
    exit_ = runner.vcpu.enter()
    if not isinstance(exit_, IoExit):
        raise HarnessError(f"the guest of the exit loop stopped with {exit_}")
    return exit_.data[0]


def _run_to_port(runner: MachineVcpu) -> int:
    event = runner.run(RUN_TIMEOUT_S)
    if not isinstance(event, PortOut):
        raise HarnessError(f"the guest of the exit loop stopped with {event}")
    return event.value


def run_exit(kvm: Kvm, count: int, parts: Iterable[str]) -> Work:
    """KVM_RUN with a port exit per round, by `Vcpu.enter`."""
    return _run_loop(kvm, count, _enter_to_port)


def run_machine(kvm: Kvm, count: int, parts: Iterable[str]) -> Work:
    """The same by `MachineVcpu.run`: with watchdog and devices, as scenarios run a guest."""
    return _run_loop(kvm, count, _run_to_port)


def _open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def create_vm(kvm: Kvm, count: int, parts: Iterable[str]) -> Work:
    """Create and destroy a VM; the witness is how many descriptors stay open: none."""
    done, fds = 0, _open_fds()
    start = monotonic_ns()
    for done in range(1, count + 1):  # noqa: B007
        kvm.create_vm().close()
    seconds = _seconds_since(start)
    return Work(done, _open_fds() - fds, seconds)


def create_vcpu(kvm: Kvm, count: int, parts: Iterable[str]) -> Work:
    """Create vCPUs in one VM and map their run pages; the witness is how many ids are taken."""
    with kvm.create_vm() as vm:
        done = 0
        start = monotonic_ns()
        for done in range(1, count + 1):
            vm.create_vcpu(done - 1)
        seconds = _seconds_since(start)
        taken = [vm.try_call(Vm.KVM_CREATE_VCPU, vcpu_id) == EEXIST for vcpu_id in range(count)]
        return Work(done, sum(taken), seconds)


Loop = Callable[[Kvm, int, Iterable[str]], Work]


@dataclass(frozen=True)
class IoctlBenchmark:
    """One row: a loop here, its counterpart in ioctl_loops.c, and the parts it is about."""

    name: str
    run: Loop
    c_loop: str
    parts: tuple[str, ...] = ()
    most: int = 1 << 30
    """The highest count that makes sense."""

    def without(self, refused: Iterable[str]) -> IoctlBenchmark:
        """Return it without these parts of the state."""
        parts = tuple(part for part in self.parts if part not in set(refused))
        return IoctlBenchmark(self.name, self.run, self.c_loop, parts, self.most)


_ONE_BY_ONE = ("regs", "sregs", "msrs", "xsave", "events")

IOCTL_BENCHMARKS = (
    IoctlBenchmark("api_version", api_version, "api_version"),
    IoctlBenchmark("check_extension", check_extension, "check_extension"),
    IoctlBenchmark("run_exit", run_exit, "run_exit"),
    IoctlBenchmark("run_machine", run_machine, "run_exit"),
    *(IoctlBenchmark(f"get_{part}", get_state, "get_state", (part,)) for part in _ONE_BY_ONE),
    *(IoctlBenchmark(f"set_{part}", set_state, "set_state", (part,)) for part in _ONE_BY_ONE),
    IoctlBenchmark("get_vcpu_state", get_state, "get_state", tuple(PARTS)),
    IoctlBenchmark("set_vcpu_state", set_state, "set_state", tuple(PARTS)),
    IoctlBenchmark("create_vm", create_vm, "create_vm"),
    # Each holds a descriptor, and a process may have 1024.
    IoctlBenchmark("create_vcpu", create_vcpu, "create_vcpu", most=64),
)
