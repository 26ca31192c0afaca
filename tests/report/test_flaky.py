"""Failure rates and their intervals."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.report.flaky import Rate, flaky_rate
from harness.report.run_record import CaseRecord
from harness.report.verdict import Verdict

_WORDS = {"P": Verdict.PASS, "F": Verdict.FAIL, "S": Verdict.SKIP, "E": Verdict.ERROR}


def attempts(text):
    return [[CaseRecord("a", _WORDS[letter]) for letter in run] for run in text.split()]


@pytest.mark.parametrize(
    ("failed", "of", "low", "high"),
    # Newcombe, Statist. Med. 17 (1998), table I, method 3 (score without continuity correction).
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611),
     (1, 29, 0.0061, 0.1718)],
)  # fmt: skip
def test_the_interval_is_wilsons(failed, of, low, high):
    assert Rate(failed, of).interval == pytest.approx((low, high), abs=5e-5)


@given(st.integers(0, 500), st.integers(0, 500))
def test_the_rate_is_in_its_interval(failed, passed):
    low, high = Rate(failed, failed + passed).interval
    assert 0 <= low < high <= 1
    if failed + passed:
        assert low <= failed / (failed + passed) <= high


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        ("", None),
        ("P P P", None),
        ("F F F", None),
        ("F F P P", None),
        ("P P F", None),
        ("P F P", Rate(1, 3)),
        ("PPFP", Rate(1, 4)),
        ("P PF", Rate(1, 3)),
        ("P E P S P", None),
        ("F E P S F", Rate(2, 3)),
    ],
)
def test_what_was_mended_or_broke_once_is_not_flaky(runs, expected):
    assert flaky_rate(attempts(runs)) == expected
