import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from harness.bench.ratios import Comparison, Pair
from harness.bench.suite import NAMES, Report
from harness.commands import bench
from harness.errors import HostError
from harness.runner.expression import ExpressionError


@pytest.fixture
def invoke(monkeypatch):
    """Run the command on a suite that only records what is wanted; return both."""

    def start(*arguments, errors=()):
        wanted = []

        def fake_run(what, log):
            wanted.append(what)
            row = Comparison("run_exit", "local", "C", pairs=[Pair(2.0, 1.0)])
            return Report(rows=[row], errors=list(errors))

        monkeypatch.setattr(bench, "run", fake_run)
        return CliRunner().invoke(bench.command, arguments), wanted

    return start


def test_by_default_all_of_it_runs_on_both_hosts(invoke):
    result, [wanted] = invoke()
    assert result.exit_code == 0
    assert wanted.hosts == ("local", "emulated")
    assert wanted.names == NAMES
    assert "run_exit" in result.output


def test_options_arrive(invoke):
    result, [wanted] = invoke(
        *["--host", "emulated", "--kernel", "6.12", "--repeat", "2"], "-k", "get_ and regs"
    )
    assert result.exit_code == 0
    assert (wanted.hosts, wanted.kernel, wanted.repeat) == (("emulated",), "6.12", 2)
    assert wanted.names == ("get_regs", "get_sregs")


def test_an_image_of_ones_own_comes_with_its_modules(invoke):
    result, [wanted] = invoke("--kernel", "/boot/bzImage", "--modules", "/lib/modules/6.99")
    assert result.exit_code == 0
    assert (wanted.kernel, wanted.modules) == ("/boot/bzImage", Path("/lib/modules/6.99"))


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--modules", "/lib/modules/6.99"], "--modules goes with --kernel PATH"),
        (["--host", "local", "--kernel", "6.12"], "it cannot go with local"),
    ],
)
def test_options_that_do_not_go_together_are_an_error_before_anything_runs(invoke, arguments, why):
    result, wanted = invoke(*arguments)
    assert result.exit_code != 0
    assert why in result.output + str(result.exception)
    assert wanted == []


def test_json_goes_to_a_file_or_alone_to_stdout(invoke, tmp_path):
    invoke("--json", str(tmp_path / "out.json"))
    data = json.loads((tmp_path / "out.json").read_text())
    assert data["benchmarks"][0]["share"] == 0.5
    result, _ = invoke("--json", "-")
    assert json.loads(result.stdout)["benchmarks"] == data["benchmarks"]


def test_what_could_not_be_measured_is_status_2_and_still_shown(invoke):
    result, _ = invoke(errors=["local host: /dev/kvm: Permission denied"])
    assert result.exit_code == 2
    assert "run_exit" in result.output
    assert "Permission denied" in result.output


def test_an_expression_that_chooses_nothing_is_an_error_before_anything_runs(invoke):
    result, wanted = invoke("-k", "nothing_like_it")
    assert isinstance(result.exception, ExpressionError)
    assert wanted == []


def test_a_report_that_could_not_be_written_is_an_error_before_anything_runs(invoke, tmp_path):
    result, wanted = invoke("--json", str(tmp_path / "missing" / "out.json"))
    assert isinstance(result.exception, HostError)
    assert "missing" in str(result.exception)
    assert wanted == []
