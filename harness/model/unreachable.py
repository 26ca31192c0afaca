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
    "vmrun_drops_l1_events": "nothing is pending at VMRUN but the #DB of RFLAGS.TF, which all lose",
}
"""By the names of `Knobs`."""
