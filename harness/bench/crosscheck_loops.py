"""The cross-check's speed inside a host, split into model, harness and kernel.

Standard library only.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import astuple
from itertools import count as numbers
from typing import Final

from harness.crosscheck.campaign import Campaign, Times, on_kvm
from harness.crosscheck.deviations import applicable
from harness.crosscheck.generator import sequence
from harness.crosscheck.settings import Setting, setting_for
from harness.crosscheck.silicon import is_emulated
from harness.errors import Unsupported
from kvm_ioctl.handles import Kvm

CROSSCHECK_NAMES: Final = ("crosscheck_steps",)
STEPS: Final = 400
"""Of a repetition; the last sequence goes on to its end."""

_NAME = CROSSCHECK_NAMES[0]


def run_crosscheck_benchmarks(
    emit: Callable[..., None], *, names: Sequence[str], repeat: int, count: int | None
) -> None:
    """Emit a `pair` for each repetition: the time of so many steps, and KVM's part of it."""
    with Kvm() as kvm:
        knobs = Setting(setting_for(platform.release()), {}).knobs()
        try:
            campaign = on_kvm(kvm, knobs, applicable(is_emulated()))
        except Unsupported as e:
            emit("skipped", name=_NAME, reason=str(e))
            return
        _repetition(campaign, -1, 1)  # warms up
        for seed in range(repeat):
            steps, times = _repetition(campaign, seed, count or STEPS)
            whole_s = sum(astuple(times))
            parts = {
                "model": times.model_s / whole_s,
                "kernel": times.kernel_s / whole_s,
                "harness": times.harness_s / whole_s,
            }
            split = ", ".join(f"{name} {share:.0%}" for name, share in parts.items())
            emit(
                "pair",
                name=_NAME,
                against="KVM's ioctls alone",
                count=steps,
                unit="steps",
                note=f"of the time: {split}",
                parts=parts,
                ours={"seconds": whole_s, "done": steps, "witness": steps},
                theirs={"seconds": times.kernel_s, "done": steps, "witness": steps},
            )


def _repetition(campaign: Campaign, seed: int, steps: int) -> tuple[int, Times]:
    """Run sequences of a seed until so many steps are done; return how many, and the times."""
    campaign.times = Times()
    done = 0
    for number in numbers():
        done += campaign.run(sequence(seed, number, None)).steps
        if done >= steps:
            break
    return done, campaign.times
