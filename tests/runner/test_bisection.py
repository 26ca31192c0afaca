"""Where an ordered list turns from good to bad."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.runner.bisection import Answer, BisectError, Turn, bisect

GOOD, BAD, UNTOLD = Answer.GOOD, Answer.BAD, Answer.CANNOT_TELL


def search(answers):
    """Bisect a list of answers; return the turn and the numbers that were asked for."""
    names = [str(number) for number in range(len(answers))]
    asked = []

    def test(name):
        asked.append(int(name))
        return answers[int(name)]

    return bisect(names, test), asked


@given(st.integers(1, 60), st.integers(1, 60))
def test_the_turn_is_found_in_few_steps(good, bad):
    turn, asked = search([GOOD] * good + [BAD] * bad)
    assert (turn.last_good, turn.first_bad, turn.untold) == (str(good - 1), str(good), ())
    assert len(asked) == turn.tried <= 2 + math.ceil(math.log2(good + bad))


@given(st.lists(st.sampled_from(Answer), max_size=30))
def test_whatever_the_answers_a_turn_with_nothing_told_in_between_is_found(middle):
    answers = [GOOD, *middle, BAD]
    turn, asked = search(answers)
    good, bad = int(turn.last_good), int(turn.first_bad)
    assert (answers[good], answers[bad]) == (GOOD, BAD)
    assert good < bad
    assert [answers[int(name)] for name in turn.untold] == [UNTOLD] * (bad - good - 1)
    assert len(asked) == len(set(asked))


def test_what_cannot_be_told_is_gone_around():
    turn, _ = search([GOOD, GOOD, UNTOLD, UNTOLD, BAD, BAD])
    assert turn == Turn("1", "4", ("2", "3"), turn.tried)


@pytest.mark.parametrize(
    ("answers", "says"),
    [
        ([BAD, BAD], "0 is to be good, and is: bad"),
        ([GOOD, GOOD], "1 is to be bad, and is: good"),
        ([UNTOLD, BAD], "0 is to be good, and is: cannot tell"),
        ([GOOD], "no two kernels"),
    ],
)
def test_ends_that_are_not_as_they_were_said_to_be(answers, says):
    with pytest.raises(BisectError, match=says):
        search(answers)
