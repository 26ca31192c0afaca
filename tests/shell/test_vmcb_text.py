"""How values look at the prompt."""

import ctypes

import pytest

from harness.shell.show import block_of, text_of, vmcb_difference, vmcb_text
from harness.svm.intercepts import Intercept, InterceptWord
from harness.svm.msrs import Cr0, Efer
from harness.svm.vmcb import SegAttrib, vmcb
from harness.svm.vmcb_text import vmcb_rows
from kvm_ioctl.asm_kvm import kvm_regs


@pytest.fixture
def block():
    block = vmcb()
    block.control.set_intercept(Intercept.INTERCEPT_VMMCALL)
    block.control.intercepts[InterceptWord.INTERCEPT_EXCEPTION] = 1 << 14
    block.control.int_ctl = 1 << 24 | 5 | 1 << 30 | 1 << 29
    block.control.exit_code = 0x400
    block.save.efer = Efer.of(SVME=1, LMA=1)
    block.save.cs.attrib = SegAttrib.of(P=1, TYPE=0xB)
    block.save.rip = 0x1234
    return block


def test_what_is_not_zero_is_shown_with_its_bits(block):
    assert vmcb_text(block).splitlines() == [
        "control",
        "  intercepts          excp.14 vmmcall",
        "  int_ctl             0x61000005  X2AVIC_ENABLE V_INTR_MASKING V_TPR=0x5 rest=0x20000000",
        "  exit_code           0x400  SVM_EXIT_NPF",
        "save",
        "  cs                  0x0000 base=0x0 limit=0x0 attrib=0x08b (P TYPE=0xb)",
        "  efer                0x1400  SVME LMA",
        "  rip                 0x1234",
    ]


def test_a_zero_vmcb_shows_nothing():
    assert vmcb_text(vmcb()) == "control\nsave"


@pytest.mark.parametrize("area", ["control", "save"])
def test_every_byte_of_both_areas_shows(area):
    size = ctypes.sizeof(getattr(vmcb(), area))
    silent = []
    for offset in range(size):
        block = vmcb()
        data = bytearray(size)
        data[offset] = 1
        ctypes.memmove(ctypes.addressof(getattr(block, area)), bytes(data), size)
        if all(zero for _, _, zero in vmcb_rows(block)[area]):
            silent.append(hex(offset))
    assert silent == []


def test_only_what_differs_is_in_a_difference(block):
    other = block.copy()
    assert vmcb_difference(block, other) == "no difference"
    other.save.rip += 2
    other.control.set_intercept(Intercept.INTERCEPT_VMMCALL, False)
    assert vmcb_difference(block, other).split("\n") == [
        "control.intercepts          excp.14 vmmcall  ->  excp.14",
        "save.rip                    0x1234  ->  0x1236",
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (7, "7"),
        (255, "0xff"),
        (-1, "-1"),
        (True, "True"),
        ("a", "'a'"),
        ({"rax": 16, "rbx": 1}, "rax=0x10 rbx=1"),
        ({1: 16}, "{1: 16}"),
        ([16], "[16]"),
        ([], "[]"),
        (Cr0.of(PG=1, PE=1), "0x80000001  PG PE"),
        (
            kvm_regs(rip=16, rflags=2),
            "kvm_regs:\n  rip                 0x10\n  rflags              2",
        ),
    ],
)
def test_other_values(value, text):
    assert text_of(value) == text


def test_what_has_no_vmcb_has_none(block):
    assert block_of(block) is block
    assert block_of(kvm_regs()) is None
