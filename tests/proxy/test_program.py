import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import ScenarioFailure
from harness.proxy.layout import MAX_LOOP_DEPTH, proxy_op, proxy_result
from harness.proxy.ops import ARGUMENT_REGISTERS, INSTRUCTIONS, Control, Op, Status
from harness.proxy.program import (
    GP,
    OP_SIZE,
    PF,
    Fault,
    GuestFault,
    ProgramError,
    cpuid,
    decode_results,
    encode,
    flatten,
    load,
    loop,
    nop,
    rdmsr,
    wrmsr,
)

words = st.integers(0, (1 << 64) - 1)
ops = st.builds(
    lambda line, args, flags: Op(INSTRUCTIONS.index(line), line.name, tuple(args), flags),
    st.sampled_from(INSTRUCTIONS),
    st.lists(words, max_size=len(ARGUMENT_REGISTERS)),
    st.integers(0, 0xFFFF),
)


@given(st.lists(ops, max_size=5))
def test_encoded_operations_read_back_through_the_layout(program):
    data = encode(program)
    assert len(data) == OP_SIZE * len(program)
    for i, op in enumerate(program):
        seen = proxy_op.from_bytes(data[i * OP_SIZE : (i + 1) * OP_SIZE])
        assert (seen.opcode, seen.flags, seen.length) == (op.opcode, op.flags, op.length)
        padded = [*op.args, *([0] * len(ARGUMENT_REGISTERS))][: len(ARGUMENT_REGISTERS)]
        assert list(seen.args) == padded


@given(st.sampled_from(Status), st.integers(0, 255), st.lists(words, min_size=7, max_size=7))
def test_results_written_through_the_layout_decode(status, vector, values):
    written = proxy_result(status=status, vector=vector)
    written.values[:] = values
    (result,) = decode_results([nop()], bytes(written))
    assert (result.status, result.values) == (status, tuple(values))
    if status is Status.FAULT:
        assert result.fault == Fault(vector, *values[:6])
        with pytest.raises(GuestFault):
            _ = result.value
    else:
        assert result.fault is None
    assert result.ok == (status is Status.DONE)


def test_unknown_status_is_a_scribbled_mailbox():
    with pytest.raises(ScenarioFailure, match="holds no result"):
        decode_results([nop()], bytes(proxy_result(status=99)))


def test_negative_arguments_wrap_and_too_large_ones_are_refused():
    assert encode([Op(0, "NOP1", (-1,))]) == encode([Op(0, "NOP1", ((1 << 64) - 1,))])
    with pytest.raises(ProgramError, match="more than 64 bits"):
        encode([Op(0, "NOP1", (1 << 64,))])


@pytest.mark.parametrize(
    ("op", "values", "expected"),
    [
        (rdmsr(0), (0x1_0000_0002, 0, 0, 0x9_0000_0003, 0, 0, 0), 0x3_0000_0002),
        (load(0, 1), (0x1FF, 0, 0, 0, 0, 0, 0), 0xFF),
        (load(0, 8), ((1 << 64) - 1, 0, 0, 0, 0, 0, 0), (1 << 64) - 1),
    ],
)
def test_value_is_the_part_that_counts(op, values, expected):
    written = proxy_result(status=Status.DONE)
    written.values[:] = values
    assert decode_results([op], bytes(written))[0].value == expected


def test_value_of_what_was_not_run_raises():
    (result,) = decode_results([cpuid(0)], bytes(proxy_result()))
    with pytest.raises(ScenarioFailure, match=r"CPUID.*NOT_RUN"):
        _ = result.value


def test_wrmsr_splits_its_value():
    args = dict(zip(ARGUMENT_REGISTERS, wrmsr(0x10, 0x1122_3344_5566_7788).args, strict=True))
    assert (args["rcx"], args["rdx"], args["rax"]) == (0x10, 0x1122_3344, 0x5566_7788)


def test_loop_is_followed_by_its_body_inner_loops_included():
    program = flatten([nop(), loop(5, [nop(), loop(2, [load(0)])]), nop()])
    assert [op.name for op in program] == ["NOP", "LOOP", "NOP", "LOOP", "LOAD8", "NOP"]
    assert [op.length for op in program] == [0, 3, 0, 1, 0, 0]


def test_loops_nested_too_deep_are_refused():
    body = [nop()]
    for _ in range(MAX_LOOP_DEPTH):
        body = list(loop(1, body))
    assert flatten(body)
    with pytest.raises(ProgramError, match="deeper"):
        flatten(loop(1, body))


def test_loop_beyond_its_program_is_refused():
    with pytest.raises(ProgramError, match="has only 0"):
        flatten([Op(Control.LOOP, "LOOP", (1,), length=1)])


@pytest.mark.parametrize("program", [7, [nop(), 7], [[nop(), "x"]], "x"])
def test_what_is_no_operation_is_refused_in_one_line(program):
    with pytest.raises(ProgramError, match=r"^(7|'x') is no operation$"):
        flatten(program)


def test_a_fault_says_what_it_was():
    fault = Fault(PF, 2, 0x1000, 0x10_0000, 8, 2, 0)
    assert str(fault) == "#PF(error=0x2, cr2=0x1000, rip=0x100000)"
    assert fault.cpl == 0
    assert "cr2" not in str(Fault(GP, 0, 0, 0, 0x2B, 0, 0))
    assert Fault(GP, 0, 0, 0, 0x2B, 0, 0).cpl == 3
