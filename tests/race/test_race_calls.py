"""What a race refuses to begin without."""

import os

import pytest

from harness.errors import HostError
from harness.facts import Fact
from harness.race import calls


def begin():
    return calls.run(lambda *args, **values: None, fields=["CR0"], by="vcpu", seconds=1)


def having(monkeypatch, *, svm, cpus):
    monkeypatch.setattr(calls, "nested_svm", lambda host: Fact(svm, "nested=0"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cpus)))


def test_no_nested_svm_is_said_with_its_evidence(monkeypatch):
    having(monkeypatch, svm=False, cpus=2)
    with pytest.raises(HostError, match="a race needs nested SVM: nested=0"):
        begin()


def test_one_cpu_is_too_few(monkeypatch):
    having(monkeypatch, svm=True, cpus=1)
    with pytest.raises(HostError, match="a race needs 2 CPUs, this process may use 1"):
        begin()
