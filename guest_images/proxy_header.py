"""The part of the guests' C header that proxies need."""

from __future__ import annotations

import ctypes

from harness.proxy import layout, ops
from harness.svm.cheader import c_defines, c_enum


def proxy_constants() -> list[str]:
    """Return opcodes, flags, layout and the code table."""
    flags = {
        f"{prefix}_{flag.name}": flag.value
        for prefix, kind in (
            ("OP", ops.OpFlag),
            ("LOOP", ops.LoopFlag),
            ("WAIT", ops.WaitFlag),
            ("ENTER", ops.EnterFlag),
        )
        for flag in kind
    }
    return [
        c_defines(layout.header_constants()),
        c_defines({"PROXY_INSTRUCTIONS": len(ops.INSTRUCTIONS)}),
        c_defines(flags),
        c_enum(ops.Control, "OP_"),
        c_defines({f"OP_{name}": opcode for name, opcode in ops.OPCODES.items()}),
        c_enum(ops.Policy, "POLICY_"),
        c_enum(ops.Status, "RESULT_"),
        c_enum(layout.Report, "REPORT_"),
        c_enum(layout.Eoi, "EOI_"),
        code_table(),
    ]


def code_table() -> str:
    """Return one macro that expands to a `code_slot` per instruction, for the assembler."""
    slots = "; ".join(
        "code_slot " + ", ".join(f"{byte:#04x}" for byte in line.code) for line in ops.INSTRUCTIONS
    )
    return f"#define PROXY_CODE_TABLE {slots}\n"


def proxy_structs() -> list[type[ctypes.Structure]]:
    """Return the structs that a proxy shares with Python."""
    return [
        layout.proxy_op,
        layout.proxy_result,
        layout.proxy_gprs,
        layout.proxy_fault,
        layout.proxy_instance,
    ]
