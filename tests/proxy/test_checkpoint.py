"""What Python knows of a machine's levels, as JSON and back."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.migrate.shape import BlankMachine, Shape
from harness.proxy.checkpoint import CheckpointError, remember, resume
from harness.proxy.level import Level
from harness.proxy.machine import ProxyMachine
from harness.proxy.program import load, store

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("carried_images")]


@pytest.fixture
def machine(kvm):
    with ProxyMachine(kvm, vcpus=2, memory_mib=8) as made:
        yield made


@pytest.fixture
def blank(kvm, machine):
    with BlankMachine(kvm, Shape.of(machine)) as made:
        yield made


def test_all_that_is_known_comes_back(machine, blank):
    machine.l1.run([store(machine.l1.scratch, 5), load(machine.l1.scratch)])
    known = json.loads(json.dumps(remember(machine)))
    with resume(blank, known) as other:
        assert isinstance(other.l1, Level)
        assert other.l1 is not machine.l1
        assert other.l1.instance.sent == machine.l1.instance.sent
        assert other.l1.scratch == machine.l1.scratch
        assert other.cpus[0].current is other.l1
        assert [cpu.runner.index for cpu in other.cpus] == [0, 1]
        assert other.cpus[1].runner is blank.vcpus[1]
        assert other.l1.tables.memory is blank.memory
        assert remember(other) == known


def test_a_hook_does_not_travel(machine):
    machine.cpus[0].before_run = lambda cpu: None
    with pytest.raises(CheckpointError, match="before_run is in use"):
        remember(machine)


def test_another_build_of_the_proxy_is_refused(machine, blank):
    known = remember(machine) | {"image": "0" * 64}
    with pytest.raises(CheckpointError, match="another build"):
        resume(blank, known)


def test_only_known_classes_are_made(machine, blank):
    known = json.loads(json.dumps(remember(machine)).replace('"PageAllocator"', '"Popen"'))
    with pytest.raises(CheckpointError, match="malformed"):
        resume(blank, known)


def paths(data, at=()):
    yield at
    if isinstance(data, list | dict):
        for key in range(len(data)) if isinstance(data, list) else data:
            yield from paths(data[key], (*at, key))


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_whatever_is_changed_gives_a_line_or_a_machine(kvm, machine, data):
    known = json.loads(json.dumps(remember(machine)))
    place = data.draw(st.sampled_from([path for path in paths(known) if path]))
    junk = st.sampled_from([None, "", "x", [], {}, -1, 1 << 70, ["o"], ["r", 99], ["n", "x", 1]])
    inner = known
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = data.draw(junk)
    said = ""
    with BlankMachine(kvm, Shape.of(machine)) as blank:
        try:
            resume(blank, known).close()
        except CheckpointError as e:
            said = str(e)
    assert "\n" not in said
