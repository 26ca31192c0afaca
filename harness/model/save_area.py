"""The state save area in SMRAM: what an SMI writes there and how RSM reads it back.

APM vol. 2, 10.2.3 SMRAM State-Save Area. Source: `enter_smm_save_state_64()`, `_32()`,
`rsm_load_state_64()`, `_32()`.
"""

from __future__ import annotations

from typing import Final

from harness.model.areas import SEGMENTS, SMRAM_32, SMRAM_64
from harness.model.knobs import Knobs
from harness.model.memory import UNKNOWN
from harness.model.state import State
from harness.svm.smram import (
    DEFAULT_SMBASE,
    SMM_REVISION_32,
    SMM_REVISION_64,
    SMRAM_GPRS,
    SMRAM_STATE_OFFSET,
)
from harness.svm.vmcb import IntState, SegAttrib

SIZE_BYTES: Final = 512

_LOW: Final = 0xFFFF_FFFF
_RFLAGS_FIXED: Final = 2
MOST_BYTES: Final = 0xF_FFFF
"""The largest limit that a descriptor without G has."""
_SHADOW_STI_AND_MOV_SS: Final = 3
"""KVM_X86_SHADOW_INT_STI and KVM_X86_SHADOW_INT_MOV_SS: SVM cannot tell one from the other."""
_SYSTEM_SEGMENTS: Final = ("fs", "gs", "ldtr", "tr")
GPRS_32: Final = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi")
"""The registers in `kvm_smram_state_32.gprs`, by index."""
_HELD: Final = ("rax", "rbx", "rcx", "rdx", "rsp")
"""The general registers that the model holds; the others are 0 all the time."""


def _gpr(s: State, name: str) -> int:
    return s.regs[name] if name in _HELD else 0


def attributes_of(attrib: int) -> int:
    """Return a segment's attributes as SMRAM packs them, from those of the VMCB."""
    return attrib & 0xFF | (attrib & 0xF00) << 4


def attrib_of(attributes: int) -> int:
    """Return a segment's attributes as the VMCB packs them, from those of SMRAM."""
    return attributes & 0xFF | attributes >> 4 & 0xF00


def save_64(s: State) -> dict[str, int]:
    """Return the fields of the 64-bit save area for the current context; the rest is 0."""
    regs = s.regs
    area = {name: regs[name] for name in ("cr0", "cr3", "cr4", "efer", "dr6", "rflags", "rip")}
    area |= {f"gprs.{index}": _gpr(s, name) for index, name in enumerate(SMRAM_GPRS)}
    area |= {
        "dr7": regs["arch_dr7"],
        "smbase": DEFAULT_SMBASE,
        "smm_revison": SMM_REVISION_64,
        "int_shadow": _shadow(s),
    }
    for name in SEGMENTS:
        area |= {f"{name}.{part}": regs[f"{name}.{part}"] for part in ("selector", "limit", "base")}
        attrib = regs[f"{name}.attrib"]
        area[f"{name}.attributes"] = UNKNOWN if attrib == UNKNOWN else attributes_of(attrib)
    for name in ("gdtr", "idtr"):
        area |= {f"{name}.{part}": regs[f"{name}.{part}"] for part in ("limit", "base")}
    parts = ("selector", "attributes", "limit", "base")
    return area | {f"{name}.{part}": UNKNOWN for name in _SYSTEM_SEGMENTS for part in parts}


def save_32(s: State) -> dict[str, int]:
    """Return the fields of the 32-bit save area, which has neither EFER nor SVM's fields."""
    regs = s.regs
    area = {name: regs[name] for name in ("cr0", "cr3", "cr4", "dr6")}
    area |= {f"gprs.{index}": _gpr(s, name) for index, name in enumerate(GPRS_32)}
    area |= {
        "dr7": regs["arch_dr7"],
        "eflags": regs["rflags"],
        "eip": regs["rip"],
        "smbase": DEFAULT_SMBASE,
        "smm_revision": SMM_REVISION_32,
        "int_shadow": _shadow(s),
    }
    for name in SEGMENTS:
        area[f"{name}_sel"] = regs[f"{name}.selector"]
        area |= {f"{name}.{part}": regs[f"{name}.{part}"] for part in ("limit", "base")}
        attrib = regs[f"{name}.attrib"]
        area[f"{name}.flags"] = UNKNOWN if attrib == UNKNOWN else attributes_of(attrib) << 8
    for name in ("gdtr", "idtr"):
        area |= {f"{name}.{part}": regs[f"{name}.{part}"] for part in ("limit", "base")}
    for name in _SYSTEM_SEGMENTS:
        area |= {f"{name}.{part}": UNKNOWN for part in ("flags", "limit", "base")}
        area[f"{name}_sel"] = UNKNOWN
    return area


def _shadow(s: State) -> int:
    if not s.knobs.intr_shadow_in_smram:
        return 0
    if not s.guest_mode:
        return _SHADOW_STI_AND_MOV_SS if s.l1_shadow else 0
    shadow = IntState(s.l2_int_state).INTERRUPT_SHADOW
    return _SHADOW_STI_AND_MOV_SS if shadow else 0


def write(s: State, image: dict[str, int]) -> None:
    """Write a whole save area; its other bytes become 0."""
    area = SMRAM_64 if s.facts.lm else SMRAM_32
    s.memory.clear("smram", SMRAM_STATE_OFFSET, SIZE_BYTES)
    narrow = {name: value for name, value in image.items() if value != UNKNOWN}
    s.memory.write_slot_fields("smram", area, narrow, SMRAM_STATE_OFFSET)
    s.memory.forget("smram", area, set(image) - set(narrow), SMRAM_STATE_OFFSET)
    s.smram_is_64 = s.facts.lm


def read_64(s: State) -> dict[str, int]:
    """Return the fields of the 64-bit save area."""
    return s.memory.slot_fields("smram", SMRAM_64, offset=SMRAM_STATE_OFFSET)


def read_32(s: State) -> dict[str, int]:
    """Return the fields of the 32-bit save area."""
    return s.memory.slot_fields("smram", SMRAM_32, offset=SMRAM_STATE_OFFSET)


def read(s: State) -> dict[str, int]:
    """Return the fields of the save area in the form that the guest's CPU has."""
    return read_64(s) if s.facts.lm else read_32(s)


def load_segments_64(s: State, image: dict[str, int]) -> None:
    """Load ES, CS, SS and DS, and with SS the CPL."""
    for name in SEGMENTS:
        attributes = image[f"{name}.attributes"]
        attrib = UNKNOWN if attributes == UNKNOWN else attrib_of(attributes)
        s.regs |= {f"{name}.{part}": image[f"{name}.{part}"] for part in ("selector", "base")}
        s.regs |= {
            f"{name}.limit": loaded_limit(image[f"{name}.limit"], attrib, s.knobs),
            f"{name}.attrib": attrib,
        }
    s.regs["cpl"] = s.regs["ss.attrib"] >> 5 & 3


def load_segments_32(s: State, image: dict[str, int]) -> None:
    """Load ES, CS, SS and DS of the legacy form, and with SS the CPL."""
    packed = {f"{name}.attributes": image[f"{name}.flags"] >> 8 & 0xFFFF for name in SEGMENTS}
    selectors = {f"{name}.selector": image[f"{name}_sel"] & 0xFFFF for name in SEGMENTS}
    load_segments_64(s, {**image, **packed, **selectors})


def loaded_limit(saved: int, attrib: int, knobs: Knobs) -> int:
    """Return a segment's limit as RSM loads it."""
    if knobs.rsm_limits == "as saved" or saved == UNKNOWN:
        return saved
    if attrib == UNKNOWN:
        return UNKNOWN
    kept = saved & MOST_BYTES
    return kept << 12 | 0xFFF if SegAttrib(attrib).G else kept


def loaded_rip(saved: int, knobs: Knobs) -> int:
    """Return RIP as RSM loads it from the 64-bit save area; the handler is in real mode."""
    return saved if knobs.rsm_updates_mode or saved == UNKNOWN else saved & _LOW


def loaded_rflags(saved: int, knobs: Knobs) -> int:
    """Return RFLAGS as RSM loads it from the 64-bit save area."""
    if saved == UNKNOWN:
        return UNKNOWN
    taken = saved & _LOW if knobs.rsm_rflags == "32 bits" else saved
    return taken | _RFLAGS_FIXED


def load_gprs_64(s: State, image: dict[str, int]) -> None:
    """Load the general registers that the model holds."""
    s.regs |= {name: image[f"gprs.{SMRAM_GPRS.index(name)}"] for name in _HELD}


def load_gprs_32(s: State, image: dict[str, int]) -> None:
    """Load the general registers that the model holds; their high halves become 0."""
    for name in _HELD:
        value = image[f"gprs.{GPRS_32.index(name)}"]
        s.regs[name] = value if value == UNKNOWN else value & _LOW
