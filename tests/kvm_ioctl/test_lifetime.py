"""What handles hold, and that they let go of it; the GIL."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvm_ioctl.handles import ClosedError, Kvm, Vm

pytestmark = pytest.mark.kvm


def open_fds() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def test_closing_a_vm_closes_what_was_made_from_it(kvm: Kvm) -> None:
    gc.collect()
    before = open_fds()
    vm = kvm.create_vm()
    vcpu = vm.create_vcpu(0)
    stats = vcpu.stats()
    vm.close()
    vm.close()
    assert (vcpu.closed, stats.closed) == (True, True)
    assert open_fds() == before


def test_closed_handles_say_so(vm: Vm) -> None:
    vcpu = vm.create_vcpu(0)
    vcpu.close()
    vcpu.close()
    for use in (vcpu.enter, vcpu.get_regs, lambda: vcpu.run, vcpu.coalesced_ring):
        with pytest.raises(ClosedError, match="this vcpu fd is closed"):
            use()


def test_run_page_that_someone_still_holds_stays_readable(vm: Vm) -> None:
    vcpu = vm.create_vcpu(0)
    run = vcpu.run
    vcpu.close()
    assert run.exit_reason == 0


def test_many_vms_leave_nothing_behind(kvm: Kvm) -> None:
    gc.collect()
    before = open_fds()
    for _ in range(50):
        with kvm.create_vm() as vm, vm.create_vcpu(0) as vcpu:
            vcpu.get_regs()
    assert open_fds() == before


GIL_PROGRAM = Path(__file__).with_name("gil_program.py")
GIL_DEADLINE_S = 60


def test_waiting_for_a_running_vcpu_does_not_stop_other_threads(kvm: Kvm) -> None:
    """KVM_GET_XSAVE waits for KVM_RUN to end; who would end it must be able to run."""
    done = subprocess.run(
        [sys.executable, str(GIL_PROGRAM)],
        timeout=GIL_DEADLINE_S,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "kicked out while waiting\n"
