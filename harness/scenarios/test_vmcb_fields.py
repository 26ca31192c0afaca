"""Every field of vmcb12, value by value: VMRUN and KVM_SET_NESTED_STATE do as the model says.

The cells are those of `nsvm fields`: single bits, boundaries, and combinations. The model has the
knobs of this kernel's release. APM vol. 2, 15.5.1 Basic Operation (Canonicalization and Consistency
Checks), appendix B; `nested_vmcb_check_controls`, `nested_vmcb_check_save`, `svm_set_nested_state`.
"""

from __future__ import annotations

import os

from harness.crosscheck.settings import setting_for
from harness.errors import ScenarioFailure
from harness.facts import nested_svm, npt
from harness.fields.calls import Runner, knobs_of
from harness.fields.rows import Row
from harness.fields.table import TEMPLATE, lines
from harness.fields.values import ALL_FIELDS
from harness.scenarios.case import scenario
from harness.scenarios.context import Context

_SHOWN = 4


@scenario(needs=[nested_svm, npt], axes={"field": (TEMPLATE, *ALL_FIELDS)}, levels=2)
def test_vmcb_field_is_taken_as_the_model_says(context: Context, field: str) -> None:
    """VMRUN and KVM_SET_NESTED_STATE take and refuse values of a field as the model says."""
    knobs = knobs_of(setting_for(os.uname().release), {})
    with Runner(context.kvm, knobs) as runner:
        rows = [runner.row(cell) for cell in runner.cells(field)]
    [line] = lines(rows)
    context.note("values of a field", entered=line.entered, refused=line.refused, taken=line.taken)
    _expect_as_predicted(rows)


def _expect_as_predicted(rows: list[Row]) -> None:
    differing = [row for row in rows if row.differences()]
    if differing:
        said = [f"{row.shown()}: {'; '.join(row.differences())}" for row in differing[:_SHOWN]]
        more = f", and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
        raise ScenarioFailure(f"{len(differing)} of {len(rows)} values: {' / '.join(said)}{more}")
