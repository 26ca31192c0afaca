"""Two emulated lab machines at once: a fleet, a panic in its midst, a migration between the two."""

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace

import pytest
from lab_machine import LabMachine
from near_lab import inventory_text, lab_text
from nsvm_process import nsvm, read_results

from harness.host.ssh_connection import connect
from harness.report.store import Store

pytestmark = pytest.mark.emulated

SCENARIOS = '''
import time
from pathlib import Path
from harness.facts import nested_svm
from harness.scenarios import scenario

@scenario()
def test_first(context):
    """It passes."""

@scenario(needs=[nested_svm], axes={"npt": (True, False)})
def test_l2_answers(context, npt):
    """L2 answers L1, with nested paging and with shadow paging."""
    from harness.proxy.machine import ProxyMachine
    machine = context.enter(ProxyMachine(context.kvm))
    context.expect("L2's answer", machine.l1.launch(npt=npt).ping(), True)

@scenario()
def test_panics_where_it_is_told_to(context):
    """It makes the kernel panic, on the machine that has the file."""
    context.note("noted before the panic")
    if Path("/run/panic").exists():
        time.sleep(5)  # for the note to be out of the machine
        Path("/proc/sysrq-trigger").write_text("c")
        time.sleep(600)

@scenario()
def test_zlast(context):
    """It passes, also on a machine that was booted again."""
'''


@pytest.fixture(scope="module")
def machines(one_kernel, tmp_path_factory):
    """Two of them."""
    here = tmp_path_factory.mktemp("lab")
    both = [LabMachine(one_kernel.kernel, here, name) for name in ("emulated1", "emulated2")]
    with ExitStack() as stack, ThreadPoolExecutor() as pool:
        for machine in pool.map(lambda machine: machine.__enter__(), both):
            stack.push(machine)
        yield both


class Fleet:
    def __init__(self, here, labs):
        self.results = here / "results"
        self.words = ["-i", here / "lab.json", "--results", self.results, "--json", here / "json"]
        (here / "lab.json").write_text(inventory_text(labs))
        (here / "scenarios.py").write_text(SCENARIOS)
        self.here = here

    def run(self, *options):
        done = nsvm("fleet", "run", *self.words, *options, self.here / "scenarios.py")
        self.said = done.stdout + done.stderr
        assert (self.here / "json").exists(), self.said
        self.json = json.loads((self.here / "json").read_text())
        return done.returncode

    def ends(self, host):
        events = read_results(self.results / host / "results.jsonl")
        return {e["case"]: e for e in events if e["event"] == "end"}

    def notes(self, host):
        events = read_results(self.results / host / "results.jsonl")
        return [e["data"]["what"] for e in events if e["event"] == "emit"]


def test_cases_are_dealt_out_over_two_machines(machines, tmp_path):
    fleet = Fleet(tmp_path, [machine.lab for machine in machines])
    assert fleet.run("--deal") == 0, fleet.said
    first, second = ({*fleet.ends(m.name)} for m in machines)
    assert first == {"first", "l2_answers[npt=False]", "zlast"}
    assert second == {"l2_answers[npt=True]", "panics_where_it_is_told_to"}
    host = fleet.ends("emulated2")["l2_answers[npt=True]"]["host"]
    assert (host["kind"], host["name"]) == ("ssh", "emulated2")
    assert fleet.json["counts"] == {"PASS": 5}
    with Store(fleet.results.parent / "nsvm.sqlite") as store:
        assert sorted(name for _, name, _ in store.heads()) == ["emulated1", "emulated2"]


@pytest.mark.nightly
def test_one_that_panics_is_red_and_the_other_one_is_not(machines, tmp_path):
    """What it had said before is there, and it goes on where it was booted again."""
    with connect(machines[1].lab, 30) as connection:
        connection.run("touch", "/run/panic")
    fleet = Fleet(tmp_path, [machine.lab for machine in machines])
    assert fleet.run("--repeat-on-each") == 1, fleet.said
    assert {end["verdict"] for end in fleet.ends("emulated1").values()} == {"PASS"}
    ends = fleet.ends("emulated2")
    assert {case for case, end in ends.items() if end["verdict"] != "PASS"} == {
        "panics_where_it_is_told_to"
    }
    why = ends["panics_where_it_is_told_to"]["reason"]
    assert "the host went down and was booted again" in why
    assert "noted before the panic" in fleet.notes("emulated2")
    assert fleet.json["hosts"]["emulated1"]["status"] == 0
    assert fleet.json["hosts"]["emulated2"]["status"] == 1


def test_a_machine_with_l2_at_work_moves_live_from_one_to_the_other(machines, one_kernel, tmp_path):
    """It goes on there as its twin did, which stayed; from SMM in 5.10 it does not, as is known."""
    (tmp_path / "lab.toml").write_text("\n".join(lab_text(m.lab) for m in machines))
    one, other = (f"ssh:{machine.name}" for machine in machines)
    done = nsvm(
        "migrate", "--from", one, "--to", other, "--places", "l2-npt,l2-shadow,smm-from-l2",
        "--lab", tmp_path / "lab.toml", "--json", tmp_path / "json",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "json").read_text())
    known = "l1-state-in-smm-does-not-travel" if one_kernel.startswith("5.10") else None
    rows = report["rows"]
    assert [(row["place"], row["way"], row["verdict"], row.get("issue")) for row in rows] == [
        ("l2-npt", "live", "works", None),
        ("l2-shadow", "live", "works", None),
        ("smm-from-l2", "live", "differs" if known else "works", known),
    ]
    assert {(row["from"], row["to"]) for row in report["rows"]} == {(one, other)}
    assert {host["name"] for host in report["hosts"]} == {machine.name for machine in machines}
    assert all(row["downtime_s"] > 0 for row in report["rows"])


@pytest.mark.nightly
def test_one_that_never_comes_back_leaves_its_rest_unrun(one_kernel, tmp_path):
    """A dead host is never green, and what it had recorded is in the result."""
    with LabMachine(one_kernel.kernel, tmp_path, "emulated3", reboots=False) as dying:
        with connect(dying.lab, 30) as connection:
            connection.run("touch", "/run/panic")
        lab = replace(dying.lab, reconnect_s=5, boot_s=5)
        fleet = Fleet(tmp_path, [lab])
        assert fleet.run() in (1, 2), fleet.said
    ends = fleet.ends("emulated3")
    assert ends["l2_answers[npt=True]"]["verdict"] == "PASS"
    assert ends["panics_where_it_is_told_to"]["verdict"] in ("FAIL", "ERROR")
    assert ends["zlast"]["verdict"] == "MISS"
    assert fleet.json["hosts"]["emulated3"]["status"] != 0
    said = "ERROR  emulated3: no connection to "
    assert any(line.startswith(said) for line in fleet.said.splitlines())
