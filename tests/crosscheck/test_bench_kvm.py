"""The bare bench on this machine's KVM: what needs no SVM."""

import pytest

from harness.crosscheck.bench import BareBench
from harness.model import layout
from harness.model.operations import (
    Execute,
    Instruction,
    Resume,
    SetMsr,
    SetSlot,
    SetSregs,
    Smi,
    WriteSaveArea,
    WriteVmcb,
)
from harness.svm.msrs import Msr

pytestmark = pytest.mark.kvm


@pytest.fixture
def bench(kvm):
    with BareBench(kvm, plain=True) as bench:
        yield bench


def do(bench, instruction, **registers):
    return bench.apply(Execute(Instruction[instruction], **registers))


def test_an_instruction_reports(bench):
    outcome = do(bench, "NOP", rax=5)
    assert outcome.result == "report"
    assert outcome.seen["rax"] == 5
    # Behind the OUT that follows it.
    assert outcome.seen["rip"] == layout.snippet_gpa(Instruction.NOP) + 1 + 2


def test_an_exception_reports_its_vector_and_the_next_instruction_works(bench):
    assert do(bench, "UD2").result == "#UD"
    assert do(bench, "NOP").result == "report"


def test_msrs_are_read_and_written(bench):
    outcome = do(bench, "WRMSR", rcx=Msr.MSR_EFER, rax=int(layout.EFER_ON) | 1)
    assert outcome.result == "report"
    assert outcome.seen["efer"] == layout.EFER_ON | 1
    assert bench.apply(SetMsr(Msr.MSR_EFER, int(layout.EFER_ON))).result == "ok"
    assert do(bench, "RDMSR", rcx=Msr.MSR_EFER).seen["rax"] == layout.EFER_ON
    assert bench.apply(SetMsr(0xDEAD_0000, 1)).result == "refused"


def test_hlt_and_resume(bench):
    assert do(bench, "HLT").result == "hlt"
    assert bench.apply(Resume()).result == "report"
    assert bench.apply(Resume(immediate=True)).result == "intr"


def test_registers_are_set(bench):
    cr4 = int(layout.CR4_ON) | 1 << 7
    assert bench.apply(SetSregs({"cr4": cr4})).seen["cr4"] == cr4
    assert bench.apply(SetSregs({"cr4": 1 << 63})).result == "EINVAL"


def test_an_smi_enters_smm_and_rsm_leaves_it(bench):
    outcome = bench.apply(Smi())
    if outcome.result == "ENOTTY":
        pytest.skip("this KVM has no SMM")
    assert outcome.seen["smi_pending"]
    outcome = bench.apply(Resume())
    assert outcome.result == "report"
    assert outcome.seen["smm"]
    assert outcome.seen["smram.smm_revison"] == 0x2_0064
    assert outcome.seen["smram.rip"] == layout.IDLE_L1
    # The real-mode handler: exceptions are reported there, too.
    assert do(bench, "UD2").result == "#UD"
    outcome = do(bench, "RSM")
    assert outcome.result == "report"
    assert not outcome.seen["smm"]


def test_an_instruction_while_an_smi_can_be_taken_is_not_interrupted(bench):
    if bench.apply(Smi()).result == "ENOTTY":
        pytest.skip("this KVM has no SMM")
    outcome = do(bench, "UD2")
    assert outcome.seen["smm"]
    assert outcome.seen["smram.rip"] == layout.IDLE_L1


def test_memory_is_written_taken_away_and_kept(bench):
    assert bench.apply(WriteVmcb("a", {"control.asid": 7})).seen["vmcb_a.control.asid"] == 7
    for present in (False, True):
        outcome = bench.apply(SetSlot("vmcb_a", present))
        assert outcome.result == "ok"
        assert outcome.seen["vmcb_a.control.asid"] == 7
    assert bench.apply(WriteSaveArea({"cr0": 5})).seen["smram.cr0"] == 5


def test_a_slot_that_is_away_cannot_be_taken_away_again(bench):
    assert bench.apply(SetSlot("hsave", False)).result == "ok"
    assert bench.apply(SetSlot("hsave", False)).result == "EINVAL"


def test_both_vmcb12_hold_the_template(bench):
    seen = bench.observe()
    for name, value in layout.template_vmcb12().items():
        assert seen[f"vmcb_a.{name}"] == seen[f"vmcb_b.{name}"] == value
