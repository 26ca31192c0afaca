"""INIT: when it is taken, and what it leaves."""

import pytest
from witnesses import GIF, GM, ON, RUN_PENDING, A, do, l2, l2_with

from harness.model.knobs import SETTINGS
from harness.model.model import Model
from harness.model.operations import Init, Resume, SetNestedState, Smi
from harness.svm.vmcb import NestedCtl

KERNELS = ("5.10", "6.1", "6.12", "7.3")
NESTED_PAGING = {"control.nested_ctl": NestedCtl.NP_ENABLE.mask}


def last(kernel, *operations):
    model = Model(SETTINGS[kernel])
    return [model.apply(operation) for operation in operations][-1]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("operations", [ON, l2()], ids=["L1", "L2"])
def test_it_resets_the_vcpu(kernel, operations):
    seen = last(kernel, *operations, Init(), Resume())
    assert seen.result == "internal error"
    wanted = {"efer": 0, "cr4": 0, "rip": 0xFFF0, "guest_mode": False, "gif": True}
    wanted |= {"init_pending": False, "nested_bytes": 0, "nested.size": 128}
    assert {name: seen.seen.get(name) for name in wanted} == wanted


@pytest.mark.parametrize(
    ("kernel", "result"),
    [("5.10", "report"), *((kernel, "internal error") for kernel in KERNELS[1:])],
)
def test_what_l1s_nested_tables_have_at_the_reset_vector_counts_only_where_l2_is_not_left(
    kernel, result
):
    assert last(kernel, *l2_with(NESTED_PAGING), Init(), Resume()).result == result


def test_it_waits_for_gif():
    waits = last("6.1", *ON, do("CLGI"), Init(), do("NOP"))
    assert (waits.result, waits.seen["init_pending"]) == ("report", True)
    taken = last("6.1", *ON, do("CLGI"), Init(), SetNestedState(GIF, size=128), Resume())
    assert taken.result == "internal error"


def test_it_waits_for_the_end_of_smm():
    waits = last("6.1", *ON, Smi(), Resume(), Init(), do("NOP"))
    assert (waits.result, waits.seen["init_pending"]) == ("report", True)


@pytest.mark.parametrize(
    "operations",
    [
        (*ON, do("CLGI"), Init(), do("STGI")),
        (*ON, SetNestedState(GM | RUN_PENDING | GIF, vmcb_pa=A), Init(), Resume()),
        (*l2_with({"control.intercepts.3": 1 << 3}), Init(), Resume()),
        (*ON, Smi(), Init(), Resume()),
    ],
)
def test_what_is_not_modelled_is_said(operations):
    assert last("6.1", *operations).result == "unknown"
