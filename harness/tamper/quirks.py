"""Differences of cells that have a name: what the CPU answers otherwise than the model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from harness.crosscheck.deviations import Deviation
from harness.tamper.cells import Cell


@dataclass(frozen=True)
class Quirk:
    """A deviation, and the cells that show it."""

    cells: str
    """An expression for what begins their names."""
    deviation: Deviation


QUIRKS: Final = (
    Quirk(
        r".*\[L2",
        Deviation(
            "exit-info-of-an-emulated-instruction",
            "EXITINFO1 and 2 of an intercepted VMMCALL are those of the last #NPF",
            "L2's page tables are pages of the nested tables too, which KVM protects: setting their"
            " accessed bits is a #NPF, for which KVM emulates the VMMCALL; svm_check_intercept()"
            " exits to L1 with vmcb02's exit information. The manual defines none for VMMCALL",
            ("VMMCALL",),
            r"vmcb_[ab]\.control\.exit_info_[12]",
            expected="0x0",
        ),
    ),
    Quirk(
        r"host save page\[L2( npt)?: ss CPL 3",
        Deviation(
            "cpl-from-ss",
            "the CPL after VMRUN is SS.DPL, not the VMCB's CPL, which KVM keeps 0 for L1",
            "QEMU target/i386: svm_load_seg_cache(), cpu_x86_load_seg_cache(); APM vol. 2, 15.5.1:"
            " VMRUN loads CPL from the VMCB",
            ("VMMCALL",),
            "result|rip",
            emulated=True,
            ends=True,
        ),
    ),
)
"""All that are known, beside those of `harness.crosscheck.deviations`."""


def quirks_of(cell: Cell, emulated: bool) -> Sequence[Deviation]:
    """Return the deviations that a cell may show on silicon of this kind."""
    return [
        quirk.deviation
        for quirk in QUIRKS
        if re.match(quirk.cells, cell.name) and quirk.deviation.emulated in (None, emulated)
    ]
