"""The cross-check's benchmark: one pair for each repetition, or a reason why there is none."""

from contextlib import nullcontext

import pytest

from harness.bench import crosscheck_loops
from harness.bench.crosscheck_loops import CROSSCHECK_NAMES, run_crosscheck_benchmarks
from harness.crosscheck.campaign import Times
from harness.errors import Unsupported


class FakeCampaign:
    """Every sequence has 30 steps and takes a second and a half."""

    times = Times()

    def run(self, operations):
        self.times.model_s += 0.5
        self.times.kernel_s += 0.25
        self.times.harness_s += 0.75
        return self

    steps = 30


@pytest.fixture
def emitted(monkeypatch):
    monkeypatch.setattr(crosscheck_loops, "Kvm", nullcontext)
    events = []

    def run(make, **options):
        monkeypatch.setattr(crosscheck_loops, "on_kvm", make)
        run_crosscheck_benchmarks(
            lambda kind, **data: events.append((kind, data)), names=CROSSCHECK_NAMES, **options
        )
        return events

    return run


def test_each_repetition_is_a_pair_with_its_split(emitted):
    events = emitted(lambda *_: FakeCampaign(), repeat=2, count=50)
    assert [kind for kind, _ in events] == ["pair", "pair"]
    for _, pair in events:
        assert pair["ours"] == {"seconds": 3.0, "done": 60, "witness": 60}
        assert pair["theirs"] == {"seconds": 0.5, "done": 60, "witness": 60}
        assert pair["parts"] == {"model": 1 / 3, "kernel": 1 / 6, "harness": 1 / 2}


def test_a_kvm_without_svm_is_skipped_with_the_reason(emitted):
    def refuse(*_):
        raise Unsupported("no SVM here")

    assert emitted(refuse, repeat=2, count=50) == [
        ("skipped", {"name": "crosscheck_steps", "reason": "no SVM here"})
    ]
