"""What happens when nested state cannot be allocated: refused whole, and undone whole.

Sources: `svm_set_efer` restores the old EFER and returns the error; `svm_allocate_nested` frees the
page when the MSR permission map fails; commit 7dffecaf4eab ("KVM: x86: report negative values from
wrmsr emulation to userspace", 5.10) takes -ENOMEM to KVM_RUN's caller. Before, in series v1, the
guest got #GP.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from harness.errors import HostError
from harness.facts import memory_controller, nested_svm
from harness.machine.guest_abi import Stage
from harness.machine.machine import Machine
from harness.machine.svme_guest import SvmeGuest
from harness.machine.vcpu import MachineVcpu
from harness.model.allocation import created, set_svme
from harness.probe.memcg import Cgroup
from harness.probe.page_alloc import PageAllocProbe
from harness.probe.pressure import BENIGN, MemoryPressure
from harness.scenarios.case import scenario
from harness.scenarios.context import Context
from harness.scenarios.measure import EXPECTED_POLICY, PATHS, STAGE_TIMEOUT_S, ready_machine
from harness.svm.msrs import Efer, Msr
from kvm_ioctl.handles import KvmError, Vcpu

#: More than the charges that a CPU may have cached (64 pages) can serve.
VCPUS = 64

WRMSR = bytes.fromhex("0f30")

Attempt = Callable[[int], int]
"""Tries to set the EFER.SVME of a vCPU, by index; returns the errno that userspace sees.

All that needs memory is done when it is made: reading SREGS, for one, fails without.
"""


def _by_msrs(machine: Machine) -> Attempt:
    vcpus = [runner.vcpu for runner in machine.vcpus]
    wanted: list[dict[int, int]] = [
        {Msr.MSR_EFER: Efer(vcpu.get_msrs([Msr.MSR_EFER])[Msr.MSR_EFER]).replace(SVME=1)}
        for vcpu in vcpus
    ]
    # KVM_SET_MSRS reports a refused MSR by its place in the list, never by an errno.
    return lambda index: 0 if vcpus[index].set_msrs(wanted[index]) == 1 else errno.ENOMEM


def _by_sregs(machine: Machine) -> Attempt:
    vcpus = [runner.vcpu for runner in machine.vcpus]
    wanted = [vcpu.get_sregs() for vcpu in vcpus]
    for sregs in wanted:
        sregs.efer = Efer(sregs.efer).replace(SVME=1)
    return lambda index: vcpus[index].try_call(Vcpu.KVM_SET_SREGS, wanted[index])


def _by_guest(machine: Machine) -> Attempt:
    guest = SvmeGuest(machine)

    def attempt(index: int) -> int:
        try:
            guest.advance(index, to=Stage.SVME_ON, timeout_s=STAGE_TIMEOUT_S)
        except KvmError as e:
            return e.errno or 0
        return 0

    return attempt


ATTEMPTS: dict[str, Callable[[Machine], Attempt]] = {
    "wrmsr": _by_guest,
    "msrs": _by_msrs,
    "sregs": _by_sregs,
}

#: What userspace is told where allocation failed. KVM_SET_SREGS drops the error: EFER must be read
#: back.
TOLD = {"wrmsr": errno.ENOMEM, "msrs": errno.ENOMEM, "sregs": 0}


@scenario(
    needs=[nested_svm, memory_controller],
    axes={"path": ("wrmsr", "msrs", "sregs")},
    benign=BENIGN,
    timeout_s=180,
)
def test_failed_allocation_is_refused_whole(context: Context, path: str) -> None:
    """Without memory, EFER.SVME stays clear, the writer is told so, and no half of it is kept."""
    cgroup = context.enter(Cgroup("pressure"))
    machine = context.enter(ready_machine(context.kvm, VCPUS))
    _warm_up(machine, path)
    counter = context.enter(PageAllocProbe())
    pressure = context.enter(MemoryPressure(cgroup))
    attempt, told = ATTEMPTS[path](machine), [-1] * VCPUS

    pressure.apply()
    for index in range(VCPUS):
        told[index] = attempt(index)
    pressure.lift()

    refused = [v for v in machine.vcpus if not _svme(v)]
    context.note("vCPUs refused", refused=len(refused), of=VCPUS, events=pressure.oom_events())
    if not refused:
        raise HostError("memory pressure refused no allocation; nothing was tested")
    on, took = set_svme(created(EXPECTED_POLICY), True)
    without, took_without = set_svme(created(EXPECTED_POLICY), True, memory=False)
    context.expect("the model's vCPU took SVME with and without memory", (took, took_without),
                   (True, False))  # fmt: skip
    for runner in machine.vcpus:
        expected = TOLD[path] if runner in refused else 0
        context.expect(f"errno for vCPU {runner.index}", told[runner.index], expected, _errno)
        if path == "wrmsr" and runner in refused:
            _expect_at_wrmsr(context, machine, runner)
    expected_bytes = (VCPUS - len(refused)) * on.nested_bytes + len(refused) * without.nested_bytes
    context.expect("bytes held", counter.read_bytes(), expected_bytes)
    context.expect("allocations refused", sum(counter.refused.values()), len(refused))
    context.expect("processes killed", pressure.oom_events()["oom_kill"], 0)

    for runner in refused:
        context.expect(f"errno for vCPU {runner.index} with memory again",
                       attempt(runner.index), 0, _errno)  # fmt: skip
        context.expect(f"EFER.SVME of vCPU {runner.index} with memory again", _svme(runner), True)
    context.expect("bytes held with memory again", counter.read_bytes(), VCPUS * on.nested_bytes)


def _warm_up(machine: Machine, path: str) -> None:
    """Run once what will run without memory, so that this process needs none of its own then."""
    if path == "wrmsr":
        # The guest's own write cannot be repeated from READY: another machine's can.
        with ready_machine(machine.kvm, VCPUS) as other:
            attempt = ATTEMPTS[path](other)
            for index in range(VCPUS):
                attempt(index)
        return
    attempt = ATTEMPTS[path](machine)
    for index in range(VCPUS):
        attempt(index)
    PATHS[path]([machine]).set(False)


def _svme(runner: MachineVcpu) -> bool:
    return bool(Efer(runner.vcpu.get_sregs().efer).SVME)


def _expect_at_wrmsr(context: Context, machine: Machine, runner: MachineVcpu) -> None:
    """RIP was not advanced: the guest will execute its WRMSR again."""
    rip = runner.vcpu.get_regs().rip
    code = machine.memory.read(rip, len(WRMSR))
    context.expect(f"instruction at vCPU {runner.index}'s RIP", code, WRMSR, bytes.hex)


def _errno(number: int) -> str:
    return errno.errorcode.get(number, str(number))
