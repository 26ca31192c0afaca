import ctypes
import shutil
import subprocess

import pytest

from harness.svm.cheader import c_bits, c_enum, c_header, c_struct, svm_constants, svm_structs
from harness.svm.exit_codes import ExitCode
from harness.svm.msrs import Efer
from harness.svm.vmcb import vmcb_save_area


class sample(ctypes.Structure):
    _fields_ = (("a", ctypes.c_uint32), ("b", ctypes.c_uint8 * 4), ("c", ctypes.c_uint64))


def test_constants_have_no_suffix():
    assert "#define SVM_EXIT_VMMCALL 0x81\n" in c_enum(ExitCode)
    text = c_bits("EFER", Efer)
    assert "#define EFER_SVME 0x1000\n#define EFER_SVME_SHIFT 0xc\n" in text


def test_every_field_is_declared_and_asserted():
    text = c_struct(vmcb_save_area)
    for name, *_ in vmcb_save_area._fields_:
        offset = getattr(vmcb_save_area, name).offset
        assert f"offsetof(struct vmcb_save_area, {name}) == {offset:#x}," in text


def test_a_type_without_counterpart_is_refused():
    class odd(ctypes.Structure):
        _fields_ = (("x", ctypes.c_double),)

    with pytest.raises(TypeError, match="no C type for"):
        c_struct(odd)


def test_a_guard_is_an_identifier():
    with pytest.raises(ValueError, match="no C identifier"):
        c_header("a b", [], [])


def compile_c(text, *options):
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler (cc) in PATH")
    command = [compiler, "-c", "-o", "/dev/null", "-Wall", "-Wextra", "-Werror", *options, "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=60)


def test_header_compiles_as_c_and_as_assembly():
    header = c_header("SVM_TEST_H", svm_constants(), svm_structs())
    c = compile_c(header + 'const char *s = "x";\n', "-x", "c")
    assert c.returncode == 0, c.stderr
    program = header + "\t.quad VMEXIT_INVALID, EFER_SVME, SVM_EXIT_SW\n"
    assembled = compile_c(program, "-x", "assembler-with-cpp")
    assert assembled.returncode == 0, assembled.stderr


def test_a_layout_that_differs_does_not_compile():
    text = c_header("SAMPLE_H", [], [sample])
    assert compile_c(text, "-x", "c").returncode == 0
    moved = text.replace("\tu32 a;\n\tu8 b[4];\n", "\tu8 b[4];\n\tu32 a;\n")
    assert moved != text
    result = compile_c(moved, "-x", "c")
    assert result.returncode != 0
    assert "offsetof(struct sample, a)" in result.stderr
