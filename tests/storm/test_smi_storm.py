"""What in a save area cannot be of the level that it is said to be of."""

from types import SimpleNamespace

import pytest

from harness.proxy.layout import INSTANCE_SIZE
from harness.storm.smi import Smi, levels_hit
from harness.storm.smi_storm import wrong_in_save_area
from harness.svm.msrs import Cr0, Efer
from harness.svm.smram import DEFAULT_SMBASE, SMRAM_GPRS, kvm_smram_state_64

L1, L2 = 0x24_0000, 0x25_0000
CR3 = {1: 0x1000, 2: 0x2000}
SVME_OFF, SVME_ON = Efer.of(LME=1, LMA=1), Efer.of(LME=1, LMA=1, SVME=1)


def handler(depth, **changed):
    """An SMI handler whose save area is of a level of this depth, but for what is changed."""
    levels = [
        SimpleNamespace(
            depth=n, name=f"L{n}", tables=SimpleNamespace(root=CR3[n]),
            instance=SimpleNamespace(gpa=gpa),
        )
        for n, gpa in ((1, L1), (2, L2))
    ]  # fmt: skip
    area = kvm_smram_state_64(
        cr3=CR3[depth], svm_guest_flag=depth - 1, svm_guest_vmcb_gpa=0x7000 * (depth - 1),
        efer=SVME_ON, cr0=Cr0.of(PE=1, PG=1), rip=0x10_1000, rflags=2, smbase=DEFAULT_SMBASE,
    )  # fmt: skip
    area.gprs[SMRAM_GPRS.index("rsp")] = levels[depth - 1].instance.gpa + INSTANCE_SIZE
    for name, value in changed.items():
        if name == "rsp":
            area.gprs[SMRAM_GPRS.index("rsp")] = value
        else:
            setattr(area, name, value)
    return SimpleNamespace(
        save_area=area, smbase=DEFAULT_SMBASE, cpu=SimpleNamespace(levels=lambda: iter(levels))
    )


@pytest.mark.parametrize("depth", [1, 2])
def test_a_good_save_area_has_nothing_wrong(depth):
    assert wrong_in_save_area(handler(depth)) == []


def test_l1_may_be_without_svme():
    assert wrong_in_save_area(handler(1, efer=SVME_OFF)) == []


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"cr3": 0x9000}, "CR3 0x9000"),
        ({"svm_guest_flag": 0}, "SVM guest flag 0"),
        ({"svm_guest_vmcb_gpa": 0}, "vmcb12 0x0"),
        ({"efer": SVME_OFF}, "EFER"),
        ({"efer": 0}, "EFER"),
        ({"cr0": 1}, "CR0 0x1"),
        ({"rip": 0x8000_0000}, "RIP 0x80000000"),
        ({"rip": L1}, f"RIP {L1:#x}"),
        ({"rsp": L1 + 8}, f"RSP {L1 + 8:#x}"),
        ({"rflags": 0}, "RFLAGS 0x0"),
        ({"smbase": 0}, "SMBASE 0x0"),
    ],
)
def test_what_is_not_l2s_is_named(changed, says):
    wrong = wrong_in_save_area(handler(2, **changed))
    assert len(wrong) == 1
    assert wrong[0].startswith(says)


def test_an_interrupted_l1_has_no_vmcb12():
    assert wrong_in_save_area(handler(1, svm_guest_vmcb_gpa=0x7000)) == ["vmcb12 0x7000"]


def test_smis_are_counted_by_level():
    smis = [Smi(level, 0, False, True) for level in ("L2", "L1", "L2")]
    assert levels_hit(smis) == {"L1": 1, "L2": 2}
