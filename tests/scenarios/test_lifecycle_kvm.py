"""Scenarios whose machines are moved before every run, on any /dev/kvm."""

import pytest

from harness.inside import run_case
from harness.migrate.errors import Refused
from harness.scenarios import l2
from harness.scenarios.case import FRESH, RESTORED
from harness.scenarios.context import Context

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("carried_images")]

SCENARIO = '''
from harness.proxy.program import load, store
from harness.scenarios.case import LIFECYCLES, scenario
from harness.scenarios.l2 import proxy_machine

@scenario(lifecycle=LIFECYCLES)
def test_memory_is_kept(context):
    """What L1 writes it reads."""
    machine = proxy_machine(context, memory_mib=8)
    for value in range(3):
        machine.l1.run([store(machine.l1.scratch, value)])
        context.expect("value", machine.l1.read(machine.l1.scratch), value)
    context.note("lived", lifecycle=context.lifecycle)
'''


@pytest.fixture
def moves(monkeypatch):
    """Machines that `l2` moved."""
    moved = []
    move = l2.move

    def counted(machine):
        moved.append(machine)
        return move(machine)

    monkeypatch.setattr(l2, "move", counted)
    return moved


def run(values, **options):
    notes = []

    def emit(kind, **data):
        notes.append(data)

    result = run_case(emit, "mine.py", "test_memory_is_kept", values, SCENARIO, **options)
    return result, notes


@pytest.mark.parametrize(
    ("values", "options", "lived"),
    [
        ({"lifecycle": FRESH}, {}, FRESH),
        ({"lifecycle": RESTORED}, {}, RESTORED),
        ({}, {}, FRESH),
        ({"lifecycle": FRESH}, {"lifecycle": RESTORED}, RESTORED),
    ],
)
def test_machines_are_moved_where_it_is_asked_for(kvm, moves, values, options, lived):
    result, notes = run(values, **options)
    assert result["verdict"] == "PASS", result
    assert notes[-1]["lifecycle"] == lived
    assert (len(moves) >= 6) == (lived == RESTORED)


def test_kvm_that_does_not_take_what_it_gave_is_a_fail(kvm, monkeypatch):
    def refuse(machine):
        raise Refused("vcpu 0: nested: EINVAL")

    monkeypatch.setattr(l2, "move", refuse)
    result, _ = run({"lifecycle": RESTORED})
    assert result["verdict"] == "FAIL"
    assert result["reason"] == "the machine cannot be restored: vcpu 0: nested: EINVAL"


def test_a_context_is_fresh_by_default():
    assert Context(lambda *_, **__: None).lifecycle == FRESH
