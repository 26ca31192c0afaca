"""Generates C declarations for guest code from the Python ones, with the layout asserted."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterable, Mapping
from enum import IntEnum
from typing import Any

from harness.svm import cpuid, exit_codes, intercepts, msrs, vmcb
from harness.svm.bits import Bits

_SCALARS: dict[Any, str] = {
    ctypes.c_uint8: "u8",
    ctypes.c_uint16: "u16",
    ctypes.c_uint32: "u32",
    ctypes.c_uint64: "u64",
}

_STRUCTS = (vmcb.vmcb_control_area, vmcb.vmcb_seg, vmcb.vmcb_save_area, vmcb.vmcb)

_REGISTERS: dict[str, type[Bits]] = {
    "EFER": msrs.Efer,
    "VM_CR": msrs.VmCr,
    "CR0": msrs.Cr0,
    "CR4": msrs.Cr4,
    "INT_CTL": vmcb.IntCtl,
    "INT_STATE": vmcb.IntState,
    "NESTED_CTL": vmcb.NestedCtl,
    "VIRT_EXT": vmcb.VirtExt,
    "EVENT_INJ": vmcb.EventInj,
    "CLEAN": vmcb.Clean,
    "SEG_ATTRIB": vmcb.SegAttrib,
    "CPUID_8000_0001_ECX": cpuid.ExtendedFeaturesEcx,
    "CPUID_8000_000A_EDX": cpuid.SvmFeaturesEdx,
}


def c_defines(values: Mapping[str, int]) -> str:
    """Return one `#define` per name; no suffix, so that the assembler reads them too."""
    return "".join(f"#define {name} {value:#x}\n" for name, value in values.items())


def c_enum(enum: type[IntEnum], prefix: str = "") -> str:
    """Return one `#define` per member."""
    return c_defines({f"{prefix}{member.name}": int(member) for member in enum})


def c_bits(prefix: str, register: type[Bits]) -> str:
    """Return `PREFIX_FIELD_SHIFT` and the in-place `PREFIX_FIELD` mask of each field."""
    values: dict[str, int] = {}
    for name, field in register.fields().items():
        values[f"{prefix}_{name}"] = field.mask
        values[f"{prefix}_{name}_SHIFT"] = field.lo
    return c_defines(values)


def c_struct(struct: type[ctypes.Structure]) -> str:
    """Return the struct's C declaration and `_Static_assert`s of its size and every offset.

    Raises TypeError: a field's type has no C counterpart here.
    """
    name = struct.__name__
    fields = list(struct._fields_)
    members = "".join(f"\t{_member(f[0], f[1])};\n" for f in fields)
    checks = "".join(
        _static_assert(f"__builtin_offsetof(struct {name}, {f[0]})", getattr(struct, f[0]).offset)
        for f in fields
    )
    checks += _static_assert(f"sizeof(struct {name})", ctypes.sizeof(struct))
    return f"struct {name} {{\n{members}}} __attribute__((packed));\n{checks}"


def _static_assert(expression: str, value: int) -> str:
    return f'_Static_assert({expression} == {value:#x}, "{expression}");\n'


def _member(name: str, kind: Any) -> str:
    if isinstance(kind, type) and issubclass(kind, ctypes.Array):
        return f"{_type_name(kind._type_)} {name}[{kind._length_}]"
    return f"{_type_name(kind)} {name}"


def _type_name(kind: Any) -> str:
    if kind in _SCALARS:
        return _SCALARS[kind]
    if isinstance(kind, type) and issubclass(kind, ctypes.Structure):
        return f"struct {kind.__name__}"
    raise TypeError(f"no C type for {kind!r}")


def c_header(guard: str, constants: Iterable[str], structs: Iterable[type[Any]]) -> str:
    """Return a header usable from C and assembly: constants for both, structs for C only.

    Raises ValueError: `guard` is not a C identifier.
    """
    if not re.fullmatch(r"[A-Za-z_]\w*", guard):
        raise ValueError(f"{guard!r} is no C identifier")
    return (
        f"/* Generated; the Python declarations are the source. */\n"
        f"#ifndef {guard}\n#define {guard}\n\n"
        + "\n".join(constants)
        + "\n#ifndef __ASSEMBLER__\n"
        + "typedef unsigned char u8;\ntypedef unsigned short u16;\n"
        + "typedef unsigned int u32;\ntypedef unsigned long long u64;\n\n"
        + "\n".join(c_struct(s) for s in structs)
        + "#endif\n#endif\n"
    )


def svm_constants() -> list[str]:
    """Return the C constants of this package: exit codes, MSRs, intercepts, register bits."""
    blocks = [
        c_enum(exit_codes.ExitCode),
        c_defines({"VMEXIT_INVALID": exit_codes.VMEXIT_INVALID}),
        c_enum(msrs.Msr),
        c_enum(intercepts.InterceptWord),
        c_enum(intercepts.Intercept),
        c_enum(cpuid.Leaf, "CPUID_LEAF_"),
        c_defines({"VMCB_SIZE": vmcb.VMCB_SIZE, "MSRPM_SIZE": vmcb.MSRPM_SIZE}),
    ]
    return blocks + [c_bits(prefix, register) for prefix, register in _REGISTERS.items()]


def svm_structs() -> tuple[type[ctypes.Structure], ...]:
    """Return the structs that guests share with the CPU, in order of use."""
    return _STRUCTS
