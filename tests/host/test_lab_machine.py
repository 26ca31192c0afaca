"""A machine of a lab, emulated: through SSH, with its own kernel, which panics in the middle."""

import json
from pathlib import Path

import pytest
from lab_machine import LabMachine
from near_lab import lab_text
from nsvm_process import Nsvm, nsvm

from harness.errors import HostError, HostLost
from harness.host.ssh import SshHost
from harness.host.ssh_connection import connect

pytestmark = pytest.mark.emulated

SCENARIOS = '''
import time
from pathlib import Path
from harness.scenarios import scenario

def parameter(name):
    return Path("/sys/module/kvm_amd/parameters", name).read_text().strip()

@scenario()
def test_before(context):
    """It passes."""
    assert parameter("npt") in ("Y", "1")

@scenario(params={"npt": "0"})
def test_without_npt(context):
    """It has kvm_amd with npt=0."""
    assert parameter("npt") in ("N", "0")

@scenario(params={"npt": "0"})
def test_without_npt_fails(context):
    """It fails."""
    from harness.errors import ScenarioFailure
    raise ScenarioFailure("on purpose")

@scenario()
def test_crashes_the_kernel(context):
    """It makes the kernel panic."""
    context.note("noted before the panic")
    # For the note to be out of the machine.
    time.sleep(5)
    Path("/proc/sysrq-trigger").write_text("c")
    time.sleep(600)

@scenario()
def test_after(context):
    """It passes on the machine as it was booted again."""
    assert parameter("npt") in ("Y", "1")
'''


@pytest.fixture(scope="module")
def machine(one_kernel, tmp_path_factory):
    with LabMachine(one_kernel.kernel, tmp_path_factory.mktemp("lab")) as machine:
        yield machine


@pytest.fixture
def lab(machine, tmp_path):
    (tmp_path / "lab.toml").write_text(lab_text(machine.lab))
    (tmp_path / "scenarios.py").write_text(SCENARIOS)
    return tmp_path


def parameter(machine, name="npt"):
    with connect(machine.lab, 30) as connection:
        return connection.run("cat", f"/sys/module/kvm_amd/parameters/{name}").strip()


def files(machine):
    with connect(machine.lab, 30) as connection:
        return connection.run("find", ".nsvm", "-type", "f").split()


def test_nested_memory_is_measured_there(machine, lab):
    done = nsvm("memory", "--host", f"ssh:{machine.name}", "--lab", lab / "lab.toml", "--vcpus", 2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "verdict  PASS" in done.stdout


def test_parameters_are_given_back_after_a_keeper_was_killed(machine):
    """By the next run: nobody else is left who could."""
    said = []
    with SshHost(machine.lab, {"npt": "0"}, said.append) as host:
        session = host.start()
        assert parameter(machine) in ("N", "0")
        with connect(machine.lab, 30) as connection:
            keeper = json.loads(connection.run("cat", machine.lab.lock))["pid"]
            connection.run("kill", "-9", str(keeper))
        with pytest.raises(HostLost):
            session.call("harness.inside:ping", timeout_s=30)
    assert parameter(machine) in ("N", "0")
    with SshHost(machine.lab, None, said.append) as host:
        host.start()
        assert parameter(machine) in ("Y", "1")
    assert any("cleaned up after" in text for text in said)


def test_a_parameter_that_the_machine_does_not_take_is_given_back(machine):
    with (
        SshHost(machine.lab, {"vls": "1", "npt": "0"}) as host,
        pytest.raises(HostError, match=r"kvm_amd.vls is \S+, not 1: refused by kernel or CPU"),
    ):
        host.start()
    assert parameter(machine) in ("Y", "1")


def test_a_host_that_panics_in_the_middle_is_red_and_the_run_goes_on(machine, lab):
    where = ("--host", f"ssh:{machine.name}", "--lab", lab / "lab.toml")
    with Nsvm("run", *where, lab / "scenarios.py", results=lab / "results") as run:
        status, output = run.end()
    assert {case: end["verdict"] for case, end in run.ends().items()} == {
        "before": "PASS",
        "without_npt": "PASS",
        "without_npt_fails": "FAIL",
        "crashes_the_kernel": "FAIL",
        "after": "PASS",
    }, output
    assert status == 1
    assert "the host went down and was booted again" in run.ends()["crashes_the_kernel"]["reason"]
    noted = [e["case"] for e in run.events() if e["event"] == "emit"]
    assert "crashes_the_kernel" in noted
    assert parameter(machine) in ("Y", "1")
    assert [Path(name).suffix for name in files(machine)] == [".pyz"]
