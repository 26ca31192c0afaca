"""The registers that an RSM which succeeds leaves behind, as the ioctls give them.

Source: `rsm_load_state_64()`, `rsm_load_state_32()`, `svm_set_segment()`, `svm_get_segment()`.
"""

from __future__ import annotations

from typing import Final

from harness.model import save_area
from harness.model.knobs import Knobs
from harness.model.memory import UNKNOWN
from harness.model.state import State
from harness.svm.smram import SMRAM_GPRS
from harness.svm.vmcb import SegAttrib

SEGMENTS: Final = ("es", "cs", "ss", "ds", "fs", "gs", "ldtr", "tr")
_DATA: Final = ("es", "ds", "fs", "gs")
_LIMIT_OF_TABLE: Final = 0xFFFF
_RFLAGS_FIXED: Final = 2
_SHADOW: Final = 3
"""KVM_X86_SHADOW_INT_STI and KVM_X86_SHADOW_INT_MOV_SS."""


def after_64(s: State, image: dict[str, int]) -> dict[str, int]:
    """Return the registers after RSM from a 64-bit save area, by their names there."""
    after = {name: image[f"gprs.{index}"] for index, name in enumerate(SMRAM_GPRS)}
    after["rip"] = save_area.loaded_rip(image["rip"], s.knobs)
    after |= {"rflags": save_area.loaded_rflags(image["rflags"], s.knobs)}
    for name in SEGMENTS:
        after |= _segment(name, image, image[f"{name}.selector"], s.knobs)
    return _known(after | _tables(image) | _others(s, image))


def after_32(s: State, image: dict[str, int]) -> dict[str, int]:
    """Return the registers after RSM from a legacy save area, by their names in the 64-bit one."""
    names = save_area.GPRS_32
    after = {name: image[f"gprs.{index}"] for index, name in enumerate(names)}
    after |= {"rip": image["eip"], "rflags": image["eflags"] | _RFLAGS_FIXED}
    for name in SEGMENTS:
        flags = image[f"{name}.flags"]
        packed = UNKNOWN if flags == UNKNOWN else flags >> 8 & 0xFFFF
        area = {**image, f"{name}.attributes": packed}
        selector = image[f"{name}_sel"]
        after |= _segment(
            name, area, selector & 0xFFFF if selector != UNKNOWN else UNKNOWN, s.knobs
        )
    return _known(after | _tables(image) | _others(s, image))


def _known(after: dict[str, int]) -> dict[str, int]:
    return {f"after.{name}": value for name, value in after.items() if value != UNKNOWN}


def _tables(image: dict[str, int]) -> dict[str, int]:
    tables = {}
    for name in ("gdtr", "idtr"):
        size = image[f"{name}.limit"]
        tables[f"{name}.limit"] = UNKNOWN if size == UNKNOWN else size & _LIMIT_OF_TABLE
        tables[f"{name}.base"] = image[f"{name}.base"]
    return tables


def _others(s: State, image: dict[str, int]) -> dict[str, int]:
    others = {"dr6": s.regs["dr6"], "dr7": s.regs["arch_dr7"], "smbase": image["smbase"]}
    if s.knobs.intr_shadow_in_smram:
        others["int_shadow"] = _SHADOW if image["int_shadow"] else 0
    return others


def _segment(name: str, image: dict[str, int], selector: int, knobs: Knobs) -> dict[str, int]:
    attributes = image[f"{name}.attributes"]
    attrib = UNKNOWN if attributes == UNKNOWN else save_area.attrib_of(attributes)
    size = save_area.loaded_limit(image[f"{name}.limit"], attrib, knobs)
    return {
        f"{name}.selector": selector,
        f"{name}.base": image[f"{name}.base"],
        f"{name}.limit": size,
        f"{name}.attrib": UNKNOWN if UNKNOWN in (attrib, size) else _shown(name, attrib, size),
    }


def _shown(name: str, attrib: int, size: int) -> int:
    """Return attributes as KVM_GET_SREGS has them, which mends some."""
    bits = SegAttrib(attrib).replace(G=int(size > save_area.MOST_BYTES))
    if name == "tr":
        return int(bits) | 2
    if name in _DATA and bits.P:
        return int(bits) | 1
    if name == "ss" and not bits.P:
        return int(bits.replace(DB=0))
    return int(bits)
