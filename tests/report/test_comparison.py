"""Runs side by side: what differs, and directories that hold no results."""

import json

import pytest

from harness.report.comparison import Cell, ResultsError, Row, compare, read_run, titles
from harness.report.results import ResultsFile
from harness.report.verdict import Verdict

PASS = Cell(Verdict.PASS)
FAIL = Cell(Verdict.FAIL, "no", "", "FAIL: no")
KNOWN = Cell(Verdict.FAIL, "no", "id", "FAIL: no")


@pytest.fixture
def run(tmp_path):
    """Writes a run's results; returns its directory."""

    def write(name, cells, kernel="6.1.0"):
        with ResultsFile(tmp_path / name / "results.jsonl") as file:
            file.write("run", argv=[])
            for case, cell in cells.items():
                file.write(
                    "end", case=case, verdict=cell.verdict.value, reason=cell.reason,
                    known=cell.known, host={"kernel_release": kernel},
                )  # fmt: skip
        return tmp_path / name

    return write


def test_only_cases_whose_verdicts_differ_are_rows(run):
    one = read_run(run("one", {"a": PASS, "b": PASS, "c": FAIL, "d": PASS}))
    other = read_run(run("other", {"a": PASS, "b": KNOWN, "c": KNOWN}))
    found = compare([one, other])
    assert found.rows == [Row("b", [PASS, KNOWN])]
    assert (found.same, found.same_failures, found.partial) == (2, 1, 1)


def test_the_same_failure_is_said_to_be_and_another_one_is_a_row(run):
    def reason(text):
        return Cell(Verdict.FAIL, text, "", f"FAIL: {text}")

    one = read_run(run("one", {"a": reason("x: saw 1"), "b": reason("in 5 s")}))
    other = read_run(run("other", {"a": reason("x: saw 2"), "b": reason("in 6 s")}))
    found = compare([one, other])
    assert [row.case for row in found.rows] == ["a"]
    assert (found.same, found.same_failures) == (1, 1)


def test_cases_that_are_not_wanted_are_not_counted(run):
    one, other = (read_run(run(n, {"a": c, "b": c})) for n, c in (("x", PASS), ("y", FAIL)))
    found = compare([one, other], lambda case: case == "b")
    assert [row.case for row in found.rows] == ["b"]
    assert (found.same, found.partial) == (0, 0)


def test_of_a_case_that_ran_twice_the_last_end_counts(run):
    directory = run("one", {"a": FAIL})
    with (directory / "results.jsonl").open("a") as file:
        again = {"event": "end", "case": "a", "verdict": "PASS", "reason": "", "known": ""}
        file.write(json.dumps({**again, "host": None}) + "\n")
    assert read_run(directory).cells == {"a": PASS}


def test_runs_are_called_by_their_kernels_or_else_by_their_directories(run):
    runs = [
        read_run(run(name, {"a": PASS}, kernel))
        for name, kernel in (("x", "5.10"), ("y", "6.1"), ("z", "6.1"))
    ]
    assert titles(runs) == ["5.10", "6.1 (y)", "6.1 (z)"]


def test_a_known_fail_has_a_star():
    assert [str(cell) for cell in (PASS, FAIL, KNOWN)] == ["PASS", "FAIL", "FAIL*"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "No such file"),
        ("", "no case has ended"),
        ("nonsense\n", "no JSON"),
        ("[]\n", "malformed"),
        ('{"event": "end"}\n', "malformed (KeyError"),
        ('{"event": "end", "case": "a", "verdict": "GOOD", "reason": "", "known": ""}\n', "GOOD"),
    ],
)
def test_a_directory_without_results_is_one_line(tmp_path, text, says):
    if text is not None:
        (tmp_path / "results.jsonl").write_text(text)
    with pytest.raises(ResultsError) as raised:
        read_run(tmp_path)
    assert says in str(raised.value)
    assert str(tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)
