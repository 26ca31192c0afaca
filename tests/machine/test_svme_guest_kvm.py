"""Guest `svme` where there is no SVM: it says so, and survives the attempt."""

import pytest

from guest_images import ElfClass
from harness.machine.console import GuestExit
from harness.machine.cpuid import CpuidPolicy
from harness.machine.guest_abi import Command, Stage, Status, cpu_area_gpa
from harness.machine.machine import Machine
from harness.machine.svme_guest import SvmeGuest
from harness.machine.vcpu import UnexpectedStop

pytestmark = pytest.mark.kvm

GP = 13


@pytest.fixture
def guest(kvm, images):
    machine = Machine(
        kvm, image=images("svme"), vcpus=64, memory_mib=4, cpuid=CpuidPolicy(svm=False)
    )
    with machine:
        yield SvmeGuest(machine)


@pytest.mark.parametrize("index", [0, 1, 63])
def test_it_reports_no_svm_and_the_caught_gp(guest, index):
    guest.machine.vcpus[index].run_until(Stage.READY)
    seen = guest.advance(index, to=Stage.NO_SVM)
    assert (seen.index, seen.has_svm, seen.has_npt) == (index, 0, 0)
    assert seen.self_gpa == cpu_area_gpa(index)
    assert seen.vmcb12_gpa == guest.vmcb12_gpa(index)
    guest.command(index, Command.TOGGLE)
    fault = guest.advance(index, to=Stage.FAULT)
    assert (fault.fault_vector, fault.fault_error) == (GP, 0)
    assert guest.machine.memory.read(fault.fault_rip, 2) == bytes.fromhex("0f30")  # WRMSR
    off = guest.advance(index, to=Stage.SVME_OFF)
    assert not off.efer & 1 << 12
    assert guest.next_stage(index) is Stage.DONE
    assert guest.machine.vcpus[index].run() == GuestExit(Status.NO_SVM)


def test_vcpus_have_separate_reports(guest):
    guest.advance(3, to=Stage.READY)
    assert guest.report(3).stage == Stage.READY
    assert guest.report(2).stage == guest.report(4).stage == 0


def test_again_repeats_a_stage_and_stop_ends_the_walk(guest):
    guest.advance(0, to=Stage.READY)
    guest.command(0, Command.AGAIN)
    assert guest.advance(0, to=Stage.READY).stage_count == 2
    guest.command(0, Command.STOP)
    assert guest.next_stage(0) is Stage.DONE


def test_a_stage_that_never_comes_is_an_unexpected_stop(guest):
    with pytest.raises(UnexpectedStop, match=r"waited for stage SVME_ON .* got stage NO_SVM"):
        guest.advance(0, to=Stage.SVME_ON)


def test_multiboot_entry_walks_the_same(kvm, images):
    image = images("svme", ElfClass.ELF32)
    policy = CpuidPolicy(svm=False)
    with Machine(kvm, image=image, memory_mib=4, cpuid=policy) as machine:
        guest = SvmeGuest(machine)
        guest.advance(0, to=Stage.NO_SVM)
        assert guest.next_stage(0) is Stage.DONE
