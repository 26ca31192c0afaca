"""What the bench's guest finds in memory."""

from itertools import pairwise

from harness.crosscheck.code import base_memory
from harness.model import layout


def test_nothing_lies_on_something_else():
    spans = sorted((gpa, gpa + len(data)) for gpa, data in base_memory())
    assert spans[-1][1] <= layout.BASE.size_bytes
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))


def test_l2_does_not_walk_the_tables_that_map_it():
    """KVM write-protects nested tables, and the CPU writes to those of L2 that it walks."""
    memory = dict(base_memory())
    pages = [
        {int.from_bytes(memory[table][:8], "little") & ~0xFFF for table in (pml4, pdpt)} | {pml4}
        for pml4, pdpt in (
            (layout.template_save()["save.cr3"], layout.PDPT_GPA),
            (layout.template_control()["control.nested_cr3"], layout.NESTED_PDPT_GPA),
        )
    ]
    assert len(pages[0]) == len(pages[1]) == 3
    assert not pages[0] & pages[1]
