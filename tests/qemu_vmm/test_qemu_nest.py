"""The whole of it on an emulated host: `nsvm nest --vmm qemu`, well and ill."""

import json

import pytest
from nsvm_process import nsvm

pytestmark = [pytest.mark.emulated, pytest.mark.nightly]


def nest(tmp_path, kernel, *arguments):
    report = tmp_path / "report.json"
    done = nsvm(
        "nest", "--vmm", "qemu", "--kernel", kernel, "--patience", 2, "--json", report, *arguments
    )
    assert report.exists(), done.stderr
    return done.returncode, json.loads(report.read_text())


def test_l1_moves_from_qemu_to_qemu_while_l2_and_l3_work(tmp_path, kernel):
    status, report = nest(tmp_path, kernel, "--rounds", 1, "--steps", 6, "--moves", 1)
    assert (status, report["verdict"]) == (0, "PASS"), report["why"]
    [move] = report["moves"]
    assert move["over"] == "unix"
    assert move["bytes"] > 10 << 20


def test_a_panic_of_l1_fails_and_names_it(tmp_path, one_kernel):
    status, report = nest(tmp_path, one_kernel, "--append", "rdinit=/nothing", "--rounds", 1)
    assert (status, report["verdict"]) == (1, "FAIL"), report["why"]
    assert report["why"].startswith("L1's kernel: ")
    assert "Kernel panic" in report["why"]
    assert report["lost"]["level"] == 1
    assert "Kernel panic" in report["lost"]["console"]
