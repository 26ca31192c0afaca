"""`nsvm mutants`: status, JSON and words, with what each kernel did given."""

from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from nsvm_process import load_json

from harness.commands import mutants
from harness.errors import HostError
from harness.host.kernel_image import KernelError
from harness.report.verdict import Outcome, Verdict
from harness.repro.mutants import KernelRun

FIRST, SECOND = (f"svme_cleared_leaves_gif[gif={gif}]" for gif in (False, True))
BUGS = ["--select", "restore-gif-lost", "--select", "nested-tsc-offset"]


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Return a function that runs two bugs on kernels that do as is said, by variant."""
    monkeypatch.setattr(mutants, "fetch_kernel", lambda spec: SimpleNamespace(series="6.1"))

    def start(*options, **fates):
        def kernel_run(spec, cases, steps, seed, directory):
            fate = fates[spec.partition(":")[2].replace("-", "_") or "without"]
            if isinstance(fate, Exception):
                raise fate
            return KernelRun(
                {case.id: Outcome(Verdict[fate], "GIF: saw 1") for case in cases}, None
            )

        monkeypatch.setattr(mutants, "_run", kernel_run)
        where = ["--results", str(tmp_path / "results"), "-k", "svme_cleared_leaves_gif"]
        return CliRunner().invoke(mutants.command, [*BUGS, *where, *options])

    return start


@pytest.mark.parametrize(
    ("gif", "tsc", "status"),
    [
        ("FAIL", "FAIL", 0),
        ("FAIL", "PASS", 1),
        ("FAIL", KernelError("svm.c: hunk 1 does not apply"), 2),
    ],
)
def test_the_status_says_whether_all_were_noticed(run, gif, tsc, status):
    done = run(without="PASS", restore_gif_lost=gif, nested_tsc_offset=tsc)
    assert done.exit_code == status, done.output
    assert ("NOT NOTICED  nested-tsc-offset" in done.output) is (status == 1)
    assert ("ERROR  nested-tsc-offset: svm.c: hunk 1" in done.output) is (status == 2)


def test_json_has_who_noticed_and_the_score(run, tmp_path):
    file = tmp_path / "mutants.json"
    run("--json", str(file), without="PASS", restore_gif_lost="FAIL", nested_tsc_offset="PASS")
    plain = load_json(file)
    assert plain["cases"] == [FIRST]
    assert [each["noticed"] for each in plain["mutants"]] == [True, False]
    assert plain["score"] == {"#VMEXIT": [0, 1], "nested state": [1, 1]}


def test_all_cases_are_all(run, tmp_path):
    file = tmp_path / "mutants.json"
    options = ["--all-cases", "--json", str(file)]
    run(*options, without="PASS", restore_gif_lost="FAIL", nested_tsc_offset="PASS")
    assert load_json(file)["cases"] == [FIRST, SECOND]


def test_a_kernel_without_the_bugs_that_cannot_be_had_is_the_end(run):
    done = run(without=HostError("no"), restore_gif_lost="FAIL", nested_tsc_offset="PASS")
    assert isinstance(done.exception, HostError)


def test_a_design_is_no_bug():
    done = CliRunner().invoke(mutants.command, ["--select", "eager"])
    assert done.exit_code == 2
    assert "--select eager: the bugs are exit-err-high-half" in done.output
