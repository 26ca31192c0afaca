"""What is called inside a host for `nsvm identify`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from harness.errors import Unsupported
from harness.facts import HostView, nested_svm
from harness.identify.battery import conduct, identify
from harness.identify.finding import EXPERIMENTS
from kvm_ioctl.handles import Kvm

Emit = Callable[..., None]


def run_battery(emit: Emit) -> list[dict[str, Any]]:
    """Run every experiment; return the report as plain data, and emit each finding as made.

    Raises:
        Unsupported: the host has no nested SVM.
        HostError: it cannot say.
    """
    if not (fact := nested_svm(HostView())).holds:
        raise Unsupported(f"nested_svm: {fact.evidence}")
    with Kvm() as kvm:
        report = identify(kvm, lambda finding: emit("finding", **finding.to_plain()))
    return report.to_plain()


def run_experiment(emit: Emit, *, name: str) -> list[dict[str, Any]]:
    """Run one experiment; return its findings as plain data."""
    with Kvm() as kvm:
        return [finding.to_plain() for finding in conduct(EXPERIMENTS[name], kvm)]
