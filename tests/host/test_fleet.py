"""`nsvm fleet run` as a user does it: this machine, twice, behind an SSH server."""

import json
import os
import re
import signal
import socket
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from near_lab import assert_nothing_is_left, inventory_text, near, ssh_server  # noqa: F401
from nsvm_process import Nsvm, nsvm, read_results, wait_until

from harness.fleet.inventory import read_hosts
from harness.host.machine_lock import machine_lock, ourselves
from harness.report.store import Store

SCENARIOS = """
import os
import time
from pathlib import Path
from harness.errors import ScenarioFailure
from harness.scenarios import scenario

HERE = Path({here!r})

@scenario()
def test_one(context):
    '''It passes.'''

@scenario(axes={{"number": range(4)}})
def test_many(context, number):
    '''It passes.'''

@scenario()
def test_fails(context):
    '''It fails.'''
    raise ScenarioFailure("on purpose")

@scenario()
def test_waits(context):
    '''It waits for ever, once it was said that it does.'''
    context.note("noted before")
    (HERE / f"waiting{{os.getpid()}}").touch()
    time.sleep(600)

@scenario()
def test_zlast(context):
    '''It passes.'''
"""


@pytest.fixture
def lab(near, tmp_path):  # noqa: F811
    """Two hosts with an inventory, and scenarios."""
    return Fleet(tmp_path, [_another(near, tmp_path, name) for name in ("near1", "near2")])


def _another(host, here, name):
    return replace(
        host, name=name, directory=str(here / name), lock=str(here / f"{name}.lock"), connect_s=3
    )


class Fleet:
    def __init__(self, here, hosts):
        self.here, self.hosts = here, hosts
        self.results = here / "results"
        self.inventory = here / "inventory.json"
        self.scenarios = here / "scenarios.py"
        self.scenarios.write_text(SCENARIOS.format(here=str(here)))
        self.write(hosts)

    def write(self, hosts, **variables):
        self.inventory.write_text(inventory_text(hosts, **variables))

    def words(self, *options):
        where = ["-i", self.inventory, "--results", self.results, "--store", self.here / "s.sqlite"]
        return ["fleet", "run", *where, "--json", self.here / "json", *options, self.scenarios]

    def run(self, *options):
        done = nsvm(*self.words(*options))
        self.said = done.stdout + done.stderr
        assert "Traceback" not in self.said
        return done

    def are_waiting(self, count):
        return lambda: len([*self.here.glob("waiting*")]) == count

    @property
    def json(self):
        return json.loads((self.here / "json").read_text())

    def verdicts(self, host):
        events = read_results(self.results / host / "results.jsonl")
        return {e["case"]: e["verdict"] for e in events if e["event"] == "end"}


ALL = {"one", "fails", "zlast", *(f"many[number={number}]" for number in range(4))}
CHOSEN = ("-k", "not waits")


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def test_all_cases_run_on_each_host_and_are_in_one_store(lab):
    done = lab.run(*CHOSEN)
    assert done.returncode == 1, lab.said
    for host in lab.hosts:
        assert set(lab.verdicts(host.name)) == ALL, lab.said
        assert f"nsvm: {host.name}: 7 of 7: " in done.stderr
        assert f"FAIL  {host.name}: fails: on purpose" in done.stdout
        assert_nothing_is_left(host)
    with Store(lab.here / "s.sqlite") as store:
        assert sorted(host for _, host, _ in store.heads()) == ["near1", "near2"]
    assert lab.json["counts"] == {"PASS": 12, "FAIL": 2}
    assert lab.json["hosts"]["near1"]["cases"]["fails"]["reason"] == "on purpose"
    # What is there already is nobody's of a second run.
    assert lab.run(*CHOSEN).returncode == 2
    assert lab.said.strip() == f"nsvm: {lab.results / 'near1'} has the results of another run"


def test_dealt_out_each_case_runs_once(lab):
    lab.run("--deal", *CHOSEN)
    first, second = (set(lab.verdicts(host.name)) for host in lab.hosts)
    assert first | second == ALL
    assert not first & second
    assert abs(len(first) - len(second)) == 1
    assert lab.json["complaints"] == []
    assert lab.json["status"] == 1


def test_hosts_that_cannot_be_had_are_red_and_their_shares_were_not_run(lab):
    """One is dead, one is another run's, one has a mistake in the inventory; one runs its share."""
    good, busy = lab.hosts
    dead = replace(good, name="near3", port=free_port())
    wrong = replace(good, name="near4", port="2x")
    lab.write([good, busy, dead, wrong])
    with machine_lock(Path(busy.lock), {**ourselves(), "who": "eve@far"}):
        done = lab.run("--deal", "-k", "one or many or zlast")
    assert done.returncode == 2
    assert lab.json["hosts"]["near1"]["status"] == 0
    assert "ERROR  near2: in use by eve@far" in done.stdout
    assert "ERROR  near3: no connection to " in done.stdout
    [line] = [x for x in done.stdout.splitlines() if x.startswith("ERROR  near4: ")][:1]
    assert re.search(r"lab.toml:3: hosts.near4.port: '2x' is no port \(1 to 65535\)$", line)
    assert "ERROR  near4: its share, 4/4 of the cases, was not run" in done.stdout
    for host in ("near2", "near3"):
        share = lab.verdicts(host)
        assert set(share.values()) == {"MISS"}
        assert lab.json["hosts"][host]["counts"] == {"MISS": len(share)}
        assert lab.json["hosts"][host]["status"] == 2
    assert lab.json["hosts"]["near4"]["status"] == 2
    checked = nsvm("report", "--store", lab.here / "s.sqlite", "--check")
    assert checked.returncode == 1
    red = {line.split()[1].rstrip(",") for line in checked.stderr.splitlines()}
    assert red == {"near2", "near3", "near4"}


def test_a_run_that_dies_is_red_with_what_it_had_recorded(lab):
    """Killed as by the machine's OOM killer, in its second case."""
    lab.write(lab.hosts[:1])
    with Nsvm(*lab.words("-k", "one or waits")) as fleet:
        wait_until(lab.are_waiting(1), "the case that waits")
        [run] = runs_of(fleet, lab)
        os.kill(run.pid, signal.SIGKILL)
        status, output = fleet.end()
    assert status == 2, output
    assert lab.verdicts("near1") == {"one": "PASS"}
    assert lab.json["hosts"]["near1"]["counts"] == {"PASS": 1, "MISS": 1}
    assert lab.json["hosts"]["near1"]["complaints"][0].startswith("its run has no end")


def runs_of(fleet, lab):
    """The processes of `nsvm run` that a fleet has started."""
    children = psutil.Process(fleet.process.pid).children(recursive=True)
    return [child for child in children if str(lab.results / "near1") in child.cmdline()]


def test_a_fleet_that_is_told_to_end_ends_its_runs_in_good_order(lab):
    with Nsvm(*lab.words("-k", "waits or zlast")) as fleet:
        wait_until(lab.are_waiting(2), "the cases that wait")
        fleet.process.send_signal(signal.SIGTERM)
        status, output = fleet.end()
    assert status == 143, output
    for host in lab.hosts:
        assert lab.verdicts(host.name) == {"waits": "MISS", "zlast": "MISS"}
        assert_nothing_is_left(host)


def test_a_fleet_that_is_killed_leaves_no_run_and_no_machine_taken(lab):
    """By SIGKILL, so that it can do nothing itself: its runs notice, and give the machines back."""
    with Nsvm(*lab.words("-k", "waits or zlast")) as fleet:
        wait_until(lab.are_waiting(2), "the cases that wait")
        started = psutil.Process(fleet.process.pid).children(recursive=True)
        assert sum("--results" in process.cmdline() for process in started) >= 2
        fleet.process.kill()
        _, alive = psutil.wait_procs(started, timeout=30)
        for process in alive:
            process.kill()
        assert alive == []
    for host in lab.hosts:
        assert lab.verdicts(host.name) == {"waits": "MISS", "zlast": "MISS"}
        assert_nothing_is_left(host)


def test_time_that_is_over_is_said(lab):
    done = lab.run("--longest", "0.003", "-k", "waits")
    assert done.returncode == 2
    assert "ERROR  not done within 11 s" in done.stdout
    for host in lab.hosts:
        assert lab.verdicts(host.name) == {"waits": "MISS"}
        assert_nothing_is_left(host)


def test_templates_and_groups_are_ansibles(lab):
    group = lab.here / "group_vars"
    group.mkdir()
    (group / "all.yml").write_text("where: 127.0.0.1\nnsvm_params: {}\n")
    text = lab.inventory.read_text().replace('"127.0.0.1"', '"{{ where }}"')
    lab.inventory.write_text(text)
    assert lab.run("-k", "one", "--limit", "near1").returncode == 0, lab.said
    assert list(lab.json["hosts"]) == ["near1"]


# Inventories that cannot be used


BAD = {
    "all:\n  hosts: [": "YAML parsing failed: .*",
    "all:\n  hosts:\n": "no host",
    "all:\n  hosts:\n    zen 2: {}\n": "'zen 2': a host's name has letters, .*",
    "all:\n  hosts:\n    '-x': {}\n": "'-x': a host's name has letters, .*",
}


@pytest.mark.parametrize(("text", "why"), BAD.items(), ids=range(len(BAD)))
def test_a_bad_inventory_is_one_line(tmp_path, text, why):
    path = tmp_path / "lab.yml"
    path.write_text(text)
    done = nsvm("fleet", "run", "-i", path, "--results", tmp_path / "results")
    assert done.returncode == 2
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith(f"nsvm: inventory {path}: ")
    assert re.fullmatch(why, line.removeprefix(f"nsvm: inventory {path}: "))
    assert not (tmp_path / "results").exists()


def test_an_inventory_that_is_not_there(tmp_path):
    done = nsvm("fleet", "run", "-i", tmp_path / "none")
    assert (done.returncode, done.stderr) == (
        2,
        f"nsvm: inventory {tmp_path / 'none'}: no such file or directory\n",
    )


def test_a_limit_that_no_host_matches(tmp_path):
    path = tmp_path / "lab.yml"
    path.write_text("all: {hosts: {zen2: {}, zen4: {}}}\n")
    assert read_hosts([path], "zen*:!zen4") == ["zen2"]
    done = nsvm("fleet", "run", "-i", path, "--limit", "rome")
    assert done.stderr == f"nsvm: inventory {path}: no host matches rome\n"
