"""Cross-checks of real kernels: they agree with their models, and not with others."""

import json

import pytest
from nsvm_process import load_json, nsvm

from harness.crosscheck.record import read_bundle

pytestmark = pytest.mark.emulated

SEED = 23
"""One that is known not to meet what hangs the emulation itself."""


def crosscheck(kernel, tmp_path, *options):
    file = tmp_path / "report.json"
    run = nsvm("crosscheck", "--kernel", kernel, "--bundles", tmp_path, "--json", file, *options)
    return run, load_json(file)


def test_a_kernel_agrees_with_its_model(kernel, tmp_path):
    run, report = crosscheck(kernel, tmp_path, "--steps", "200", "--seed", str(SEED))
    assert report["findings"] == [], run.stdout
    assert report["errors"] == []
    assert report["steps"] >= 200
    assert len(report["transitions"]) > 40
    assert run.returncode == 0


def test_a_kernel_differs_from_the_model_of_another_one(one_kernel, tmp_path):
    """What is found is small, explained by the knob that is wrong, and shows again."""
    run, report = crosscheck(
        *(one_kernel, tmp_path, "--steps", "150", "--seed", str(SEED), "--focus", "efer"),
        *("--knobs", "gif_on_svme_clear=kept"),
    )
    assert run.returncode == 1, run.stdout
    finding = report["findings"][0]
    assert len(finding["operations"]) <= 6
    [turn] = finding["evidence"]["explained_by"]
    assert turn.startswith("gif_on_svme_clear=set")
    path = next(tmp_path.glob("crosscheck-*.json"))
    assert read_bundle(path).difference
    words = [f"--knobs={name}={key}" for name, key in finding["knobs"]["turned"].items()]
    again = nsvm("replay", path, "--kernel", one_kernel, *words)
    assert "differs as recorded" in again.stdout
    assert again.returncode == 1
    assert nsvm("replay", path, "--kernel", one_kernel).returncode == 0


def test_a_file_that_is_no_bundle_is_told_in_one_line(tmp_path):
    path = tmp_path / "b.json"
    path.write_text(json.dumps({"format": "other"}))
    run = nsvm("replay", path)
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1
    assert "no bundle of nsvm crosscheck" in run.stderr
