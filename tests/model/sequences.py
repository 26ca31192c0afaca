"""Random sequences of operations, most of them near the edge of what is legal."""

from hypothesis import strategies as st
from witnesses import BEYOND, GIF, GM, OFF, RUN_PENDING, SVME, A, B

from harness.model import layout
from harness.model.areas import SMRAM_64, VMCB
from harness.model.operations import (
    Execute,
    GetNestedState,
    Instruction,
    Resume,
    SetMsr,
    SetNestedState,
    SetSlot,
    SetSmm,
    SetSregs,
    Smi,
    WriteSaveArea,
    WriteVmcb,
)
from harness.svm.msrs import Msr

GPAS = st.sampled_from([A, A, B, A + 8, layout.HSAVE_GPA, layout.NO_MEMORY_GPA, BEYOND])
EFERS = st.sampled_from([SVME, SVME, OFF, OFF | 2, SVME & ~0x100, 0])
VALUES = st.sampled_from([0, 1, 2, 0x10, 0x1000, 1 << 31, BEYOND, (1 << 64) - 1, layout.IDLE_L2])
FLAGS = st.sampled_from([0, GIF, GM, GM | GIF, GM | RUN_PENDING, RUN_PENDING, 4, 1 << 12])


def changes(area):
    return st.dictionaries(st.sampled_from(sorted(area)), VALUES, max_size=2)


executions = st.one_of(
    st.builds(Execute, st.sampled_from(Instruction), rax=GPAS, user=st.booleans()),
    st.builds(Execute, st.just(Instruction.VMRUN), rax=GPAS),
    st.builds(
        lambda msr, value: Execute(Instruction.WRMSR, rcx=msr, rax=value),
        st.sampled_from([Msr.MSR_EFER, Msr.MSR_VM_HSAVE_PA]),
        EFERS,
    ),
)
operations = st.one_of(
    executions,
    executions,
    st.builds(Resume, st.booleans()),
    st.builds(SetMsr, st.just(Msr.MSR_EFER), EFERS),
    st.builds(SetMsr, st.just(Msr.MSR_VM_HSAVE_PA), st.sampled_from([0, layout.HSAVE_GPA, A])),
    st.builds(lambda efer: SetSregs({"efer": efer}), EFERS),
    st.builds(GetNestedState, st.sampled_from([0, 128, 4224])),
    st.builds(
        SetNestedState,
        FLAGS,
        vmcb_pa=GPAS,
        changes=changes(VMCB),
        kept=st.booleans(),
    ),
    st.builds(SetSmm, st.booleans()),
    st.just(Smi()),
    st.builds(WriteVmcb, st.sampled_from("ab"), changes(VMCB)),
    st.builds(lambda: WriteVmcb("a", layout.template_vmcb12())),
    st.builds(WriteSaveArea, changes(SMRAM_64)),
    st.builds(SetSlot, st.sampled_from(sorted(layout.SLOTS)), st.booleans()),
)
sequences = st.lists(operations, max_size=25)
