"""What is new, what got fixed, what is red: lines of runs."""

import pytest
from nights import begin, end, on, write_run

from harness.report.history import Kind, lines_of
from harness.report.store import Store

HOUR = 3600.0


@pytest.fixture
def lines(tmp_path):
    """Return the lines of runs, each given as its events; one after the other, an hour apart."""

    def make(*runs, **more):
        with Store(None) as store:
            for number, events in enumerate(runs):
                run = write_run(tmp_path / str(number), events, at=number * HOUR, **more)
                store.add_results(run)
            return lines_of(store)

    return make


def kinds(line):
    return {change.now.case: change.kind for change in line.changes}


def test_changes_are_told_by_their_kind(lines):
    before = [end("stays"), end("breaks"), end("mended", "FAIL", "x"), end("same", "FAIL", "x"),
              end("other", "FAIL", "x: saw 1"), end("lost"), end("known", "FAIL", "x", known="id"),
              end("unknown", "FAIL", "x", known="id"), end("unskipped", "SKIP")]  # fmt: skip
    now = [end("stays"), end("breaks", "FAIL", "x"), end("mended"), end("same", "FAIL", "x"),
           end("other", "FAIL", "x: saw 2"), end("lost", "SKIP"), end("known", known="id"),
           end("unknown", "FAIL", "x"), end("unskipped"), end("first", "ERROR", "x")]  # fmt: skip
    [line] = lines(before, now)
    assert kinds(line) == {
        "breaks": Kind.NEW,
        "mended": Kind.FIXED,
        "other": Kind.DIFFERENT,
        "lost": Kind.SKIPPED,
        "known": Kind.FIXED,
        "unknown": Kind.NEW,
        "first": Kind.NEW,
    }


def test_a_case_is_compared_with_the_last_time_it_ran(lines):
    [line] = lines([end("a"), end("b")], [end("b")], [end("a", "FAIL", "x"), end("b")])
    assert kinds(line) == {"a": Kind.NEW}


def test_the_first_run_has_nothing_new(lines):
    [line] = lines([end("a", "FAIL", "x")])
    assert line.changes == []
    assert line.why_red() == ["1 FAIL"]


def test_point_releases_are_one_line_and_series_are_not(lines):
    found = lines(*([end("a", host=on(release))] for release in ("6.1.1", "6.1.9", "6.12.1")))
    assert [(line.series, len(line.runs)) for line in found] == [("6.1", 2), ("6.12", 1)]
    assert found[0].latest.kernel == "6.1.9"


@pytest.mark.parametrize(
    ("events", "says"),
    [
        ([], "nothing ran"),
        ([end("a", "SKIP")], "all was skipped"),
        ([end("a", "FAIL")], "1 FAIL"),
        ([end("a"), end("b", "ERROR")], "1 ERROR"),
        ([end("a"), end("b", "MISS", host=None)], "1 MISS"),
    ],
)
def test_a_night_like_that_is_red(lines, events, says):
    [line] = lines(events)
    assert says in line.why_red()


def test_passes_and_known_issues_are_green(lines):
    [line] = lines([end("a"), end("b", "SKIP"), end("c", "FAIL", known="id")])
    assert line.why_red() == []


def test_a_host_that_died_is_red_and_what_it_recorded_is_there(lines):
    [line] = lines([end("a"), end("b"), begin("c")], finished=False)
    assert "the run has no end; 2 of 3 cases have" in line.why_red()
    assert line.now["a"].word == "PASS"
    assert line.now["c"].word == "MISS"


def test_a_host_that_is_not_heard_of_is_red(lines):
    [line] = lines([end("a")], [end("a")])
    assert line.why_red(10 * HOUR, now=11 * HOUR) == []
    assert line.why_red(10 * HOUR, now=11.5 * HOUR) == ["no run for 10 hours"]


@pytest.mark.parametrize(
    "argv",
    [
        ["-k", "a"],
        ["-ka"],
        ["--case=a"],
        ["--quick"],
        ["my/test_own.py"],
        ["harness/scenarios/test_a.py::a"],
        ["--repeat", "9", "--until-fail"],
        ["-m", "quick"],
        ["--deselect", "b"],
    ],
)
def test_a_run_of_one_case_does_not_make_a_red_line_green(tmp_path, argv):
    with Store(None) as store:
        store.add_results(write_run(tmp_path / "0", [end("a"), end("b", "FAIL", "x")], at=1))
        store.add_results(write_run(tmp_path / "1", [end("a")], at=2, argv=argv))
        [line] = lines_of(store)
        assert line.why_red() == ["of what did not run this time 1 ended in red before"]
        store.add_results(write_run(tmp_path / "2", [end("a")], at=3, argv=["-j2", "--shared"]))
        [line] = lines_of(store)
        assert line.why_red() == []


def test_attempts_on_another_kernel_do_not_make_a_case_flaky(lines):
    def run(verdict, release):
        return [end("a", verdict, host=on(release))]

    [same] = lines(*(run(verdict, "6.1.9") for verdict in ("PASS", "FAIL", "PASS")))
    assert str(same.flaky["a"]) == "1 of 3 (6% to 79%)"
    [other] = lines(run("PASS", "6.1.1"), run("FAIL", "6.1.8"), run("PASS", "6.1.9"))
    assert other.flaky == {}
