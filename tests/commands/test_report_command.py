"""`nsvm report` and `nsvm bisect`, as processes of their own."""

import json
import time

import pytest
from nsvm_process import Nsvm, nsvm, wait_until

from harness.commands.bisect import between
from harness.host.archive import Package
from harness.host.debian_kernels import KernelOffer
from harness.report.results import ResultsFile, read_results
from harness.runner.bisection import BisectError


@pytest.fixture
def results(tmp_path):
    """Return a function that writes a run's results, of verdicts by case."""

    def write(name, *, finished=True, **verdicts):
        with ResultsFile(tmp_path / name / "results.jsonl") as file:
            file.write("run", argv=["run"], machine={"name": name})
            for case, verdict in verdicts.items():
                file.write(
                    "end", case=case, verdict=verdict, reason="seen", known="", claim="",
                    seconds=0, host={"kind": "local", "kernel_release": "6.1.0"}, evidence={},
                )  # fmt: skip
            if finished:
                file.write("summary", counts={}, seconds=1)
        return tmp_path / name

    return write


def test_directories_become_a_page_a_text_and_kcidbs_json(results, tmp_path):
    page, kcidb = tmp_path / "report.html", tmp_path / "kcidb.json"
    done = nsvm("report", results("one", a="PASS"), results("two", a="FAIL"), "-o", page,
                "--text", "--kcidb", kcidb, "--origin", "lab")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "1 of 2 red" in page.read_text()
    assert "* 6.1.0 on two -- not green" in done.stdout
    assert {t["status"] for t in json.loads(kcidb.read_text())["tests"]} == {"PASS", "FAIL"}


def test_a_page_has_the_score_of_bugs_put_back(results, tmp_path):
    page, score = tmp_path / "report.html", tmp_path / "mutants.json"
    bug = {"variant": "gif-bug", "area": "SMM", "scenarios": {"smi": "GIF"}, "crosscheck": "",
           "window": "", "peers": None}  # fmt: skip
    score.write_text(json.dumps({"kernel": "6.1", "mutants": [bug]}))
    done = nsvm("report", results("one", a="PASS"), "-o", page, "--mutants", score)
    assert done.returncode == 0, done.stderr
    assert "Bugs put back into 6.1" in page.read_text()
    done = nsvm("report", tmp_path / "one", "-o", page, "--mutants", tmp_path / "none.json")
    assert done.returncode == 2
    assert done.stderr.strip() == f"nsvm: {tmp_path / 'none.json'}: No such file or directory"


def test_hosts_are_imported_into_one_store(results, tmp_path):
    store = tmp_path / "all.sqlite"
    for name in ("one", "two", "one"):
        assert nsvm("report", "--store", store, results(name, a="PASS")).returncode == 0
    done = nsvm("report", "--store", store, "--text")
    assert "on one" in done.stdout
    assert "on two" in done.stdout


@pytest.mark.parametrize(
    ("runs", "status", "says"),
    [
        ({"a": {"case": "PASS"}}, 0, ""),
        ({"a": {"case": "PASS"}, "b": {"case": "FAIL"}}, 1, "nsvm: b, 6.1: 1 FAIL"),
        ({"a": {"case": "SKIP"}}, 1, "all was skipped"),
        ({"a": {}}, 1, "nothing ran"),
        ({"a": {"case": "PASS", "finished": False}}, 1, "the run has no end"),
    ],
)
def test_a_check_is_as_red_as_the_lines(results, tmp_path, runs, status, says):
    directories = [results(name, **verdicts) for name, verdicts in runs.items()]
    done = nsvm("report", *directories, "--check")
    assert done.returncode == status, done.stderr
    assert says in done.stderr


def test_a_host_that_was_silent_is_red(results, tmp_path):
    directory = results("one", a="PASS")
    file = directory / "results.jsonl"
    events = [{**event, "time": time.time() - 40 * 3600} for event in read_results(file)]
    file.write_text("".join(json.dumps(event) + "\n" for event in events))
    store = tmp_path / "s.sqlite"
    done = nsvm("report", "--store", store, directory, "--check")
    assert done.returncode == 1
    assert "no run for 40 hours" in done.stderr
    assert nsvm("report", "--store", store, "--check", "--max-age", "48").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["report"], "nothing to make"),
        (["report", "--store", "/nowhere/s.sqlite", "--text"], "no such file"),
        (["report", "/nowhere", "--text"], "/nowhere/results.jsonl: No such file"),
        (["report", "/dev/null", "--text"], "/dev/null"),
        (["report", "--store", "/dev/null", "--text"], "/dev/null"),
        (["report", "/nowhere", "-o", "/nowhere/page.html"], "no directory /nowhere"),
        (["bisect", "--good", "6.1"], "--bad"),
        (["bisect", "--good", "6.1", "--bad", "7.3"], "-k EXPR or --case ID"),
        (["bisect", "--good", "6.1", "--bad", "7.3", "-k", "("], "'-k': '(': at column 2"),
        (["run", "--repeat", "0"], "0"),
        (["run", "-k", "("], "'-k': '(': at column 2"),
    ],
)
def test_what_is_wrong_with_the_command_is_said(arguments, says):
    done = nsvm(*arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("style", [["--exit-style", "bisect"], ["--exit-style=bisect"]])
def test_a_wrong_command_line_ends_a_bisection_of_git(style):
    done = nsvm("run", *style, "--no-such-option")
    assert done.returncode == 129
    assert "No such option" in done.stderr


@pytest.mark.parametrize("wrong", [["-k", "("], ["--until-fail"], ["--modules", "tree"]])
def test_so_do_options_that_cannot_be_or_do_not_fit_together(wrong):
    assert nsvm("run", *wrong).returncode == 2
    done = nsvm("run", "--exit-style", "bisect", *wrong)
    assert done.returncode == 129
    assert "Traceback" not in done.stderr


# The kernels in between


def offers(*releases):
    package = Package("linux-image", "1", "suite", 1)
    return [KernelOffer(release, release, (package,)) for release in releases]


OFFERS = offers("5.10.1", "6.1.1", "6.1.2", "6.12.1", "7.3.4")


@pytest.mark.parametrize(
    ("good", "bad", "expected"),
    [
        ("6.1", "7.3", ["6.1.2", "6.12.1", "7.3.4"]),
        ("6.1.1", "6.12", ["6.1.1", "6.1.2", "6.12.1"]),
        ("6.12", "5.10", ["6.12.1", "6.1.2", "6.1.1", "5.10.1"]),
    ],
)
def test_the_kernels_between_in_the_order_of_testing(good, bad, expected):
    assert [offer.release for offer in between(good, bad, OFFERS)] == expected


@pytest.mark.parametrize(
    ("good", "bad", "says"),
    [("6.1", "6.1.2", "the same kernel, 6.1.2"), ("9", "6.1", "no kernel 9"), ("", "6.1", "no")],
)
def test_kernels_that_there_are_not(good, bad, says):
    with pytest.raises(BisectError, match=says):
        between(good, bad, OFFERS)


@pytest.mark.nightly
@pytest.mark.emulated
def test_a_bisection_finds_the_kernel_that_mended_a_case(tmp_path):
    case = "svme_cleared_leaves_gif[gif=False]"
    done = nsvm("bisect", "--good", "7.3", "--bad", "6.1", "--cached", "--case", case,
                "--results", tmp_path / "bisect")  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "last good:  7.3" in done.stdout
    assert (tmp_path / "bisect" / "nsvm.sqlite").exists()
    wrong = nsvm("bisect", "--good", "6.1", "--bad", "7.3", "--cached", "--case", case,
                 "--results", tmp_path / "wrong")  # fmt: skip
    assert wrong.returncode == 1
    assert "is to be good, and is: bad" in wrong.stderr


@pytest.mark.emulated
def test_a_run_that_is_killed_is_red_and_what_it_recorded_is_in_the_report(tmp_path):
    results = tmp_path / "run" / "results.jsonl"
    with Nsvm("run", "-j", "1", "-k", "each_vcpu_pays", "--kernel", "6.1", "--shared",
              results=results.parent) as run:  # fmt: skip
        wait_until(
            lambda: results.exists() and any(e["event"] == "end" for e in read_results(results)),
            "the first end",
        )
        run.process.kill()
        run.process.wait(60)
    done = nsvm("report", "--store", tmp_path / "nsvm.sqlite", "--text", "--check")
    assert done.returncode == 1
    assert "the run has no end; " in done.stdout
    assert " passed, " in done.stdout
    assert " never ran" in done.stdout
    assert "MISS each_vcpu_pays_for_itself[" in done.stdout
