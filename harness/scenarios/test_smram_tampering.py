"""The save area, vmcb12 and the host save page changed in SMM: RSM does as the model says.

The cells are those of `nsvm tamper`; the model has the knobs of this kernel's release. No cell may
hang, end the VM otherwise than predicted, or make the kernel complain. APM vol. 2, 10.3.4 Leaving
SMM, 15.22 SMM Support; kernel: emulator_leave_smm(), svm_leave_smm().
"""

from __future__ import annotations

import os

from harness.crosscheck.campaign import facts_here
from harness.crosscheck.settings import Setting, setting_for
from harness.crosscheck.silicon import is_emulated
from harness.errors import ScenarioFailure
from harness.facts import nested_svm, npt, smm
from harness.scenarios.case import scenario
from harness.scenarios.context import Context
from harness.tamper.calls import KernelLog
from harness.tamper.cells import Start
from harness.tamper.rows import Row
from harness.tamper.table import GROUPS, cells_of
from harness.tamper.trial import Trial

_SHOWN = 4
_SLOW_S = 300.0
_STARTS = {
    "L1": (Start.PLAIN, Start.L1, Start.LEGACY),
    "L2": (Start.L2, Start.L2_NPT, Start.L2_NO_SVM, Start.LEGACY_L2),
}


@scenario(
    needs=[nested_svm, npt, smm],
    axes={"group": tuple(GROUPS), "interrupts": tuple(_STARTS)},
    levels=2,
    timeout_s=_SLOW_S,
)
def test_rsm_from_a_tampered_smram_does_as_the_model_says(
    context: Context, group: str, interrupts: str
) -> None:
    """RSM from a changed save area comes back where, with what, and ends as the model says."""
    cells = [cell for cell in cells_of(group) if cell.start in _STARTS[interrupts]]
    setting = Setting(setting_for(os.uname().release))
    with KernelLog() as log:
        trial = Trial(
            context.kvm,
            setting.knobs(),
            facts_here(context.kvm),
            is_emulated(),
            log.complaints,
        )
        rows = [trial.row(cell) for cell in cells]
    context.note("cells", cells=len(rows), outcomes=_outcomes(rows))
    _expect_as_predicted(rows)


def _outcomes(rows: list[Row]) -> dict[str, int]:
    return {row.outcome: sum(r.outcome == row.outcome for r in rows) for row in rows}


def _expect_as_predicted(rows: list[Row]) -> None:
    differing = [row for row in rows if row.differs]
    if differing:
        said = [f"{row.name}: {'; '.join(row.how())}" for row in differing[:_SHOWN]]
        more = f", and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
        raise ScenarioFailure(f"{len(differing)} of {len(rows)} cells: {' / '.join(said)}{more}")
