"""`nsvm nest`: a tower that stands, one whose Linux panics, one that stops without a word."""

import json

import pytest
from nsvm_process import load_json, nsvm


@pytest.mark.emulated
@pytest.mark.parametrize("vcpus", [1, pytest.param(2, marks=pytest.mark.nightly)])
def test_linux_works_at_every_level_and_leaves_its_consoles(tmp_path, vcpus):
    file, consoles = tmp_path / "nest.json", tmp_path / "consoles"
    done = nsvm(
        *("nest", "--depth", 1, "--rounds", 1, "--kernel", "6.1", "--append", "loglevel=5"),
        *("--vcpus", vcpus, "--json", file, "--consoles", consoles),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = load_json(file)
    assert report["verdict"] == "PASS"
    [l1] = [level for level in report["levels"] if level["number"] == 1]
    assert set(l1["stages"]) >= {"entered", "ready", "done"}
    assert l1["report"]["cpus"] == vcpus
    assert len(l1["report"]["rounds"]) == 1
    assert len(l1["report"]["proxy"]) == 24
    before, *_, after = report["memory"]
    assert before["what"] == "entered"
    assert after["sec_pagetables"] > before["sec_pagetables"]
    # L1 has EFER.SVME set on every CPU, once its kvm_amd has a VM.
    assert (before["nested_bytes"], after["nested_bytes"]) == (0, 12288 * vcpus)
    assert "L1 ready" in done.stderr
    assert "PASS: 1 levels of Linux worked" in done.stdout
    names = {path.name for path in consoles.iterdir()}
    assert {"L0-console.log", "L1-console.log"} <= names
    assert "PCI: Fatal" in (consoles / "L1-console.log").read_text()


@pytest.mark.nightly
@pytest.mark.emulated
def test_linux_in_linux_stands_moves_and_smis(tmp_path):
    file = tmp_path / "nest.json"
    done = nsvm(
        *("nest", "--inner", "linux", "--slow-clock", 10, "--kernel", "6.1", "--patience", 3),
        *("--rounds", 1, "--moves", 1, "--smis", 20, "--json", file),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = load_json(file)
    assert report["verdict"] == "PASS"
    assert [move["number"] for move in report["moves"]] == [1]
    assert any(smi["left_guest"] for smi in report["smis"])
    # Each VM is in the books of the kernel that runs it, and is mapped by huge pages.
    last = {row["vm"]: row for row in report["memory"]}
    assert set(last) == {1, 2}
    assert last[2]["pages_2m"] > 20
    assert last[2]["nested_bytes"] == 12288


@pytest.mark.nightly
@pytest.mark.emulated
def test_a_panic_is_a_fail_that_names_its_level():
    done = nsvm("nest", "--kernel", "6.1", "--append", "rdinit=/none init=/none", "--json", "-")
    assert done.returncode == 1, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["verdict"] == "FAIL"
    assert report["why"].startswith("L1's kernel: ")
    assert "Kernel panic" in report["why"]
    assert report["lost"]["level"] == 1
    assert "Kernel panic" in report["lost"]["console"]


@pytest.mark.nightly
@pytest.mark.emulated
def test_a_level_that_stops_is_an_error_that_names_it():
    # Its agent talks where nobody listens.
    done = nsvm(
        *("nest", "--kernel", "6.1", "--append", "nsvm.channel=null", "--patience", 0.3),
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "verdict      ERROR: L1 is lost: no" in done.stdout
    assert "'ready'" in done.stdout or "no sign of life" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--depth", 4), "4 is not in the range 1<=x<=3"),
        (("--inner", "bsd"), "'bsd' is not one of 'proxy', 'linux'"),
        (("--vcpus", 0), "0 is not in the range 1<=x<=4"),
        (("--json", "/none/x.json"), "/none"),
        (("--kernel", "6.1", "--host", "local"), "it cannot go with local"),
    ],
)
def test_bad_input_is_one_line(arguments, said):
    done = nsvm("nest", *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
