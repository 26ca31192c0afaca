"""`nsvm run` through pytest, on hosts whose fates are written down: verdicts, files, statuses."""

import os

import pytest
from fake_pool import FakePool, scenario_source

from harness.errors import HostUnavailable
from harness.report.results import read_results

ALL = {"one": "pass", "two": "fail", "three": "skip", "four": "error", "five": "interrupt"}
VERDICTS = {"one": "PASS", "two": "FAIL", "three": "SKIP", "four": "ERROR", "five": "MISS"}


@pytest.fixture
def ran_all(run):
    """Each of the five words once."""
    return run(**ALL)


def test_each_of_the_five_verdicts_is_recorded(ran_all):
    assert ran_all.verdicts == VERDICTS
    assert ran_all.events[-1]["event"] == "summary"
    counts = ran_all.events[-1]["counts"]
    assert [counts[word] for word in VERDICTS.values()] == [1] * 5


def test_each_of_them_is_printed(ran_all):
    for case in ("one", "two", "three", "four"):
        [line] = [x for x in ran_all.output.splitlines() if f"::{case} " in x and "py::" in x][:1]
        assert VERDICTS[case] in line.split()
    summary = ran_all.output.splitlines()
    assert "FAIL  two: x: expected 1, saw 2" in summary
    assert "ERROR  four: no tracefs" in summary
    assert any(line.startswith("MISS  five: the run ended early") for line in summary)
    assert summary[-1].startswith("1 PASS, 1 FAIL, 1 SKIP, 1 ERROR, 1 MISS in ")


def test_junit_has_them_in_its_own_words(ran_all):
    children = {
        case: [child.tag for child in ran_all.testcase(case)]
        for case in ("one", "two", "three", "four")
    }
    assert children == {"one": [], "two": ["failure"], "three": ["skipped"], "four": ["error"]}
    [failure] = ran_all.testcase("two")
    for text in ("Claim of two", "x: expected 1, saw 2", "Traceback"):
        assert text in failure.text
    [suite] = ran_all.junit.iter("testsuite")
    assert suite.get("name") == "nsvm"


def test_what_is_shown_has_no_frames_of_ours(ran_all):
    assert "plugin.py" not in ran_all.output
    assert "claim: Claim of two." in ran_all.output
    assert "FAIL: x: expected 1, saw 2" in ran_all.output


def test_events_are_recorded_with_their_case_between_begin_and_end(run):
    ran = run(one="pass")
    own = [event for event in ran.events if event.get("case") == "one"]
    assert [event["event"] for event in own] == ["begin", "emit", "output", "kmsg", "end"]
    assert own[0]["claim"] == own[-1]["claim"] == "Claim of one."
    assert own[1]["data"] == {"what": "noted"}
    assert own[-1]["host"] == {"kind": "emulated", "kernel_release": "6.1.0-fake"}
    assert own[-1]["seconds"] == 0.5


@pytest.mark.parametrize(
    ("fates", "status"),
    [
        ({"one": "pass"}, 0),
        ({"one": "pass", "two": "skip"}, 0),
        ({"one": "pass", "two": "fail"}, 1),
        ({"one": "fail", "two": "error"}, 1),
        ({"one": "pass", "two": "error"}, 2),
        ({"one": "pass", "two": "interrupt", "three": "pass"}, 2),
        ({"one": "skip"}, 4),
        ({}, 4),
    ],
)
def test_the_exit_status_is_that_of_the_worst(run, fates, status):
    assert run(**fates).status == status


def test_an_expression_that_matches_nothing_is_nothing_ran(run):
    ran = run("-k", "no_such_case", one="fail")
    assert (ran.status, ran.verdicts) == (4, {})
    assert "nothing ran" in ran.output


def test_an_expression_chooses(run):
    ran = run("-k", "one or three", one="pass", two="fail", three="pass")
    assert (ran.status, list(ran.verdicts)) == (0, ["one", "three"])


def test_a_splat_fails_the_case_it_came_in(run):
    ran = run(one="pass", two="splat", three="pass")
    assert ran.verdicts == {"one": "PASS", "two": "FAIL", "three": "PASS"}
    assert ran.ends["two"]["reason"] == "kernel: WARNING: CPU: 0 PID: 1"


@pytest.mark.parametrize("fate", ["lost", "fail", "splat", "timeout"])
def test_after_a_fail_the_machine_is_not_used_again(run, fate):
    ran = run(one=fate, two="pass")
    assert ran.verdicts == {"one": "FAIL", "two": "PASS"}
    assert ran.pool.dropped == [{}]


class GoneAfterOne(FakePool):
    """Its host is lost after the first case, and never comes back."""

    def session(self, params):
        if self.calls:
            raise HostUnavailable("zen2: no connection to root@zen2: no answer")
        return super().session(params)


def test_a_host_that_cannot_be_had_any_more_ends_the_run(run):
    ran = run(pool=GoneAfterOne, one="pass", two="pass", three="pass")
    assert ran.verdicts == {"one": "PASS", "two": "MISS", "three": "MISS"}
    assert [case for case, _, _ in ran.pool.calls] == ["one"]
    why = "zen2: no connection to root@zen2: no answer"
    assert ran.ends["three"]["reason"] == why
    assert ran.events[-1]["complaints"] == [why]
    assert f"ERROR  {why}" in ran.output.splitlines()
    assert ran.status == 2


def test_a_host_that_dies_fails_the_case_and_no_other(run):
    ran = run(one="pass", two="lost", three="pass")
    assert ran.verdicts == {"one": "PASS", "two": "FAIL", "three": "PASS"}
    assert ran.ends["two"]["evidence"] == {"console": "Kernel panic"}
    assert "Kernel panic" in ran.output


def test_a_silent_hang_of_the_emulation_is_tried_once_more(run):
    ran = run(one="hang once", two="pass")
    assert ran.verdicts == {"one": "PASS", "two": "PASS"}
    assert [event["case"] for event in ran.events if event["event"] == "retry"] == ["one"]
    assert len([c for c in ran.pool.calls if c[0] == "one"]) == 2


def test_a_hang_that_stays_is_no_pass_and_not_tried_for_ever(run):
    ran = run(one="hang", two="pass")
    assert ran.verdicts["one"] in ("FAIL", "ERROR")
    assert ran.verdicts["two"] == "PASS"
    assert len([c for c in ran.pool.calls if c[0] == "one"]) == 2


def test_without_a_host_every_case_is_an_error(run):
    ran = run(pool_options={"refuse": "no such kernel"}, one="pass", two="pass")
    assert ran.verdicts == {"one": "ERROR", "two": "ERROR"}
    assert ran.ends["one"]["reason"] == "host: no such kernel"
    assert ran.status == 2
    assert ran.pool.calls == []


def test_an_interrupted_run_records_what_never_ran_and_ends_its_hosts(run):
    ran = run(one="pass", two="interrupt", three="pass", four="pass")
    assert ran.verdicts == {"one": "PASS", "two": "MISS", "three": "MISS", "four": "MISS"}
    assert ran.ends["three"]["reason"] == "the run ended early (interrupted)"
    assert ran.pool.closed
    # It had begun, and said something.
    assert [e["event"] for e in ran.events if e.get("case") == "two"][:2] == ["begin", "emit"]


def test_axes_are_cases_of_their_own(run):
    source = (
        '@scenario(axes={"n": (1, 2), "path": ("a",)})\ndef test_it(context, n, path):\n'
        "    'A claim.'\n    fate('pass')\n"
    )
    ran = run(sources=[source])
    assert list(ran.verdicts) == ["it[n=1,path=a]", "it[n=2,path=a]"]
    assert [values for _, values, _ in ran.pool.calls] == [
        {"n": 1, "path": "a"},
        {"n": 2, "path": "a"},
    ]
    assert ran.testcase("it[n=2,path=a]") is not None


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [("emulated", [], 15), ("local", [], 5), ("emulated", ["--timeout", "2"], 2)],
)
def test_timeouts_are_longer_under_emulation_unless_given(run, kind, options, expected):
    ran = run(
        *options,
        pool_options={"kind": kind},
        sources=[scenario_source("one", "pass", timeout_s=5)],
    )
    assert [timeout_s for _, _, timeout_s in ran.pool.calls] == [expected]


SPEEDS = [scenario_source("a", "pass", quick=True), scenario_source("b", "pass", unsafe=True)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], ["a", "b"]),
        (["--quick"], ["a"]),
        (["--host", "local"], ["a"]),
        (["--host", "local", "--unsafe"], ["a", "b"]),
        (["--host", "local", "-k", "b"], ["b"]),
    ],
)
def test_what_may_take_a_host_down_runs_where_that_is_allowed(run, options, expected):
    assert list(run(*options, sources=SPEEDS).verdicts) == expected


@pytest.mark.parametrize(("options", "fresh"), [([], True), (["--shared"], False)])
def test_one_machine_for_all_is_asked_for(run, options, fresh):
    assert run(*options, one="pass").pool.fresh is fresh


def test_the_users_own_pytest_settings_do_not_matter(run, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTEST_ADDOPTS", "--no-such-option")
    monkeypatch.setenv("PYTEST_PLUGINS", "no_such_plugin")
    monkeypatch.delenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", raising=False)
    before = pytest_variables()
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --no-such-option\n")
    assert run(one="pass").status == 0
    assert pytest_variables() == before


def pytest_variables():
    return {k: v for k, v in os.environ.items() if k.startswith("PYTEST_") and "CURRENT" not in k}


def test_a_second_run_into_the_same_place_keeps_the_first(run, tmp_path):
    run(one="pass")
    ran = run(one="fail")
    assert ran.verdicts == {"one": "FAIL"}
    first = read_results(tmp_path / "results" / "results.1.jsonl")
    assert [event["verdict"] for event in first if event["event"] == "end"] == ["PASS"]


def test_a_run_says_of_what_it_is(run):
    ran = run(one="pass")
    first = ran.events[0]
    assert first["event"] == "run"
    assert first["version"]
    assert "revision" in first
    assert ran.events[-1]["hosts"] == [{"kind": "emulated", "kernel_release": "6.1.0-fake"}]
