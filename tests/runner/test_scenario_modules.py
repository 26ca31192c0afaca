"""Files with scenarios, as users write and name them."""

import sys

import pytest

GOOD = "from harness.scenarios import scenario\n@scenario()\ndef test_mine(context):\n    'A.'\n"


@pytest.mark.parametrize(
    ("text", "line", "complaint"),
    [
        ("x = 1\ndef f(:\n    pass\n", 2, "invalid syntax"),
        ("import no_such_module\n", 1, "No module named 'no_such_module'"),
        ("from harness.scenarios import nothing_like_it\n", 1, "cannot import name"),
        ("\n\n1 / 0\n", 3, "ZeroDivisionError: division by zero"),
        (GOOD.replace("'A.'", "pass"), 2, "scenario mine has no docstring"),
    ],
)
def test_one_that_cannot_be_imported_is_named_with_its_line(run, tmp_path, text, line, complaint):
    ran = run(text=text)
    assert ran.status == 2
    place = f"{tmp_path / 'scenarios.py'}:{line}: "
    [found] = [row for row in ran.output.splitlines() if row.startswith(place)]
    assert complaint in found
    for frame in ("Traceback", "site-packages", "importlib"):
        assert frame not in ran.output


def test_one_without_scenarios_is_nothing_ran(run):
    ran = run(text="x = 1\n")
    assert ran.status == 4
    assert "nothing ran" in ran.output


@pytest.mark.parametrize("name", ["bisect.py", "json.py", "conftest_.py", "with space-and.dash.py"])
def test_one_may_have_any_name(run, name):
    """Also that of a module that is loaded already, which stays what it is."""
    loaded = dict(sys.modules)
    assert run(name=name, one="pass").verdicts == {"one": "PASS"}
    assert [n for n, module in loaded.items() if sys.modules.get(n) is not module] == []


def test_one_may_be_changed_and_run_again(run):
    assert run(one="pass").verdicts == {"one": "PASS"}
    assert run(two="skip").verdicts == {"two": "SKIP"}


def test_one_may_declare_what_it_likes(run):
    """Dataclasses look their module up by its name."""
    text = GOOD.replace("'A.'", "'A.'\n    fate('pass')")
    more = "from __future__ import annotations\nfrom dataclasses import dataclass\n"
    assert run(text=f"{more}{text}\n@dataclass\nclass X:\n    y: int\n").verdicts == {
        "mine": "PASS"
    }
