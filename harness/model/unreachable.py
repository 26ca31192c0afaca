"""Knobs that no sequence of operations can tell apart, and why: they need other means to be seen.

`tests/model` holds the others to it: for each of them there is a sequence that shows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

UNREACHABLE: Final[Mapping[str, str]] = {
    "alloc_failure": "no operation makes the host short of memory",
    "nested_state_control_bytes": "the bytes of which some kernels give more are 0 in all of them",
    "save_area": "what is read twice shows only if another CPU writes to vmcb12 in between",
    "vmrun_drops_l1_events": "before an Execute the host sets the registers, which drops a queued "
    "exception, and there are no interrupts",
    "reset_leaves_nested": "there is no INIT: one vCPU, and no interrupt controller",
}
"""By the names of `Knobs`."""
