import ctypes
import re
import shutil
import subprocess

import pytest

from guest_images.proxy_header import code_table, proxy_constants
from harness.proxy import layout
from harness.proxy.ops import (
    ARGUMENT_REGISTERS,
    INSTRUCTIONS,
    MAX_CODE_BYTES,
    OPCODES,
    PAIR,
    Control,
    OpFlag,
    instruction,
)
from harness.proxy.program import OP_SIZE
from harness.svm.smram import SMM_ENTRY_OFFSET, SMRAM_STATE_OFFSET


def test_opcodes_and_control_operations_are_apart():
    assert len(OPCODES) == len(INSTRUCTIONS) < min(Control)


@pytest.mark.parametrize("line", INSTRUCTIONS, ids=lambda line: line.name)
def test_line_fits_its_slot_and_names_registers(line):
    assert 0 < len(line.code) <= MAX_CODE_BYTES
    assert set(line.inputs) <= set(ARGUMENT_REGISTERS)
    assert line.value in (None, "rax", PAIR)


@pytest.mark.abi
def test_code_is_what_the_assembler_makes_of_the_text(tmp_path):
    if shutil.which("as") is None or shutil.which("objdump") is None:
        pytest.skip("no binutils")
    source = "".join(f"code_{line.name}:\n{line.text}\n.balign 16, 0xcc\n" for line in INSTRUCTIONS)
    (tmp_path / "all.s").write_text(source)
    subprocess.run(["as", "-o", "all.o", "all.s"], cwd=tmp_path, check=True, timeout=60)
    subprocess.run(
        ["objcopy", "-O", "binary", "-j", ".text", "all.o", "all.bin"],
        cwd=tmp_path,
        check=True,
        timeout=60,
    )
    made = (tmp_path / "all.bin").read_bytes()
    for i, line in enumerate(INSTRUCTIONS):
        slot = made[16 * i : 16 * (i + 1)]
        assert slot.startswith(line.code), f"{line.name}: {slot.hex(' ')}"
        assert set(slot[len(line.code) :]) <= {0xCC}, f"{line.name}: {slot.hex(' ')}"


def test_code_table_has_every_line_in_order():
    slots = code_table().removeprefix("#define PROXY_CODE_TABLE ").split(";")
    codes = [bytes(int(b, 16) for b in re.findall(r"0x[0-9a-f]{2}", slot)) for slot in slots]
    assert codes == [line.code for line in INSTRUCTIONS]


def test_header_defines_every_opcode_once():
    text = "".join(proxy_constants())
    names = re.findall(r"#define (\w+)", text)
    assert len(names) == len(set(names))
    assert {f"OP_{name}" for name in [*OPCODES, *Control.__members__]} <= set(names)


def test_the_layout_of_an_instance_has_no_overlaps():
    assert ctypes.sizeof(layout.proxy_instance) <= layout.IDT_OFFSET
    assert layout.CODE_OFFSET == layout.SMM_ENTRY == SMM_ENTRY_OFFSET
    assert layout.SCRATCH_OFFSET + layout.SCRATCH_SIZE <= SMRAM_STATE_OFFSET
    assert layout.OPS_PER_PAGE * OP_SIZE == layout.RESULTS_OFFSET - layout.PROGRAM_OFFSET


def test_call_fills_registers_and_refuses_others():
    op = instruction("WRMSR")(rcx=0x10, rax=1)
    assert dict(zip(ARGUMENT_REGISTERS, op.args, strict=True))["rcx"] == 0x10
    with pytest.raises(TypeError, match="r15 is no argument register"):
        instruction("WRMSR")(r15=1)


def test_user_adds_the_flag_and_nothing_else():
    op = instruction("CLI")()
    assert op.user.flags == OpFlag.USER
    assert (op.user.opcode, op.user.args) == (op.opcode, op.args)
    assert str(op.user) == "CLI()@CPL3"
