"""The measurement's arithmetic, on probes that read what is written down."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import ScenarioFailure
from harness.model.allocation import Policy, delta_bytes
from harness.scenarios import measure as measure_module
from harness.scenarios.measure import Reading, ToggleByMsrs, measure, read_settled
from harness.svm.msrs import Efer, Msr


class Held:
    """What the kernel holds: a toggle sets it, a probe reads it, with some noise."""

    def __init__(self, per_vcpu=12288, vcpus=4, leak=0, noise=(), resolution=0):
        self.size, self.leak, self.noise = per_vcpu * vcpus, leak, list(noise)
        self.held, self.sets = 7_000_000, []
        self.resolution = resolution

    def set(self, svme):
        self.sets.append(svme)
        self.held += self.size if svme else self.leak - self.size

    def read_bytes(self):
        return self.held + (self.noise.pop(0) if self.noise else 0)

    def resolution_bytes(self):
        return self.resolution


def test_a_reading_is_per_vcpu_whatever_was_held_before():
    held = Held(resolution=8192)
    assert measure(held, held, vcpus=4, rounds=3) == Reading(
        off_bytes_per_vcpu=0,
        on_bytes_per_vcpu=12288,
        delta_bytes_per_vcpu=12288,
        resolution_bytes=2048,
    )


def test_one_round_more_runs_ahead_and_does_not_count():
    # What the first round touches for the first time stays: 40 pages.
    held = Held(noise=[0, 40 * 4096] + [40 * 4096] * 6)
    reading = measure(held, held, vcpus=4, rounds=3)
    assert held.sets == [True, False] * 4
    assert (reading.on_bytes_per_vcpu, reading.off_bytes_per_vcpu) == (12288, 0)


def test_one_round_of_noise_does_not_matter():
    held = Held(noise=[0, 0, 0, 0, 999_999, 0, 0, 0])
    assert measure(held, held, vcpus=4, rounds=3).on_bytes_per_vcpu == 12288


def test_what_every_round_leaves_behind_is_seen():
    held = Held(leak=4096 * 4)
    reading = measure(held, held, vcpus=4, rounds=3)
    assert reading.off_bytes_per_vcpu == 4096
    assert not reading.agrees_with(12288)


@given(on=st.integers(-20000, 20000), off=st.integers(-20000, 20000), slack=st.integers(0, 10000))
def test_agreeing_means_both_figures_are_within_the_resolution(on, off, slack):
    reading = Reading(off, on, on - off, slack)
    within = abs(on - off - 12288) <= slack and abs(off) <= slack
    assert reading.agrees_with(12288) is within


class Falling:
    def __init__(self, *readings):
        self.readings = list(readings)

    def read_bytes(self):
        return self.readings.pop(0) if len(self.readings) > 1 else self.readings[0]


@pytest.fixture
def no_waiting(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(measure_module.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(measure_module.time, "sleep", lambda s: clock.__setitem__(0, clock[0] + s))
    return clock


def test_what_is_freed_late_is_waited_for(no_waiting):
    assert read_settled(Falling(900, 900, 500, 500, 500, 100, 300, 100)) == 100


def test_what_never_settles_is_not_waited_for_for_ever(no_waiting):
    assert read_settled(Falling(*range(100_000, 0, -1))) > 90_000
    assert measure_module.SETTLE_S <= no_waiting[0] < measure_module.SETTLE_S + 1


class Vcpu:
    def __init__(self, takes):
        self.efer, self.takes = Efer(0x500), takes

    def get_msrs(self, wanted):
        assert wanted == [Msr.MSR_EFER]
        return {Msr.MSR_EFER: self.efer}

    def set_msrs(self, values):
        if self.takes:
            self.efer = values[Msr.MSR_EFER]
        return int(self.takes)


class Runner:
    def __init__(self, index, takes=True):
        self.index, self.vcpu = index, Vcpu(takes)


class FakeMachine:
    def __init__(self, *runners):
        self.vcpus = runners


def test_a_toggle_changes_svme_and_nothing_else():
    one, two = Runner(0), Runner(1)
    toggle = ToggleByMsrs([FakeMachine(one), FakeMachine(two)])
    toggle.set(True)
    assert [int(r.vcpu.efer) for r in (one, two)] == [0x1500, 0x1500]
    toggle.set(False)
    assert [int(r.vcpu.efer) for r in (one, two)] == [0x500, 0x500]


def test_a_refused_write_is_a_failure_that_names_the_vcpu():
    with pytest.raises(ScenarioFailure, match="vCPU 3: KVM_SET_MSRS refused"):
        ToggleByMsrs([FakeMachine(Runner(3, takes=False))]).set(True)


def test_what_running_kernels_do_is_12288_bytes():
    assert delta_bytes(measure_module.EXPECTED_POLICY) == delta_bytes(Policy.ON_DEMAND) == 12288
