import pytest

from harness.bench.choose import ExpressionError, matching
from harness.bench.loops import IOCTL_BENCHMARKS, PARTS
from harness.bench.suite import NAMES, choose

SOME = ("get_regs", "set_regs", "get_msrs", "run_exit")


@pytest.mark.parametrize(
    ("expression", "chosen"),
    [
        ("", SOME),
        ("regs", ("get_regs", "set_regs")),
        ("GET_", ("get_regs", "get_msrs")),
        ("get_ and regs", ("get_regs",)),
        ("run or msrs", ("get_msrs", "run_exit")),
        ("not get_", ("set_regs", "run_exit")),
        ("not get_ and not run", ("set_regs",)),
        ("run or get_ and regs", ("get_regs", "run_exit")),
        ("(run or get_) and not(regs)", ("get_msrs", "run_exit")),
    ],
)
def test_an_expression_chooses_in_order(expression, chosen):
    assert matching(SOME, expression) == list(chosen)


@pytest.mark.parametrize(
    ("expression", "why"),
    [
        ("regs and", "a part of a name is missing"),
        ("or regs", "a part of a name is missing"),
        ("()", "a part of a name is missing"),
        ("(regs", r"a \( is not closed"),
        ("regs)", r"'\)' is not expected"),
        ("get regs", "'regs' is not expected"),
        ("nested_paging", "chooses none of get_regs, set_regs"),
    ],
)
def test_what_cannot_be_read_or_fits_nothing_is_said(expression, why):
    with pytest.raises(ExpressionError, match=why):
        matching(SOME, expression)


def test_what_needs_an_emulated_host_is_not_chosen_for_a_local_one():
    assert choose("start_warm or api", ("local",)) == ("api_version", "start_warm")
    with pytest.raises(ExpressionError, match="start_warm: only on the emulated host"):
        choose("start_warm", ("local",))


def test_names_are_unique_and_parts_exist():
    assert len(set(NAMES)) == len(NAMES)
    assert {part for benchmark in IOCTL_BENCHMARKS for part in benchmark.parts} == set(PARTS)
