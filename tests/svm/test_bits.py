import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.svm.bits import Bits, bits
from harness.svm.msrs import Efer
from harness.svm.vmcb import IntCtl


class Sample(Bits):
    HIGH = bits(31)
    MIDDLE = bits(19, 16)
    LOW = bits(7, 0)


def test_fields_read_as_the_manual_places_them():
    value = IntCtl(0x0105_0312)
    assert (value.V_TPR, value.V_IRQ, value.V_GIF, value.V_INTR_PRIO) == (0x12, 1, 1, 5)
    assert value.V_INTR_MASKING == 1


def test_a_register_is_an_int():
    assert Efer.of(SVME=1, LME=1) == 1 << 12 | 1 << 8
    assert isinstance(Efer(1) | 2, int)


@given(st.integers(0, 2**64 - 1), st.integers(0, 15))
def test_replace_changes_only_its_field(register, value):
    changed = Sample(register).replace(MIDDLE=value)
    assert value == changed.MIDDLE
    assert changed & ~Sample.MIDDLE.mask == register & ~Sample.MIDDLE.mask


@given(st.integers(0, 2**32 - 1))
def test_repr_accounts_for_every_bit(register):
    shown = repr(Sample(register))
    total = sum(
        int(text.split("=")[1], 16) << (Sample.fields()[name].lo if name in Sample.fields() else 0)
        for text in shown.removeprefix("Sample(").removesuffix(")").split(", ")
        if text
        for name in [text.split("=")[0]]
    )
    assert total == register


def test_a_value_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="MIDDLE: 0x10 does not fit bits 19:16"):
        Sample.of(MIDDLE=16)


def test_an_unknown_field_is_refused():
    with pytest.raises(ValueError, match="Sample has no field NOPE"):
        Sample.of(NOPE=1)


def test_the_high_bit_comes_first():
    with pytest.raises(ValueError, match="high bit comes first"):
        bits(0, 7)
