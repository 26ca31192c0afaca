"""`nsvm mutants`: status, JSON and words, with what each kernel did given."""

from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from nsvm_process import load_json, nsvm

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
        def without(spec, work, directory, log):
            return kernel_run("without", work)

        def with_bug(kernel, work, before, directory, log):
            return kernel_run(kernel.bug.name.replace("-", "_"), work)

        def kernel_run(name, work):
            if isinstance(fates[name], Exception):
                raise fates[name]
            outcomes = {case.id: Outcome(Verdict[fates[name]], "GIF: saw 1") for case in work.cases}
            return KernelRun(outcomes, None)

        (tmp_path / "results").mkdir(exist_ok=True)
        monkeypatch.setattr(mutants, "run_without", without)
        monkeypatch.setattr(mutants, "run_with", with_bug)
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
    assert plain["selftests"] is None
    assert [each["noticed"] for each in plain["mutants"]] == [True, False]
    assert plain["score"]["ours"] == {"#VMEXIT": [0, 1], "nested state": [1, 1]}


def test_all_cases_are_all(run, tmp_path):
    file = tmp_path / "mutants.json"
    options = ["--all-cases", "--json", str(file)]
    run(*options, without="PASS", restore_gif_lost="FAIL", nested_tsc_offset="PASS")
    assert load_json(file)["cases"] == [FIRST, SECOND]


def test_what_the_kernel_does_without_a_bug_may_be_of_an_earlier_run(run, tmp_path):
    run(without="PASS", restore_gif_lost="FAIL", nested_tsc_offset="PASS")
    file = tmp_path / "results" / "without.json"
    again = ["--without", str(file), "--steps", "0"]
    done = run(*again, restore_gif_lost="FAIL", nested_tsc_offset="PASS")
    assert done.exit_code == 1, done.output


def test_an_earlier_run_must_have_had_the_cases(run, tmp_path):
    run(without="PASS", restore_gif_lost="FAIL", nested_tsc_offset="PASS")
    file = tmp_path / "results" / "without.json"
    done = run("--without", str(file), "--all-cases", "--steps", "0")
    assert f"{SECOND} did not run" in str(done.exception)


def test_a_kernel_without_the_bugs_that_cannot_be_had_is_the_end(run):
    done = run(without=HostError("no"), restore_gif_lost="FAIL", nested_tsc_offset="PASS")
    assert isinstance(done.exception, HostError)


def test_a_design_is_no_bug():
    done = CliRunner().invoke(mutants.command, ["--select", "eager"])
    assert done.exit_code == 2
    assert "--select eager: the bugs are exit-err-high-half" in done.output


@pytest.mark.nightly
@pytest.mark.emulated
def test_the_kernels_own_selftests_run_beside_ours(tmp_path):
    file = tmp_path / "mutants.json"
    done = nsvm(
        "mutants", "--select", "free-vcpu-in-guest-mode", "-k", "no_such_case", "--steps", "0",
        "--race", "0", "--selftests", "--json", file, "--results", tmp_path / "results",
    )  # fmt: skip
    # Of ours none was asked for, so none noticed it.
    assert done.returncode == 1, done.stdout + done.stderr
    plain = load_json(file)
    assert {"state_test", "svm_vmcall_test"} <= set(plain["selftests"])
    assert "svm_free_nested" in plain["mutants"][0]["peers"]["smm_test"]
