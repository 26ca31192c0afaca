"""The save area against registers: one byte more or less is told by the field's name."""

import pytest

from harness.svm.smram import kvm_smram_state_32, kvm_smram_state_64
from harness.tamper.interrupted import difference, fields_of, flags_of
from kvm_ioctl.asm_kvm import kvm_segment

BYTES = 512


@pytest.mark.parametrize("kind", [kvm_smram_state_64, kvm_smram_state_32])
def test_every_byte_belongs_to_a_field(kind):
    nothing = kind.from_bytes(bytes(BYTES))
    assert difference(nothing, {}) == []
    for at in range(BYTES):
        data = bytearray(BYTES)
        data[at] = 1
        assert len(difference(kind.from_bytes(data), {})) == 1


def test_a_field_is_told_by_its_name_with_both_values():
    area = kvm_smram_state_64.from_bytes(bytes(BYTES))
    area.cs.base = 0x1000
    area.gprs[3] = 7
    assert difference(area, {"cs.base": 0x1000}) == ["gprs.3: 0x7, not 0x0"]
    assert fields_of(area)["cs.base"] == 0x1000


def test_a_name_that_is_none_is_told():
    area = kvm_smram_state_64.from_bytes(bytes(BYTES))
    assert difference(area, {"cs.bass": 0}) == ["no field cs.bass"]


def test_flags_are_a_descriptors_second_half():
    code = kvm_segment(type=11, s=1, present=1, l=1, g=1)
    assert flags_of(code) == 0xA0_9B00
