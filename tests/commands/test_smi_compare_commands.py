"""`nsvm compare` on files; `nsvm smi` at L1 on any /dev/kvm, and what is wrong with the command."""

import json

import pytest
from nsvm_process import nsvm

from harness.report.results import ResultsFile


@pytest.fixture
def runs(tmp_path):
    """Two runs of two cases, one of which differs."""
    directories = []
    for name, verdict, known in (("one", "PASS", ""), ("two", "FAIL", "svme-clear-sets-gif")):
        with ResultsFile(tmp_path / name / "results.jsonl") as file:
            for case, how in (("same", "PASS"), ("other[axis=1]", verdict)):
                file.write(
                    "end", case=case, verdict=how, reason="seen", known=known if how == "FAIL"
                    else "", host={"kernel_release": name},
                )  # fmt: skip
        directories.append(tmp_path / name)
    return directories


def test_what_differs_is_shown_with_its_known_issue(runs):
    done = nsvm("compare", *runs)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any("other[axis=1]" in line and "PASS" in line and "FAIL*" in line for line in lines)
    assert any(line.startswith("* svme-clear-sets-gif: ") for line in lines)
    assert lines[-1] == "1 cases differ, 1 are the same"


def test_an_expression_chooses_cases(runs):
    done = nsvm("compare", *runs, "-k", "same and not other")
    assert done.stdout.splitlines()[-1] == "0 cases differ, 1 are the same"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["compare"], "two directories"),
        (["compare", "/nowhere"], "two directories"),
        (["compare", "/nowhere", "/nowhere"], "/nowhere/results.jsonl: No such file"),
        (["compare", "/nowhere", "/nowhere", "-k", "a b"], "'a b': at column 3"),
        (["smi"], "--storm N"),
        (["smi", "--storm", "0"], "0"),
        (["smi", "--storm", "1", "--levels", "4"], "4"),
        (["smi", "--storm", "1", "--json", "/nowhere/file"], "/nowhere"),
    ],
)
def test_what_is_wrong_with_the_command_is_said(arguments, says):
    done = nsvm(*arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.emulated
def test_a_storm_of_smis_into_l2_goes_unnoticed(tmp_path):
    file = tmp_path / "storm.json"
    done = nsvm("smi", "--storm", "40", "--save-area", "--kernel", "6.1", "--json", file)
    report = json.loads(file.read_text())
    assert done.returncode == 0, report
    assert (report["smis"], report["divergences"], report["implausible_save_areas"]) == (40, 0, 0)
    assert set(report["hit"]) <= {"L1", "L2"}
    assert "L2" in report["hit"]
