"""Expressions choose names as pytest's -k does."""

import pytest

from harness.runner.expression import ExpressionError, matcher

SOME = ("get_regs", "set_regs", "get_msrs", "run_exit")


@pytest.mark.parametrize(
    ("expression", "chosen"),
    [
        ("", SOME),
        (" ", SOME),
        ("regs", ("get_regs", "set_regs")),
        ("GET_", ("get_regs", "get_msrs")),
        ("get_ and regs", ("get_regs",)),
        ("run or msrs", ("get_msrs", "run_exit")),
        ("not get_ and not run", ("set_regs",)),
        ("run or get_ and regs", ("get_regs", "run_exit")),
        ("(run or get_) and not(regs)", ("get_msrs", "run_exit")),
    ],
)
def test_an_expression_fits_parts_of_names(expression, chosen):
    assert tuple(filter(matcher(expression), SOME)) == chosen


@pytest.mark.parametrize("expression", ["regs and", "or regs", "(regs", "regs)", "get regs", "()"])
def test_what_cannot_be_read_is_said_with_its_column(expression):
    with pytest.raises(ExpressionError, match=r"': at column \d+: expected "):
        matcher(expression)
