"""Small sequences that still show it."""

from harness.crosscheck.shrink import Budget, shrink
from harness.model.operations import Execute, GetNestedState, Instruction, Smi, WriteVmcb

NOISE = [GetNestedState(), Execute(Instruction.NOP), Smi()]


def plenty():
    """Return a budget of its own: its seconds run from now."""
    return Budget(10_000, 60.0)


def test_only_what_matters_is_left():
    first, second = WriteVmcb("a", {"control.asid": 0}), Execute(Instruction.VMRUN, rax=1)

    def shows(operations):
        return first in operations and second in operations[operations.index(first) :]

    assert shrink([*NOISE * 5, first, *NOISE * 7, second], shows, plenty()) == (first, second)


def test_changes_that_do_not_matter_are_left_out():
    whole = WriteVmcb("a", {"control.asid": 0, "save.cr0": 1, "save.rip": 2})

    def shows(operations):
        return any(getattr(each, "changes", {}).get("save.cr0") == 1 for each in operations)

    assert shrink([whole], shows, plenty()) == (WriteVmcb("a", {"save.cr0": 1}),)


def test_numbers_that_do_not_matter_are_as_by_default():
    def shows(operations):
        return any(getattr(each, "rax", 0) == 5 for each in operations)

    noisy = Execute(Instruction.WRMSR, rax=5, rcx=6, rdx=7, user=True)
    assert shrink([noisy], shows, plenty()) == (Execute(Instruction.WRMSR, rax=5),)


def test_the_budget_is_kept():
    tried = []

    def shows(operations):
        tried.append(operations)
        return False

    shrink(NOISE * 20, shows, Budget(7, 60.0))
    assert len(tried) == 7
    shrink(NOISE * 20, shows, Budget(100, 0.0))
    assert len(tried) == 7
