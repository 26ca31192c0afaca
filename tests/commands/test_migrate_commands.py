"""`nsvm save`, `load`, `migrate`: at L1 on any /dev/kvm, with L2 and L3 on the emulated host."""

import json

import pytest
from nsvm_process import nsvm

needs_kvm = pytest.mark.usefixtures("kvm")


@pytest.mark.kvm
@needs_kvm
def test_a_machine_is_saved_and_goes_on(tmp_path):
    file = tmp_path / "machine"
    saved = nsvm("save", file, "--place", "l1-npt", "--host", "local")
    assert saved.returncode == 0, saved.stderr
    assert "L1 at work" in saved.stdout
    loaded = nsvm("load", file, "--host", "local", "--json", tmp_path / "row.json")
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.splitlines()[-1] == "works"
    row = json.loads((tmp_path / "row.json").read_text())
    assert row["verdict"] == "works"
    assert len(row["seen"]) == 12


@pytest.mark.kvm
@needs_kvm
@pytest.mark.parametrize("damage", ["cut", "flip", "text"])
def test_a_damaged_file_is_one_line_and_status_2(tmp_path, damage):
    file = tmp_path / "machine"
    assert nsvm("save", file, "--place", "l1-npt", "--host", "local").returncode == 0
    data = bytearray(file.read_bytes())
    if damage == "cut":
        del data[-5:]
    elif damage == "flip":
        data[len(data) // 2] ^= 1
    else:
        data[:] = b"no stream at all\n"
    file.write_bytes(data)
    loaded = nsvm("load", file, "--host", "local")
    assert loaded.returncode == 2
    assert loaded.stderr.count("\n") == 1
    assert loaded.stderr.startswith(f"nsvm: {file}: ")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["migrate"], "one of --storm, --matrix and --from"),
        (["migrate", "--storm", "2", "--matrix", "6.1"], "one of --storm, --matrix and --from"),
        (["migrate", "--from", "6.1", "--matrix", "6.1"], "one of --storm, --matrix and --from"),
        (["migrate", "--from", "6.1"], "--from and --to go together"),
        (["migrate", "--from", "ssh:a", "--to", "ssh:a"], "each host once"),
        (["migrate", "--from", "ssh:a", "--to", "ssh:b", "--lab", "/nowhere/lab"], "/nowhere/lab"),
        (["migrate", "--from", "ssh:", "--to", "6.1"], "'ssh:' is not one of"),
        (["migrate", "--storm", "0"], "0"),
        (["migrate", "--matrix", "6.1", "--places", "moon"], "no place is called moon"),
        (["migrate", "--storm", "1", "--levels", "9"], "9"),
        (["save", "/nowhere/file"], "/nowhere"),
        (["load", "/nowhere/file"], "/nowhere/file"),
        (["save", "x", "--place", "moon"], "moon"),
    ],
)
def test_what_is_wrong_with_the_command_is_said(arguments, says):
    done = nsvm(*arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.kvm
@needs_kvm
def test_a_storm_at_l1(tmp_path):
    file = tmp_path / "storm.json"
    done = nsvm("migrate", "--storm", "3", "--levels", "1", "--host", "local", "--json", file)
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    assert (report["moves"], report["divergences"], report["verdict"]) == (3, 0, "PASS")
    assert "verdict      PASS" in done.stdout


@pytest.mark.emulated
@pytest.mark.parametrize("tracking", ["log", "ring"])
def test_a_storm_with_l3_at_work(kernel, tmp_path, tracking):
    if tracking == "ring" and kernel.startswith("5.10"):
        pytest.skip("Linux 5.10 has no dirty rings")
    file = tmp_path / "storm.json"
    levels = "3" if tracking == "log" else "2"
    done = nsvm(
        *("migrate", "--storm", "6", "--levels", levels, "--tracking", tracking),
        *("--host", "emulated", "--kernel", kernel, "--json", file),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(file.read_text())
    assert (report["moves"], report["divergences"]) == (6, 0)


@pytest.mark.emulated
def test_machines_go_from_kernel_to_kernel(tmp_path):
    file = tmp_path / "matrix.json"
    done = nsvm(
        *("migrate", "--matrix", "5.10,7.3", "--places", "l2-npt,l3-shadow,smm-from-l1", "--live"),
        *("--json", file),
    )
    report = json.loads(file.read_text())
    rows = {(row["place"], row["from"], row["to"], row["way"]): row for row in report["rows"]}
    assert len(rows) == 3 * 4 + 3 * 2
    assert [row for row in rows.values() if row["verdict"] != "works"] == []
    assert done.returncode == 0


@pytest.mark.emulated
def test_what_differs_for_a_known_issue_is_named_and_not_red(tmp_path):
    """5.10 keeps L1's state where no migration finds it while SMM was entered from L2."""
    file = tmp_path / "matrix.json"
    done = nsvm("migrate", "--matrix", "5.10", "--places", "smm-from-l2", "--json", file)
    [row] = json.loads(file.read_text())["rows"]
    assert (row["verdict"], row["issue"]) == ("differs", "l1-state-in-smm-does-not-travel")
    assert "FailEntryExit" in row["why"]
    assert done.returncode == 0, done.stdout + done.stderr
    assert "by file: differs (known: l1-state-in-smm-does-not-travel): " in done.stdout
    assert "* l1-state-in-smm-does-not-travel: Moved in SMM " in done.stdout
    assert done.stdout.splitlines()[-1].startswith("1 differs, 1 of them known in ")
