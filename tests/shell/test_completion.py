"""Completions: names, attributes, VMCB fields."""

import pytest

from harness.proxy.guest_level import GuestLevel
from harness.proxy.vmcb_view import place_of
from harness.shell.completion import complete, vmcb_names


class Thing:
    apple = 1

    def apply(self):
        pass

    @property
    def apricot(self):
        raise AssertionError("completion must not evaluate this")


NAMES = {"machine": None, "magic": 1, "thing": Thing(), "l2": GuestLevel, "__name__": "x"}


def completions(line):
    """Return the completions at the end of a line whose last word is cut as readline does it."""
    word = line
    for delimiter in " \t\n`~!@#$%^&*()-=+[{]}\\|;:'\",<>/?":
        word = word.rpartition(delimiter)[2]
    return complete(NAMES, word, line)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("mach", ["machine"]),
        ("1 + mag", ["magic"]),
        ("whi", ["while"]),
        ("thing.ap", ["thing.apple", "thing.apply()", "thing.apricot"]),
        ("thing.nothing", []),
        ("l2.resume_", ["l2.resume_to_exit("]),
        ("nobody.", []),
        ('l2.vmcb["exit_c', ["exit_code"]),
        ("l2.vmcb['cs.a", ["cs.attrib"]),
        ("l2.vmcb['int_ctl.V_IR", ["int_ctl.V_IRQ"]),
        ("l2.vmcb['intercept.excp.14", ["intercept.excp.14"]),
        ('l1.launch(vmcb={"intercept.cpu', ["intercept.cpuid"]),
        ('l1.launch(vmcb={"asid": 1, "nested_c', ["nested_cr3", "nested_ctl"]),
    ],
)
def test_completions(line, found):
    assert completions(line) == found


def test_every_field_that_is_offered_is_one():
    for name in vmcb_names():
        assert place_of(name).size in (1, 2, 4, 8), name


def test_the_offer_has_no_double():
    assert len(set(vmcb_names())) == len(vmcb_names())
