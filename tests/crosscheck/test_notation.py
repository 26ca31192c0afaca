"""Operations as plain data."""

import json

import pytest

from harness.crosscheck.generator import AREAS, UnknownFocus, sequence
from harness.crosscheck.notation import BadNotation, from_plain, in_words, sequence_from, to_plain
from harness.model.operations import (
    OPERATIONS,
    Execute,
    Init,
    Instruction,
    SetNestedState,
    SetSlot,
    WriteVmcb,
)

MANY = [operation for number in range(200) for operation in sequence(7, number)]


def test_every_kind_is_generated():
    found = {type(operation) for operation in MANY}
    found |= {type(operation) for number in range(20) for operation in sequence(7, number, "init")}
    assert found == set(OPERATIONS)


def test_init_is_generated_only_if_asked_for_and_then_without_hlt():
    assert not any(isinstance(operation, Init) for operation in MANY)
    for number in range(60):
        operations = sequence(7, number, "init")
        kinds = {getattr(each, "instruction", type(each)) for each in operations}
        assert not {Init, Instruction.HLT} <= kinds


def test_every_instruction_is_generated():
    found = {operation.instruction for operation in MANY if isinstance(operation, Execute)}
    assert found == set(Instruction)


def test_json_brings_every_operation_back():
    text = json.dumps([to_plain(operation) for operation in MANY])
    assert list(sequence_from(json.loads(text))) == MANY


def test_words_name_what_is_changed():
    operation = SetNestedState(1, changes={"control.asid": 3}, kept=True)
    assert in_words(operation) == "SetNestedState flags=0x1 control.asid=0x3 kept=True"
    assert in_words(Execute(Instruction.WRMSR, rax=3, user=True)) == "WRMSR at CPL 3 rax=0x3"
    assert in_words(SetSlot("hsave", False)) == "SetSlot what=hsave present=False"


@pytest.mark.parametrize(
    ("plain", "what"),
    [
        (5, "no operation: 5"),
        ({"do": "Dance"}, "no operation"),
        ({"do": "SetMsr", "index": 1}, "SetMsr needs value"),
        ({"do": "SetMsr", "index": 1, "value": True}, "SetMsr.value: no int: True"),
        ({"do": "SetMsr", "index": -1, "value": 0}, "SetMsr.index: no int: -1"),
        ({"do": "SetMsr", "index": 1 << 64, "value": 0}, "SetMsr.index: no int"),
        ({"do": "SetMsr", "index": 1, "value": 0, "more": 1}, "SetMsr has no more"),
        ({"do": "Execute", "instruction": "jump"}, "no instruction: 'jump'"),
        ({"do": "SetSlot", "what": "moon", "present": True}, "there is no slot 'moon'"),
        ({"do": "SetCpuid", "feature": "x", "on": True}, "there is no CPUID feature 'x'"),
        ({"do": "SetSregs", "changes": {"cr9": 1}}, "there is no register 'cr9'"),
        ({"do": "WriteVmcb", "vmcb": "c", "changes": {}}, "there is no vmcb 'c'"),
        ({"do": "WriteVmcb", "vmcb": "a", "changes": {"asid": 1}}, "there is no field 'asid'"),
        ({"do": "WriteVmcb", "vmcb": "a", "changes": [1]}, "no numbers by name"),
        ({"do": "WriteSaveArea", "changes": {"control.asid": 1}}, "no field 'control.asid'"),
    ],
)
def test_what_is_no_operation_is_said_in_one_line(plain, what):
    with pytest.raises(BadNotation) as caught:
        from_plain(plain)
    assert what in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bad_one_of_many_is_numbered():
    with pytest.raises(BadNotation, match=r"operation 1: no operation"):
        sequence_from([to_plain(WriteVmcb("a", {})), {}])


# Sequences


def test_a_sequence_is_the_same_again():
    assert sequence(3, 4) == sequence(3, 4)
    others = [sequence(3, 5), sequence(4, 4), sequence(3, 4, "smm")]
    assert sequence(3, 4) not in others


def test_a_sequence_of_today_is_that_of_tomorrow():
    """A seed in a report must lead to the same operations on every machine."""
    assert [in_words(operation) for operation in sequence(1, 2)[:3]] == [
        "SetMsr index=0xc0010117 value=0x104000",
        "SetSregs efer=0x1500",
        "WriteVmcb vmcb=b save.rip=0x9100 save.idtr.limit=0xffe",
    ]


def test_a_focus_does_mostly_that():
    def smm_share(focus):
        operations = [each for number in range(60) for each in sequence(0, number, focus)]
        wanted = sum(in_words(each).startswith(("Smi", "RSM", "SetSmm")) for each in operations)
        return wanted / len(operations)

    assert smm_share("smm") > 2 * smm_share("vmrun")


def test_an_unknown_focus_is_refused():
    with pytest.raises(UnknownFocus, match="there are efer"):
        sequence(0, 0, "moon")
    assert "efer" in AREAS
