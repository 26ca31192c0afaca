"""kvm_amd's parameters: lent, and given back whatever happens. A made-up modprobe reloads."""

import json
import os

import pytest

from harness.errors import HostError
from harness.host import kvm_parameters, machine_lock
from harness.host.local import LocalHost

MODPROBE = """#!/bin/sh
# Unloads and loads as kvm_amd does; "vls" is not to be had, "busy" is a module that is in use.
echo "$*" >> {here}/calls
if [ "$1" = -r ]; then
    [ ! -e {here}/busy ] || {{ echo "FATAL: Module kvm_amd is in use." >&2; exit 1; }}
    rm -f {module}/*
    exit 0
fi
shift
echo 1 > {module}/nested; echo Y > {module}/npt; echo 1 > {module}/vgif; echo N > {module}/vls
for setting; do
    [ "${{setting%%=*}}" = vls ] || echo "${{setting#*=}}" > {module}/${{setting%%=*}}
done
"""


class Machine:
    def __init__(self, here):
        self.here, self.module = here, here / "parameters"
        self.record = here / "record.json"
        self.module.mkdir()
        for name, value in {"nested": "1", "npt": "Y", "vgif": "0", "vls": "N"}.items():
            (self.module / name).write_text(f"{value}\n")
        tools = here / "tools"
        tools.mkdir()
        (tools / "modprobe").write_text(MODPROBE.format(here=here, module=self.module))
        (tools / "modprobe").chmod(0o755)

    @property
    def calls(self):
        path = self.here / "calls"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def machine(tmp_path, monkeypatch):
    machine = Machine(tmp_path)
    monkeypatch.setattr(kvm_parameters, "_DIRECTORY", machine.module)
    monkeypatch.setenv("PATH", f"{tmp_path / 'tools'}:{os.environ['PATH']}")
    return machine


BEFORE = {"nested": "1", "npt": "Y", "vgif": "0", "vls": "N"}


def borrowed(machine, **wanted):
    return kvm_parameters.borrowed(wanted, machine.record)


def test_they_are_lent_and_given_back(machine):
    with borrowed(machine, npt="0"):
        assert kvm_parameters.current() == {**BEFORE, "npt": "0"}
        assert machine.record.exists()
    # vgif=0 was not the module's default: it had been asked for.
    assert kvm_parameters.current() == BEFORE
    assert not machine.record.exists()


def test_they_are_given_back_after_a_failure(machine):
    with pytest.raises(KeyboardInterrupt), borrowed(machine, npt="0", nested="0"):
        raise KeyboardInterrupt
    assert kvm_parameters.current() == BEFORE


def test_what_is_so_already_is_left_alone(machine):
    with borrowed(machine, npt="1", vgif="N"):
        pass
    assert machine.calls == []


def test_a_parameter_that_the_machine_refuses_is_an_error_and_all_is_given_back(machine):
    with (
        pytest.raises(HostError, match=r"kvm_amd.vls is N, not 1: refused"),
        borrowed(machine, vls="1"),
    ):
        pass
    assert kvm_parameters.current() == BEFORE


def test_a_parameter_that_there_is_none_of_changes_nothing(machine):
    with (
        pytest.raises(HostError, match="kvm_amd has no parameter nptt"),
        borrowed(machine, nptt="1"),
    ):
        pass
    assert machine.calls == []


def test_a_module_that_is_in_use_stays_as_it_is(machine):
    (machine.here / "busy").touch()
    with pytest.raises(HostError, match="Module kvm_amd is in use"), borrowed(machine, npt="0"):
        pass
    assert kvm_parameters.current() == BEFORE
    assert not machine.record.exists()


def test_what_a_dead_run_had_borrowed_is_given_back_by_the_next(machine):
    def die():
        with borrowed(machine, npt="0"):
            left = machine.record.read_text()
            os._exit(0 if left else 1)

    if (pid := os.fork()) == 0:
        die()
    os.waitpid(pid, 0)
    assert kvm_parameters.current()["npt"] == "0"
    assert kvm_parameters.give_back(machine.record) == "npt=Y"
    assert kvm_parameters.current() == BEFORE


def test_a_record_of_another_boot_changes_nothing(machine):
    machine.record.write_text(json.dumps({"boot_id": "another", "params": {"npt": "0"}}))
    assert kvm_parameters.give_back(machine.record) == ""
    assert machine.calls == []
    assert not machine.record.exists()


def test_a_local_host_gives_them_back_when_it_does_not_come_up(machine, monkeypatch):
    monkeypatch.setenv(machine_lock.VARIABLE, str(machine.here / "lock"))
    monkeypatch.setenv("NSVM_CACHE", str(machine.here / "cache"))
    monkeypatch.setattr("harness.host.local.kvm_device", lambda view: 1 / 0)
    with pytest.raises(ZeroDivisionError), LocalHost({"npt": "0"}) as host:
        host.start()
    assert len(machine.calls) == 4
    assert kvm_parameters.current() == BEFORE
    assert (machine.here / "lock").read_text() == ""
