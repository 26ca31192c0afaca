"""What the migration benchmarks decide without a VM."""

import pytest

from harness.bench.migrate_load import PlainLoad, Size
from harness.bench.migrate_loops import Bench, Figures, fitting_mib
from harness.errors import HarnessError


@pytest.mark.parametrize(
    ("available_mib", "mib"), [(22_000, 1024), (6 * 1024, 1024), (6 * 1024 - 1, 512), (600, 64)]
)
def test_the_memory_fits_the_host(available_mib, mib):
    assert fitting_mib(f"MemTotal: 1 kB\nMemAvailable: {available_mib * 1024} kB\n") == mib


def test_a_small_host_has_the_smallest_machine():
    assert fitting_mib("MemAvailable: 1024 kB\n") == 32


def test_a_host_that_does_not_say():
    with pytest.raises(HarnessError, match="no MemAvailable"):
        fitting_mib("MemTotal: 1 kB\n")


def figures(pages=1000, rest_pages=64):
    return Figures(pages, pages * 4096, 1.0, rest_pages, 0.001, {"state": 0.001}, 0.0)


class FakeBench(Bench):
    def in_c(self, link):
        return figures()

    def in_python(self, link):
        return self.c_side


def bench(plain, python):
    load = object.__new__(PlainLoad) if plain else object()
    return FakeBench(load, python, None, Size(64, 64))


@pytest.mark.parametrize("c_first", [True, False])
def test_the_figures_come_in_one_order(c_first):
    python = figures(pages=1004)
    assert bench(True, python).compare("tcp", c_first=c_first) == (figures(), python)


@pytest.mark.parametrize(
    ("plain", "python"),
    [
        (True, figures(pages=1017)),
        (True, figures(rest_pages=81)),
        (True, figures(rest_pages=63)),
        (False, figures(rest_pages=63)),
    ],
)
def test_sides_that_did_not_do_the_same_are_not_compared(plain, python):
    with pytest.raises(HarnessError, match="tcp: C sent 1000 pages and then 64, Python"):
        bench(plain, python).compare("tcp", c_first=True)


def test_levels_are_memory_too():
    python = figures(pages=2000, rest_pages=80)
    assert bench(False, python).compare("tcp", c_first=True)[1] == python
