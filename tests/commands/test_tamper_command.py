"""`nsvm tamper` on each test kernel: a sample of the cells, and what another model makes of it."""

import pytest
from nsvm_process import load_json, nsvm

from harness.model.knobs import SETTINGS

SAMPLE = "svm guest flag[L2: "


@pytest.mark.emulated
def test_a_sample_is_as_the_model_says(kernel, tmp_path):
    if kernel not in SETTINGS:
        pytest.skip(f"{kernel}: not a kernel that there is a setting for")
    file = tmp_path / "tamper.json"
    done = nsvm("tamper", "--kernel", kernel, "-k", SAMPLE, "--json", file)
    assert done.returncode == 0, done.stdout + done.stderr
    [plain] = load_json(file)["kernels"]
    assert plain["verdict"] == "PASS"
    assert len(plain["rows"]) == 15
    outcomes = {row["name"]: row["outcome"] for row in plain["rows"]}
    assert outcomes["svm guest flag[L2: flag 1]"] == "L2"
    assert outcomes["svm guest flag[L2: flag 0]"] == "L1"


@pytest.mark.emulated
def test_another_model_differs(tmp_path):
    cell = "dr6 dr7[L1: dr6 bit 32]"
    file = tmp_path / "tamper.json"
    words = ("--knobs", "rsm_checks=lenient")
    done = nsvm("tamper", "--kernel", "6.1", "-k", cell, *words, "--json", file)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"DIFFERS    {cell}" in done.stdout
    [row] = load_json(file)["kernels"][0]["rows"]
    assert row["outcome"] == "shutdown"
    assert row["predicted"] == "L1"


def test_no_such_cell_is_one_line():
    done = nsvm("tamper", "-k", "no such cell")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("nsvm: no cell's name has 'no such cell'")


def test_one_kernel_or_several():
    done = nsvm("tamper", "--kernel", "6.1", "--kernels", "5.10,6.1")
    assert done.returncode == 2
    assert "--kernel or --kernels, not both" in done.stderr
