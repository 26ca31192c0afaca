import ctypes

import pytest

from harness.machine.addresses import Gpa
from harness.proxy.vmcb_view import VmcbFieldError, VmcbView, intercept_named
from harness.svm.intercepts import Intercept
from harness.svm.vmcb import IntCtl, vmcb, vmcb_control_area, vmcb_save_area
from harness.svm.vmcb_text import FIELD_BITS

GPA = Gpa(0x3000)


@pytest.fixture
def view(memory):
    return VmcbView(memory, GPA)


def scalars(area):
    for name, kind in area._fields_:
        if issubclass(kind, ctypes._SimpleCData):
            yield name


@pytest.mark.parametrize(
    ("area", "name"),
    [("control", n) for n in scalars(vmcb_control_area)]
    + [("save", n) for n in scalars(vmcb_save_area)],
)
def test_every_scalar_is_written_where_the_struct_has_it(view, area, name):
    view[f"{area}.{name}"] = 0x5A
    block = view.read()
    assert getattr(getattr(block, area), name) == 0x5A
    expected = vmcb()
    setattr(getattr(expected, area), name, 0x5A)
    assert view.bytes() == bytes(expected)
    assert view[name] == 0x5A or area == "save"


@pytest.mark.parametrize("bit", Intercept)
def test_every_intercept_has_a_name(view, bit):
    name = f"intercept.{bit.name.removeprefix('INTERCEPT_').lower()}"
    view[name] = 1
    assert view.read().control.has_intercept(bit)
    assert view.has_intercept(bit)
    assert view[name] == 1
    view[name] = 0
    assert view.bytes() == bytes(4096)


def test_exception_intercepts_go_by_vector(view):
    view["intercept.excp.14"] = 1
    assert view.read().control.intercepts[2] == 1 << 14
    assert intercept_named("excp.14") == Intercept.INTERCEPT_EXCEPTION_OFFSET + 14


def test_bits_and_segments(view):
    view["int_ctl"] = IntCtl.of(V_TPR=3)
    view["int_ctl.V_GIF"] = 1
    assert view["control.int_ctl"] == IntCtl.of(V_TPR=3, V_GIF=1)
    view["save.cs.attrib"] = 0x29B
    assert view.save.cs.attrib == view["cs.attrib"] == 0x29B


@pytest.mark.parametrize("name", FIELD_BITS)
def test_every_field_with_named_bits_has_each(view, name):
    full = f"cs.{name}" if name == "attrib" else name
    for bit, field in FIELD_BITS[name].fields().items():
        view[full] = 0
        view[f"{full}.{bit}"] = field.limit
        assert view[full] == field.mask


@pytest.mark.parametrize(
    "name",
    [
        *("rop", "control.rip", "int_ctl.NO", "save.cs", "intercept.nothing", "intercepts"),
        *("intercept.excp.32", "intercept.excp.PF", "intercept.excp."),
    ],
)
def test_unknown_names_are_refused_in_one_line(view, name):
    with pytest.raises(VmcbFieldError) as caught:
        view[name]
    assert name.removeprefix("intercept.") in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"), [("asid", 1 << 32), ("int_ctl.V_GIF", 2), ("asid", "x")]
)
def test_values_that_do_not_fit_are_refused(view, name, value):
    with pytest.raises(VmcbFieldError, match=f"{name}: .* (does not fit|is no number)"):
        view[name] = value
