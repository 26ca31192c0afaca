"""Work at L1, which any /dev/kvm can do: cut, saved, and gone on with under another control."""

import io

import pytest

from harness.migrate.transfer import load, save
from harness.proxy.checkpoint import remember, resume
from harness.proxy.machine import ProxyMachine
from harness.storm.workload import MEMORY_MIB, Cut, Kind, StateError, Workload

pytestmark = pytest.mark.kvm
L1 = Kind(levels=1)


@pytest.fixture
def workload(kvm):
    with ProxyMachine(kvm, memory_mib=MEMORY_MIB) as machine:
        yield Workload.begin(machine, L1)


def moved(kvm, workload):
    file = io.BytesIO()
    with workload.machine.paused():
        sides = {"proxies": remember(workload.machine), "workload": workload.state}
        save(workload.machine, file, sides)
    file.seek(0)
    loaded = load(kvm, file)
    machine = resume(loaded.machine, loaded.sides["proxies"])
    return Workload.resume(machine, loaded.sides["workload"])


def test_two_machines_do_the_same_work(kvm, workload):
    with ProxyMachine(kvm, memory_mib=MEMORY_MIB) as machine:
        twin = Workload.begin(machine, L1)
        assert [twin.step() for _ in range(8)] == [workload.step() for _ in range(8)]
        assert len(set(twin.transcript)) == 8


def test_a_cut_step_goes_on_where_it_was_cut(kvm, workload):
    with ProxyMachine(kvm, memory_mib=MEMORY_MIB) as machine:
        twin = Workload.begin(machine, L1)
        for _ in range(8):
            twin.step()
    cuts = 0
    while workload.steps_done < 8:
        workload.cut_after(1)
        try:
            workload.step()
        except Cut:
            cuts += 1
            workload.step()
    assert cuts == 8
    assert workload.transcript == twin.transcript


def test_work_goes_on_after_a_move_in_mid_step(kvm, workload):
    workload.step()
    workload.cut_after(1)
    with pytest.raises(Cut):
        workload.step()
    assert workload.state["under_way"]
    there = moved(kvm, workload)
    with there.machine:
        assert [there.step() for _ in range(6)] == [workload.step() for _ in range(6)]


def test_lost_memory_shows_in_the_transcript(kvm, workload):
    workload.step()
    there = moved(kvm, workload)
    with there.machine:
        there.machine.memory.zero(there.level.scratch, 4096)
        assert [there.step() for _ in range(2)] != [workload.step() for _ in range(2)]


@pytest.mark.parametrize("state", [None, {}, {"levels": "x", "npt": True}, {"levels": 1}, 7])
def test_a_malformed_state_is_refused_in_one_line(kvm, workload, state):
    with pytest.raises(StateError) as refused:
        Workload.resume(workload.machine, state)
    assert "\n" not in str(refused.value)
