"""`nsvm designs`: the document, from measurements given; and one on an emulated host."""

import pytest
from nsvm_process import load_json, nsvm

from harness.commands.designs import document

STAGES = ("never nested", "EFER.SVME set", "cleared again")


def one(*held, toggle=1.5, vmrun=20, **knobs):
    return {
        "vcpus": 8,
        "bytes_per_vcpu": dict(zip(STAGES, held, strict=True)),
        "toggle_us": toggle,
        "vmrun_us": vmrun,
        "host": {"kernel_release": "6.1.0-56-amd64", "silicon": "emulated"},
        "knobs": knobs,
    }


FOUND = {
    "eager": one(12288, 12288, 12288, toggle=0.5, tlb_ctl_after_exit="kept"),
    "v1": one(0, 16384, 0, tlb_ctl_after_exit="written", vmmcall_in_l2="#UD"),
    "today": one(0, 12288, 0, tlb_ctl_after_exit="written"),
}


def test_each_design_has_a_row_with_its_figures():
    lines = document(FOUND).splitlines()
    [row] = [line for line in lines if line.startswith("| v1 ")]
    assert row.endswith("| 0 | 16384 | 0 | 1.5 | 20 |")
    [head] = [line for line in lines if line.startswith("| design")]
    [rule] = [line for line in lines if line.startswith("|---")]
    assert head.count("|") == rule.count("|") == row.count("|")


def test_behaviour_that_is_not_todays_is_told_in_words():
    found = [line for line in document(FOUND).splitlines() if line.startswith("- ")]
    assert len(found) == 1
    assert found[0].startswith("- eager: TLB_CONTROL of vmcb12 after #VMEXIT: ")
    same = {name: one(0, 0, 0) for name in FOUND}
    assert "None of the knobs" in document(same)


@pytest.mark.nightly
@pytest.mark.emulated
def test_the_designs_differ_in_memory_as_the_series_say(tmp_path):
    file = tmp_path / "designs.json"
    done = nsvm("designs", "--vcpus", 2, "--toggles", 5, "--vmruns", 1, "--json", file)
    assert done.returncode == 0, done.stderr
    held = {name: one["bytes_per_vcpu"] for name, one in load_json(file)["designs"].items()}
    assert held == {
        "eager": dict(zip(STAGES, (12288, 12288, 12288), strict=True)),
        "v1": dict(zip(STAGES, (0, 16384, 0), strict=True)),
        "today": dict(zip(STAGES, (0, 12288, 0), strict=True)),
    }
