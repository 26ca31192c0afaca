"""What in the kernel's log decides a verdict."""

from __future__ import annotations

import re
from collections.abc import Iterable

#: A scenario during which the kernel says one of these has failed.
SPLATS = tuple(
    re.compile(pattern)
    for pattern in (
        r"\bWARNING: ",
        r"\bBUG: ",
        r"\bkernel BUG at\b",
        r"\bOops\b",
        r"\bgeneral protection fault\b",
        r"\bunchecked MSR access error\b",
        r"\bKASAN\b|\bUBSAN\b|\bKCSAN\b",
        r"\bINFO: (task .* blocked|possible recursive locking|lockdep)",
        r"\bBad page (state|map)\b",
        r"\brefcount_t: ",
        r"\blist_(add|del) corruption\b",
        r"\bKernel panic\b",
    )
)

#: Taint bits that a scenario must not add (Documentation/admin-guide/tainted-kernels.rst): D(ie),
#: W(arn), B(ad page), L(ockup), M(achine check). An out-of-tree module's bit is not one of them.
TAINTS = {7: "D (oops)", 9: "W (warning)", 5: "B (bad page)", 14: "L (soft lockup)", 4: "M (MCE)"}


def splats(lines: Iterable[str], benign: Iterable[str] = ()) -> list[str]:
    """Return the lines that make a scenario FAIL; `benign` are expressions that excuse a line."""
    excused = [re.compile(pattern) for pattern in benign]
    return [
        line
        for line in lines
        if any(splat.search(line) for splat in SPLATS)
        and not any(pattern.search(line) for pattern in excused)
    ]


def new_taints(before: int, after: int) -> list[str]:
    """Return the names of the condemning taint bits that appeared."""
    new = after & ~before
    return [name for bit, name in TAINTS.items() if new >> bit & 1]
