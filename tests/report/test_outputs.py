"""What is written for other programs: KTAP, KCIDB's JSON, JUnit, a text for a mailing list."""

import json
from xml.etree import ElementTree

import pytest
from kcidb_io.schema import LATEST
from nights import HOSTILE, begin, end, on, write_run

from harness.errors import HostError
from harness.report import ktap
from harness.report.history import lines_of
from harness.report.junit import add_error
from harness.report.kcidb import KcidbError, path_of, to_kcidb
from harness.report.reproduce import command
from harness.report.run_record import CaseRecord, read_record
from harness.report.store import Store
from harness.report.text import level_of_testing
from harness.report.verdict import Verdict

EVENTS = [
    begin("a[npt=True,level=3]", 3),
    end("a[npt=True,level=3]"),
    end("b", "FAIL", "x: expected 1, saw 2", traceback="t" * 20_000),
    end("c", "FAIL", "y", known="some-issue"),
    end("d", known="quirk-other"),
    end("e", "SKIP", "no vgif"),
    end("f", "ERROR", "lab", host=None),
    end("f", "MISS", "never", host=None, repeat=2),
    end(HOSTILE, "FAIL", "nul \0 in it"),
]


@pytest.fixture
def record(tmp_path):
    return read_record(write_run(tmp_path / "run", EVENTS))


# KCIDB


def test_kcidb_takes_it(record):
    document = json.loads(json.dumps(to_kcidb([record, record], "my_lab")))
    assert LATEST.is_compatible(document)
    LATEST.validate(document)
    LATEST.validate(json.loads(json.dumps(to_kcidb([], "my_lab"))))


def test_each_outcome_is_a_test_and_each_known_issue_an_incident(record):
    document = to_kcidb([record], "lab")
    assert [t["status"] for t in document["tests"]] == [
        "PASS", "FAIL", "FAIL", "PASS", "SKIP", "ERROR", "MISS", "FAIL"]  # fmt: skip
    assert len({t["id"] for t in document["tests"]}) == len(EVENTS) - 1
    assert {i["id"]: i["culprit"]["code"] for i in document["issues"]} == {
        "lab:some-issue": True,
        "lab:quirk-other": False,
    }
    assert [i["present"] for i in document["incidents"]] == [True, False]


@pytest.mark.parametrize("origin", ["", "My Lab", "a:b", "lab-1"])
def test_an_origin_that_kcidb_does_not_take_is_one_line(origin):
    with pytest.raises(KcidbError, match="letters, digits and _ only"):
        to_kcidb([], origin)


@pytest.mark.parametrize(
    ("case", "path"),
    [("a", "nsvm.a"), ("a[npt=True,level=3]", "nsvm.a.npt_True.level_3"), ("a[x=]", "nsvm.a.x_")],
)
def test_a_case_has_a_path(case, path):
    assert path_of(case) == path


# KTAP


@pytest.mark.parametrize(
    ("case", "lines"),
    [
        (CaseRecord("a", Verdict.PASS), ["ok 7 a"]),
        (CaseRecord("a", Verdict.FAIL, "x\ny"), ["# x", "# y", "not ok 7 a"]),
        (CaseRecord("a", Verdict.FAIL, "x", "id"), ["# x", "ok 7 a # XFAIL known issue id"]),
        (CaseRecord("a", Verdict.SKIP, "no vgif"), ["ok 7 a # SKIP no vgif"]),
        (CaseRecord("a", Verdict.ERROR, "x"), ["# x", "not ok 7 a # ERROR ERROR"]),
        (CaseRecord("a", Verdict.MISS, "x"), ["# x", "not ok 7 a # ERROR MISS"]),
        (CaseRecord("a # SKIP\n", Verdict.FAIL), ["not ok 7 a \\# SKIP\\x0a"]),
    ],
)
def test_ktap_lines(case, lines):
    assert list(ktap.result(7, case)) == lines


# JUnit

GREEN = '<testsuites><testsuite name="nsvm" errors="0" tests="1"><testcase name="a"/></testsuite></testsuites>'  # noqa: E501


def test_an_error_of_the_run_is_in_the_file(tmp_path):
    file = tmp_path / "junit.xml"
    file.write_text(GREEN)
    add_error(file, "nothing ran")
    suite = ElementTree.parse(file).find("testsuite")
    assert (suite.get("errors"), suite.get("tests")) == ("1", "2")
    assert suite.find("testcase/error").get("message") == "nothing ran"


def test_a_file_that_is_red_is_left_alone(tmp_path):
    file = tmp_path / "junit.xml"
    file.write_text(GREEN.replace('"a"/>', '"a"><failure/></testcase>'))
    before = file.read_text()
    add_error(file, "nothing ran")
    assert file.read_text() == before


@pytest.mark.parametrize("text", ["", "<x/>", "<testsuites>"])
def test_no_junit_file_is_one_line(tmp_path, text):
    (tmp_path / "junit.xml").write_text(text)
    with pytest.raises(HostError, match=r"junit\.xml: "):
        add_error(tmp_path / "junit.xml", "x")


# The text, and the command in it


def test_the_level_of_testing(tmp_path):
    with Store(None) as store:
        store.add_results(write_run(tmp_path / "0", [end("b"), end("fix", "FAIL", "z")], at=1))
        events = [*EVENTS, end("fix"), end("green", host=on("6.1.0-56-amd64"))]
        argv = ["--kernel", "6.1", "-j", "2", "-k", "a or b", "--results", "/home/me/x"]
        store.add_results(write_run(tmp_path / "1", events, at=2, argv=argv))
        text = level_of_testing(lines_of(store))
    for told in [
        "* 6.1.0-56-amd64 on lab1 (emulated) -- not green",
        "2 FAILED, 1 failed as known",
        "deepest guest: L3 1",
        "FAIL b\n      x: expected 1, saw 2",
        "fixed since the run before: 1\n    fix",
        "$ nsvm run --kernel 6.1 -k 'a or b'\n",
    ]:
        assert told in text
    assert text.isascii()
    assert "\0" not in text


def test_an_escape_sequence_in_a_reason_does_not_reach_the_terminal(tmp_path):
    with Store(None) as store:
        store.add_results(write_run(tmp_path / "0", [end("a", "FAIL", "\x1b]0;owned\x07 x")]))
        assert "\x1b" not in level_of_testing(lines_of(store))


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ([], "nsvm run --case 'a[x=1]'"),
        (
            ["run", "--kernel", "6.1", "-k", "all", "--results", "DIR"],
            "nsvm run --kernel 6.1 --case 'a[x=1]'",
        ),
        (
            ["run", "--kernel=6.1", "--shared", "-j", "2"],
            "nsvm run --kernel=6.1 --shared --case 'a[x=1]'",
        ),
        (
            ["run", "--host", "ssh:zen2", "--part", "1/2", "--param", "npt=0", "--lab", "lab.toml"],
            "nsvm run --host ssh:zen2 --param npt=0 --case 'a[x=1]'",
        ),
        (["harness/scenarios", "--nsvm-kernel", "6.1"], "nsvm run --kernel 6.1 --case 'a[x=1]'"),
        (["run", "my own.py", "--kernel"], "nsvm run 'my own.py' --kernel --case 'a[x=1]'"),
        (["run", "--kernel", "6.1; rm -rf x"], "nsvm run --kernel '6.1; rm -rf x' --case 'a[x=1]'"),
    ],
)
def test_the_command_that_repeats_a_case(argv, line):
    assert command(argv, "a[x=1]") == line
