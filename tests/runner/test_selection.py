"""Cases by id, repeated, until one fails; statuses for git bisect; KTAP; the results store."""

from datetime import date

import pytest
from click.testing import CliRunner
from fake_pool import FakePool, returned

from harness.commands.run import command
from harness.facts import Answer
from harness.report.store import Store
from harness.runner import lab as lab_module
from harness.runner import run as run_module
from harness.runner.known_issues import KnownIssue


class Turning(FakePool):
    """`turns` passes twice, and then fails."""

    def session(self, params):
        host, session = super().session(params)
        fates = session.fates()
        fates["turns"] = lambda n: returned("PASS") if n <= 2 else returned("FAIL", "x: saw 1")
        session.fates = lambda: fates
        return host, session


def ktap(ran):
    return ran.stdout.splitlines()


# Which cases, and how often


def test_cases_are_chosen_by_their_ids(run):
    ran = run("--case", "two", "--case", "one", one="pass", two="pass", twofold="pass")
    assert list(ran.verdicts) == ["one", "two"]


def test_parts_are_dealt_out_like_cards_and_nothing_is_lost(run):
    cases = dict.fromkeys("abcde", "pass")
    parts = [run("--part", f"{number}/3", **cases) for number in (1, 2, 3)]
    assert [list(part.verdicts) for part in parts] == [["a", "d"], ["b", "e"], ["c"]]
    plans = [event for part in parts for event in part.events if event["event"] == "plan"]
    assert [(plan["part"], plan["of"]) for plan in plans] == [("1/3", 5), ("2/3", 5), ("3/3", 5)]


def test_parts_are_of_what_was_chosen(run):
    ran = run("--part", "2/2", "-k", "not b", a="pass", b="pass", c="pass")
    assert list(ran.verdicts) == ["c"]


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "a/2", "1/0", ""])
def test_a_part_that_there_is_not_is_a_wrong_command_line(part):
    done = CliRunner().invoke(command, ["--part", part])
    assert done.exit_code == 2
    assert f"{part!r} is not I/N with I from 1 to N" in done.output


def test_a_case_that_there_is_not_is_an_error(run):
    ran = run("--case", "none", one="pass")
    assert ran.status == 2
    assert "no case none" in ran.output
    assert ran.verdicts == {}


def test_repeats_are_rounds_and_recorded_apart(run):
    ran = run("--repeat", "3", one="pass", two="fail")
    assert [call[0] for call in ran.pool.calls] == ["one", "two"] * 3
    ends = [(e["case"], e["repeat"], e["verdict"]) for e in ran.events if e["event"] == "end"]
    assert ends == [(c, n, v) for n in (1, 2, 3) for c, v in (("one", "PASS"), ("two", "FAIL"))]
    assert ran.testcase("two (3 of 3)").find("failure") is not None
    assert "3 PASS, 3 FAIL" in ran.output


def test_an_expression_is_of_cases_not_of_repeats(run):
    ran = run("--repeat", "2", "-k", "one", one="pass", two="pass")
    assert [call[0] for call in ran.pool.calls] == ["one", "one"]


def test_the_first_failure_ends_the_run_and_what_is_left_is_not_missing(run):
    ran = run("--repeat", "50", "--until-fail", one="turns", two="pass", pool=Turning)
    assert ran.status == 1
    verdicts = [(e["repeat"], e["verdict"]) for e in ran.events if e["event"] == "end"]
    assert (3, "FAIL") in verdicts
    assert {verdict for _, verdict in verdicts} == {"PASS", "FAIL"}
    assert ran.events[-1]["counts"]["MISS"] == 0


def test_without_a_failure_all_repeats_are_run(run):
    ran = run("--repeat", "5", "--until-fail", one="pass")
    assert ran.status == 0
    assert len(ran.pool.calls) == 5


def test_until_fail_without_repeat_is_wrong():
    done = CliRunner().invoke(command, ["--until-fail"])
    assert done.exit_code == 2
    assert "--until-fail goes with --repeat" in done.output


# git bisect


@pytest.mark.parametrize(
    ("fates", "status"),
    [
        ({"one": "pass"}, 0),
        ({"one": "pass", "two": "skip"}, 0),
        ({"one": "pass", "two": "fail"}, 1),
        ({"one": "splat"}, 1),
        ({"one": "fail", "two": "error"}, 1),
        ({"one": "skip"}, 125),
        ({"one": "pass", "two": "error"}, 125),
        ({"one": "hang"}, 125),
        ({"one": "interrupt"}, 130),
        ({}, 129),
    ],
)
def test_statuses_for_git(run, fates, status):
    assert run("--exit-style", "bisect", **fates).status == status


def test_no_host_is_no_verdict_for_git(run):
    ran = run("--exit-style", "bisect", one="pass", pool_options={"refuse": "no QEMU"})
    assert ran.status == 125


def test_a_requirement_that_does_not_hold_is_no_verdict_for_git(run, monkeypatch):
    monkeypatch.setattr(run_module, "ask", lambda *_: [Answer("npt", False, "no", "mend")])
    assert run("--exit-style", "bisect", "--require", "npt", one="fail").status == 125


def known_issue(monkeypatch, **more):
    issue = KnownIssue("id", ("one",), "b", "r", "e", **more)
    monkeypatch.setattr(run_module, "load_known_issues", lambda: [issue])


def test_a_known_issue_is_bad_for_git(run, monkeypatch):
    known_issue(monkeypatch)
    assert run("--exit-style", "bisect", one="fail").status == 1
    assert run(one="fail").status == 0


# KTAP


def test_ktap_is_all_that_is_on_standard_output(run, monkeypatch):
    known_issue(monkeypatch)
    ran = run("--ktap", one="fail", two="pass", three="skip", four="error", five="fail")
    assert ktap(ran) == [
        "KTAP version 1",
        "1..5",
        "# x: expected 1, saw 2",
        "ok 1 one # XFAIL known issue id",
        "ok 2 two",
        "ok 3 three # SKIP svm: no cpu flag svm",
        "# no tracefs",
        "not ok 4 four # ERROR ERROR",
        "# x: expected 1, saw 2",
        "not ok 5 five",
    ]
    assert "2 FAIL" in ran.output


def test_ktap_has_what_never_ran(run):
    lines = ktap(run("--ktap", one="pass", two="interrupt", three="pass"))
    assert "1..3" in lines
    assert "not ok 3 three # ERROR MISS" in lines


def test_ktap_says_that_the_first_failure_was_enough(run):
    lines = ktap(run("--ktap", "--repeat", "200", "--until-fail", one="turns", pool=Turning))
    # The worker may have been ahead; what it has done is told.
    assert "not ok 3 one (3 of 200)" in lines
    assert "not ok 200 one (200 of 200)" not in lines
    assert lines[-1] == "Bail out! the first failure ends the run"


# Nothing green that is not


@pytest.mark.parametrize("fates", [{}, {"one": "skip"}])
def test_junit_of_a_night_without_anything_is_red(run, fates):
    ran = run(**fates)
    assert ran.status == 4
    assert ran.testcase("the run").find("error").get("message") == "nothing ran, or all was skipped"


def test_junit_of_a_green_run_has_its_cases_only(run):
    assert [case.get("name") for case in run(one="pass").junit.iter("testcase")] == ["one"]


def test_an_issue_that_expired_excuses_nothing(run, monkeypatch):
    known_issue(monkeypatch, expires=date(2030, 1, 31))

    def on(day):
        class Today(date):
            @classmethod
            def today(cls):
                return day

        monkeypatch.setattr(lab_module, "date", Today)
        return run(one="fail")

    assert on(date(2030, 1, 31)).status == 0
    late = on(date(2030, 2, 1))
    assert late.status == 1
    assert late.ends["one"]["reason"].endswith("(known issue id expired on 2030-01-31)")


# The store


def test_every_run_is_in_the_store_beside_its_results(run, tmp_path):
    run(one="pass", two="fail")
    with Store(tmp_path / "nsvm.sqlite") as store:
        [record] = [store.load(run_id, evidence=True) for run_id in store.run_ids()]
    assert [(case.case, case.word) for case in record.cases] == [("one", "PASS"), ("two", "FAIL")]
    assert record.cases[1].evidence == {"traceback": "Traceback"}
    assert record.finished
    assert record.machine["name"]


def test_the_store_may_be_elsewhere(run, tmp_path, monkeypatch):
    monkeypatch.setenv("NSVM_STORE", str(tmp_path / "variable.sqlite"))
    run(one="pass")
    run("--store", str(tmp_path / "option.sqlite"), one="pass")
    for name in ("variable", "option"):
        with Store(tmp_path / f"{name}.sqlite") as store:
            assert len(store.run_ids()) == 1
    assert not (tmp_path / "nsvm.sqlite").exists()


def test_a_store_that_cannot_be_written_is_said_and_changes_no_verdict(run, tmp_path):
    (tmp_path / "nsvm.sqlite").mkdir()
    ran = run(one="pass")
    assert ran.status == 0
    assert "not in the results store: " in ran.output


def test_a_run_that_is_killed_is_in_the_store_without_an_end(run, tmp_path, monkeypatch):
    seen = []

    class Looking(FakePool):
        def session(self, params):
            with Store(tmp_path / "nsvm.sqlite") as store:
                store.refresh()
                seen.append([store.load(run_id) for run_id in store.run_ids()])
            return super().session(params)

    run(one="pass", two="pass", pool=Looking)
    [record] = seen[1]
    assert not record.finished
    assert [(c.case, c.word) for c in record.cases] == [("one", "PASS"), ("two", "MISS")]
