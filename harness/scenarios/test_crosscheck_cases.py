"""Sequences of operations that once told something: the model and this kernel agree on each.

They are bundles of `nsvm crosscheck`, in `harness/crosscheck/cases`; the model has the knobs of the
running kernel, by its release.
"""

from __future__ import annotations

import json
import os
from importlib.resources import files
from typing import Any, Final

from harness.crosscheck.campaign import on_kvm
from harness.crosscheck.deviations import applicable
from harness.crosscheck.record import Bundle, bundle_from
from harness.crosscheck.settings import Setting, setting_for
from harness.crosscheck.silicon import is_emulated
from harness.errors import ScenarioFailure
from harness.facts import nested_svm
from harness.scenarios.case import scenario
from harness.scenarios.context import Context

_CASES: Final = files("harness.crosscheck").joinpath("cases")

NAMES: Final = tuple(
    sorted(each.name.removesuffix(".json") for each in _CASES.iterdir() if each.is_file())
)


def _bundle(name: str) -> Bundle:
    plain: Any = json.loads(_CASES.joinpath(f"{name}.json").read_text())
    return bundle_from(plain)


@scenario(needs=[nested_svm], axes={"case": NAMES})
def test_model_and_kernel_agree_on_recorded_sequences(context: Context, case: str) -> None:
    """A kernel answers recorded sequences step by step as the model of it does."""
    bundle = _bundle(case)
    setting = Setting(setting_for(os.uname().release))
    campaign = on_kvm(context.kvm, setting.knobs(), applicable(is_emulated()))
    checked = campaign.again(bundle.operations)
    context.note("compared", steps=checked.steps, of=len(bundle.operations))
    if checked.difference is not None:
        turns = campaign.explained_by(bundle.operations, checked)
        hint = "".join(f"; it would agree with {turn}" for turn in turns)
        raise ScenarioFailure(f"{bundle.what}: {checked.difference}{hint}")
