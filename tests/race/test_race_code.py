"""The listings: their bytes are what their text assembles to."""

import ctypes
import re
import subprocess

import pytest

from harness.host.compiler import Compiler, CompilerError
from harness.race import code
from harness.race.code import RECORD_SIZE, assembly, machine_code, race_control, race_record
from harness.svm.vmcb import VMCB_SIZE
from kvm_ioctl.cstruct import field_names

LISTINGS = {"LOOP": code.LOOP, "WRITER": code.WRITER, "L2": code.L2}


@pytest.fixture(scope="module")
def compiler():
    try:
        return Compiler()
    except CompilerError as e:
        pytest.skip(str(e))


def assembled(compiler, text, tmp_path):
    """Return the bytes of `text`; objcopy takes them out of the object file."""
    offsets = [
        f".set {name.upper()}, {getattr(race_control, name).offset}"
        for name in field_names(race_control)
    ]
    source = tmp_path / "code.s"
    source.write_text("\n".join([".intel_syntax noprefix", *offsets, text, ""]))
    compiler.run(["-c", "-m64", str(source), "-o", "code.o"], tmp_path, "the listing")
    subprocess.run(
        ["objcopy", "-O", "binary", "-j", ".text", "code.o", "code.bin"],
        cwd=tmp_path,
        check=True,
        timeout=30,
    )
    return (tmp_path / "code.bin").read_bytes()


@pytest.mark.parametrize("name", LISTINGS)
def test_bytes_are_what_the_text_assembles_to(compiler, name, tmp_path):
    listing = LISTINGS[name]
    assert machine_code(listing).hex() == assembled(compiler, assembly(listing), tmp_path).hex()


@pytest.mark.parametrize("name", LISTINGS)
def test_every_line_is_bytes_and_text_or_a_label(name):
    for line in LISTINGS[name].strip().splitlines():
        assert re.fullmatch(r"(([0-9a-f]{2})+ +\S.*|  +\w+:)", line), line


def test_the_loop_restores_what_its_caller_needs():
    # push rbx, r12, r15 and pop them in the opposite order, ret
    assert machine_code(code.LOOP).startswith(bytes.fromhex("5341544157"))
    assert machine_code(code.LOOP).endswith(bytes.fromhex("415f415c5bc3"))
    assert machine_code(code.WRITER).startswith(bytes.fromhex("5341544156"))
    assert machine_code(code.WRITER).endswith(bytes.fromhex("415e415c5bc3"))


def test_a_record_fits_behind_its_vmcb():
    assert ctypes.sizeof(race_record) <= RECORD_SIZE - VMCB_SIZE
