"""Declaring scenarios: claims, axes, cases and their names."""

import importlib
import pkgutil
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import harness.scenarios
from harness.facts import nested_svm
from harness.scenarios.case import LIFECYCLES, Case, Scenario, cases_of, scenario, scenario_of


def some_claim(context, **values):
    """A claim in one line.

    And more.
    """


def declare(**options):
    def function(context):
        """A claim."""

    return scenario_of(scenario(**options)(function))


def test_the_claim_is_the_docstrings_first_line():
    assert Scenario(some_claim).claim == "A claim in one line."


def test_a_scenario_that_claims_nothing_is_refused():
    def test_nothing(context):
        pass

    with pytest.raises(TypeError, match="scenario nothing has no docstring"):
        scenario()(test_nothing)


def test_the_declaration_is_with_the_function():
    declared = declare(needs=[nested_svm], levels=2, timeout_s=7, quick=True, benign=["x"])
    assert declared.needs == (nested_svm,)
    assert (declared.levels, declared.timeout_s, declared.benign) == (2, 7, ("x",))
    assert declared.quick
    assert not declared.unsafe


@pytest.mark.parametrize("other", [some_claim, None, 3, Scenario, "text"])
def test_anything_else_is_no_scenario(other):
    assert scenario_of(other) is None


def test_without_axes_there_is_one_case_named_like_the_scenario():
    [case] = cases_of(Scenario(some_claim))
    assert case.id == "some_claim"


def test_cases_are_all_combinations_in_order():
    declared = declare(axes={"path": ("a", "b"), "n": (1, 2)})
    assert [case.id for case in cases_of(declared)] == [
        "function[path=a,n=1]",
        "function[path=a,n=2]",
        "function[path=b,n=1]",
        "function[path=b,n=2]",
    ]


def test_a_lifecycle_is_an_axis_where_there_are_several():
    both = declare(axes={"npt": (True, False)}, lifecycle=LIFECYCLES)
    assert [dict(case.values) for case in cases_of(both)] == [
        {"npt": True, "lifecycle": "fresh"},
        {"npt": True, "lifecycle": "restored"},
        {"npt": False, "lifecycle": "fresh"},
        {"npt": False, "lifecycle": "restored"},
    ]
    assert [case.id for case in cases_of(declare())] == ["function"]


@pytest.mark.parametrize(
    "options", [{"lifecycle": ("fresh", "aged")}, {"axes": {"lifecycle": ("fresh",)}}]
)
def test_a_lifecycle_that_there_is_not_is_refused(options):
    with pytest.raises(TypeError, match="is no lifecycle"):
        declare(**options)


@given(
    st.dictionaries(
        st.sampled_from("abc"),
        st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True),
    )
)
def test_no_two_cases_have_the_same_name(axes):
    declared = Scenario(some_claim, axes={axis: tuple(values) for axis, values in axes.items()})
    names = [case.id for case in cases_of(declared)]
    product = 1
    for values in axes.values():
        product *= len(values)
    assert len(set(names)) == len(names) == product


# All that the tree has


def declared_in_the_tree():
    for info in pkgutil.iter_modules(harness.scenarios.__path__):
        module = importlib.import_module(f"harness.scenarios.{info.name}")
        for value in vars(module).values():
            if declared := scenario_of(value):
                yield declared


@pytest.mark.parametrize("declared", [*declared_in_the_tree()], ids=lambda declared: declared.name)
def test_each_is_declared_well(declared):
    assert re.fullmatch(r"[A-Z#].*\.", declared.claim), "a claim is one sentence in one line"
    assert declared.function.__name__.startswith("test_")
    assert declared.timeout_s > 0
    arguments = declared.function.__code__.co_varnames[1 : declared.function.__code__.co_argcount]
    assert set(arguments) == set(declared.axes), "each axis is an argument, and nothing else is"
    for pattern in declared.benign:
        re.compile(pattern)
    for case in cases_of(declared):
        assert isinstance(case, Case)


def test_names_are_unique():
    names = [declared.name for declared in declared_in_the_tree()]
    assert len(set(names)) == len(names)


#: Where a machine is made that no lifecycle moves, and why.
MOVES_ITSELF = {
    "l2": "proxy_machine(), which all others use",
    "twins": "moves one of two itself",
    "test_smm_memory": "counts what closing a machine gives back",
}


def test_machines_of_proxies_are_made_where_lifecycles_are_known():
    own = Path(harness.scenarios.__file__).parent
    makers = {p.stem for p in own.glob("*.py") if re.search(r"\bProxyMachine\(", p.read_text())}
    assert makers == set(MOVES_ITSELF)
