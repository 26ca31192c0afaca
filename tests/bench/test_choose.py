import pytest

from harness.bench.loops import IOCTL_BENCHMARKS, PARTS
from harness.bench.suite import NAMES, choose
from harness.runner.expression import ExpressionError


def test_an_expression_chooses_in_order():
    assert choose("set_regs or get_regs", ("local",)) == ("get_regs", "set_regs")


def test_what_chooses_nothing_is_said():
    with pytest.raises(ExpressionError, match="chooses none of api_version, "):
        choose("nothing_like_it", ("local",))


def test_what_needs_an_emulated_host_is_not_chosen_for_a_local_one():
    assert choose("start_warm or api", ("local",)) == ("api_version", "start_warm")
    with pytest.raises(ExpressionError, match="start_warm: only on the emulated host"):
        choose("start_warm", ("local",))


def test_names_are_unique_and_parts_exist():
    assert len(set(NAMES)) == len(NAMES)
    assert {part for benchmark in IOCTL_BENCHMARKS for part in benchmark.parts} == set(PARTS)
