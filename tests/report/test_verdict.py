"""From verdicts to an exit status."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.report.verdict import Verdict, exit_status


@pytest.mark.parametrize(
    ("verdicts", "status"),
    [
        ("", 4),
        ("SKIP", 4),
        ("SKIP SKIP", 4),
        ("PASS", 0),
        ("PASS SKIP", 0),
        ("FAIL", 1),
        ("PASS FAIL SKIP", 1),
        ("ERROR", 2),
        ("MISS", 2),
        ("PASS MISS", 2),
        ("SKIP ERROR", 2),
        ("FAIL ERROR", 1),
        ("PASS FAIL MISS ERROR SKIP", 1),
    ],
)
def test_the_status_of_a_run(verdicts, status):
    assert exit_status([Verdict(word) for word in verdicts.split()]) == status


@given(st.lists(st.sampled_from(Verdict)))
def test_order_does_not_matter_and_nothing_bad_is_ever_zero(verdicts):
    status = exit_status(verdicts)
    assert status == exit_status(verdicts[::-1])
    assert (status == 0) == (set(verdicts) | {Verdict.SKIP} == {Verdict.PASS, Verdict.SKIP})
