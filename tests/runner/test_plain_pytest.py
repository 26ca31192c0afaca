"""Plain `pytest harness/scenarios`: collects, runs and judges as `nsvm run` does."""

import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from harness.host.bundle import tree_root
from harness.report.results import read_results

HERE = Path(__file__).parent
DEADLINE_S = 120

ONE, TWO, THREE = (
    "allocated_state_is_the_state_in_use",
    "svme_set_twice_allocates_once[path=msrs]",
    "svme_set_twice_allocates_once[path=sregs]",
)
THREE_CASES = ["-k", "allocated_state_is_the_state or svme_set_twice"]


class Plain:
    """One pytest process: its status, words and files."""

    def __init__(self, directory, *arguments, where="harness/scenarios", **fates):
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
        environment |= {"PYTHONPATH": str(HERE), "FATES": json.dumps(fates)}
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "fake_plain", "-p", "no:cacheprovider",
             where, *arguments],
            cwd=tree_root(),
            env=environment,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
        )  # fmt: skip
        self.status, self.output, self.errors = done.returncode, done.stdout, done.stderr
        results = directory / "results.jsonl"
        self.events = read_results(results) if results.exists() else []
        self.verdicts = {e["case"]: e["verdict"] for e in self.events if e["event"] == "end"}
        self.directory = directory


@pytest.fixture
def plain(tmp_path):
    """Return a function that runs three of the harness's own cases with plain pytest."""

    def start(*arguments, fates=None, **options):
        where = ["--nsvm-host", "emulated", "--nsvm-results", str(tmp_path)]
        return Plain(tmp_path, *where, *THREE_CASES, *arguments, **options, **(fates or {}))

    return start


def test_it_runs_the_same_list_and_leaves_the_same_files(plain):
    ran = plain()
    assert ran.status == 0, ran.output + ran.errors
    assert ran.verdicts == dict.fromkeys([ONE, TWO, THREE], "PASS")
    assert [ran.events[0]["event"], ran.events[-1]["event"]] == ["run", "summary"]
    junit = ElementTree.parse(ran.directory / "junit.xml").getroot()
    assert len(list(junit.iter("testcase"))) == 3
    assert "3 PASS in " in ran.output
    assert "3 passed" in ran.output


@pytest.mark.parametrize(
    ("fates", "status"),
    [
        ({ONE: "FAIL"}, 1),
        ({ONE: "ERROR"}, 2),
        ({ONE: "SKIP"}, 0),
        (dict.fromkeys([ONE, TWO, THREE], "SKIP"), 4),
    ],
)
def test_the_exit_status_is_that_of_nsvm_run(plain, fates, status):
    ran = plain(fates=fates)
    assert ran.status == status, ran.output + ran.errors
    assert {case: ran.verdicts[case] for case in fates} == fates
    # Who reads JUnit only sees the same.
    junit = ElementTree.parse(ran.directory / "junit.xml").getroot()
    assert bool(list(junit.iter("failure")) + list(junit.iter("error"))) == bool(status)


def test_one_that_is_interrupted_records_what_never_ran(plain):
    ran = plain("--nsvm-jobs", "1", fates={TWO: "INTERRUPT"})
    assert ran.status == 2
    assert ran.verdicts == {TWO: "MISS", THREE: "MISS", ONE: "MISS"}
    assert ran.events[-1]["event"] == "summary"


def test_to_collect_starts_and_writes_nothing(plain):
    ran = plain("--collect-only", "-q")
    assert ran.status == 0
    assert f"harness/scenarios/test_allocation.py::{ONE}" in ran.output
    assert (ran.events, list(ran.directory.iterdir())) == ([], [])


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--nsvm-require", "nptt"], "--require nptt: no such fact"),
        (["--nsvm-jobs", "0"], "--nsvm-jobs 0: at least 1"),
        (["--nsvm-modules", "x"], "--nsvm-modules goes with --nsvm-kernel PATH"),
        (["--nsvm-host", "local", "--nsvm-kernel", "6.1"], "it cannot go with local"),
    ],
)
def test_bad_options_are_one_line(plain, arguments, complaint):
    ran = plain(*arguments)
    assert ran.status == pytest.ExitCode.USAGE_ERROR
    assert complaint in ran.errors
    assert "Traceback" not in ran.output + ran.errors
    assert ran.events == []


def test_other_tests_stay_what_they_are(tmp_path):
    """Beside the scenarios, and without them: no host, no results."""
    beside = tmp_path / "test_beside.py"
    # The runner would import it under its whole path.
    beside.write_text("def test_state_in_use_too():\n    assert __name__ == 'test_beside'\n")
    where = ["--nsvm-host", "emulated", "--nsvm-results", str(tmp_path / "both")]
    ran = Plain(tmp_path / "both", *where, str(beside), "-k", "state_in_use")
    assert ran.status == 0, ran.output + ran.errors
    assert ran.verdicts == {ONE: "PASS"}
    assert "2 passed" in ran.output
    alone = Plain(tmp_path / "alone", where="tests/model/test_allocation_model.py")
    assert alone.status == 0, alone.output + alone.errors
    assert "nsvm" not in alone.output.replace(str(tree_root()), "")
