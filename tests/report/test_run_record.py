"""What a run's events are read as, runs that were cut short above all."""

import json

import pytest
from nights import EMULATED, begin, end, note, write_run

from harness.report.run_record import STATUS_UNFINISHED, ResultsError, read_record, worst
from harness.report.verdict import Verdict


def words(record):
    return {(case.case, case.repeat): case.word for case in record.cases}


def test_a_run_is_read_with_what_it_ran_on(tmp_path):
    events = [begin("a", 3), end("a"), end("b", "FAIL", "x", known="id", log="text")]
    record = read_record(write_run(tmp_path / "run", events, at=5.0))
    a, b = record.cases
    assert (record.started, record.finished, record.host_name) == (5.0, True, "lab1 (emulated)")
    assert record.kernel == EMULATED["kernel_release"]
    assert (a.word, a.levels, b.word, b.evidence) == ("PASS", 3, "KNOWN", {"log": "text"})
    assert record.status == 0


@pytest.mark.parametrize(
    ("ends", "status"),
    [
        ([], 4),
        ([end("a", "SKIP")], 4),
        ([end("a"), end("b", "FAIL", known="id")], 0),
        ([end("a"), end("b", "FAIL")], 1),
        ([end("a"), end("b", "MISS", host=None)], 2),
    ],
)
def test_the_status_is_that_of_the_run(tmp_path, ends, status):
    assert read_record(write_run(tmp_path / "run", ends)).status == status


def test_what_was_begun_or_planned_in_a_run_without_an_end_is_missing(tmp_path):
    plan = {"event": "plan", "cases": [["a", 1], ["b", 1], ["c", 1]]}
    events = [plan, begin("a"), end("a"), begin("b")]
    record = read_record(write_run(tmp_path / "run", events, finished=False))
    assert words(record) == {("a", 1): "PASS", ("b", 1): "MISS", ("c", 1): "MISS"}
    assert record.status == STATUS_UNFINISHED
    assert [case.reason.split(",")[0] for case in record.cases] == ["", "begun", "planned"]


def test_what_an_early_end_of_repeats_left_out_is_not_missing(tmp_path):
    plan = {"event": "plan", "cases": [["a", 1], ["a", 2]]}
    record = read_record(write_run(tmp_path / "run", [plan, end("a", "FAIL")]))
    assert words(record) == {("a", 1): "FAIL"}


def test_repeats_are_kept_apart_and_the_worst_counts(tmp_path):
    events = [end("a"), end("a", "FAIL", "no", repeat=2), end("a", repeat=3), end("b")]
    record = read_record(write_run(tmp_path / "run", events))
    assert len(record.cases) == 4
    assert [(case.case, case.verdict) for case in worst(record.cases)] == [
        ("a", Verdict.FAIL),
        ("b", Verdict.PASS),
    ]


def test_figures_are_found(tmp_path):
    events = [
        note("a", "bytes per vCPU", on=12288.0),
        note("a", "other", on=1),
        note("b", "live migration", downtime_s=0.05),
        note("b", "live migration"),
        end("a"),
    ]
    record = read_record(write_run(tmp_path / "run", events))
    assert [(m.metric, m.value) for m in record.measured] == [
        ("memory per vCPU", 12288.0),
        ("migration downtime", 0.05),
    ]


def test_two_machines_in_the_same_moment_are_two_runs(tmp_path):
    one = read_record(write_run(tmp_path / "one", [], machine="one"))
    two = read_record(write_run(tmp_path / "two", [], machine="two"))
    assert one.id != two.id
    assert one.id == read_record(tmp_path / "one").id


def test_no_host_at_all_is_named_by_what_was_asked_for(tmp_path):
    record = read_record(write_run(tmp_path / "run", [end("a", "ERROR", host=None)]))
    assert (record.host_name, record.kernel) == ("lab1 (emulated)", "6.1")


def test_half_characters_can_be_written(tmp_path):
    record = read_record(write_run(tmp_path / "run", [end("a", "FAIL", "\udcff", log="\udcff")]))
    assert record.cases[0].reason == "\\udcff"
    record.cases[0].evidence["log"].encode()


def test_a_kernel_that_prints_in_a_loop_does_not_fill_the_report(tmp_path):
    record = read_record(write_run(tmp_path / "run", [end("a", "FAIL", log="x" * 1_000_000)]))
    assert len(record.cases[0].evidence["log"]) < 100_000
    assert "more characters" in record.cases[0].evidence["log"]


@pytest.mark.parametrize(
    "event", [[], {}, {"event": "end"}, {"event": "plan"}, {"event": "end", "case": "a",
              "verdict": "GOOD", "reason": ""}, {"event": "plan", "cases": [1]}],
)  # fmt: skip
def test_malformed_events_are_one_line(tmp_path, event):
    (tmp_path / "results.jsonl").write_text(json.dumps({"event": "run", "time": 1}) + "\n"
                                            + json.dumps(event) + "\n")  # fmt: skip
    with pytest.raises(ResultsError, match=r"results.jsonl: malformed [^\n]*$"):
        read_record(tmp_path)
