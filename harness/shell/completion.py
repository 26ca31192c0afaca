"""Completions for the prompt: names, attributes, and the fields of a VMCB within quotes."""

from __future__ import annotations

import builtins
import keyword
import re
import rlcompleter
from collections.abc import Iterator
from functools import cache
from typing import Any, Final

from harness.svm.intercepts import Intercept
from harness.svm.vmcb import vmcb_control_area, vmcb_save_area, vmcb_seg
from harness.svm.vmcb_text import EXCEPTIONS, FIELD_BITS

_IN_VMCB: Final = re.compile(
    r"""(?:\bvmcb\[|vmcb=\{(?:[^{}]*,)?\s*|\bvmcb\.update\(\{.*)["'][\w.]*$"""
)

_MOST: Final = 200


def complete(names: dict[str, Any], text: str, line: str) -> list[str]:
    """Return what `text`, the end of `line`, may be completed to; sorted.

    Args:
        names: what is known by name.
        text: the word before the cursor.
        line: all before the cursor.

    """
    if _IN_VMCB.search(line):
        found = {name for name in vmcb_names() if name.startswith(text)}
        # The bits of a field once its name is there.
        return sorted(name for name in found if name.rpartition(".")[0] not in found)
    if "." not in text:
        # Without a parenthesis behind it: what is no function yet may become one.
        known = {*names, *dir(builtins), *keyword.kwlist}
        return sorted(name for name in known if name.startswith(text) and name[:2] != "__")
    completer = rlcompleter.Completer(names)
    return sorted(set(_all_matches(completer, text)))


def _all_matches(completer: rlcompleter.Completer, text: str) -> Iterator[str]:
    for state in range(_MOST):
        found = completer.complete(text, state)
        if found is None:
            return
        yield found


@cache
def vmcb_names() -> tuple[str, ...]:
    """Return the short names of a VMCB's fields as `VmcbView` takes them, and those of bits."""
    names = [f"intercept.{bit.name.removeprefix('INTERCEPT_').lower()}" for bit in Intercept]
    names += [f"intercept.excp.{vector}" for vector in range(EXCEPTIONS)]
    for area in (vmcb_control_area, vmcb_save_area):
        for entry in area._fields_:
            if entry[0].startswith("reserved") or entry[0] in ("intercepts", "insn_bytes"):
                continue
            parts = [part[0] for part in vmcb_seg._fields_] if entry[1] is vmcb_seg else []
            names += [f"{entry[0]}.{part}" for part in parts] or [entry[0]]
    return tuple(with_bits for name in names for with_bits in _with_bits(name))


def _with_bits(name: str) -> list[str]:
    register = FIELD_BITS.get(name.rpartition(".")[2])
    return [name, *(f"{name}.{bit}" for bit in (register.fields() if register else ()))]
