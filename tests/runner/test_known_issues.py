from datetime import date

import pytest

from harness.commands.list import all_scenarios
from harness.errors import HarnessError
from harness.runner.known_issues import KnownIssue, find, load, unused
from harness.scenarios.case import cases_of

ENTRY = """
[[issue]]
id = "hsave-zero"
match = "vmrun_needs_hsave*"
kernels = ["5.10"]
behaviour = "vmrun_needs_hsave = no"
reason = "VM_HSAVE_PA is not looked at"
evidence = "nested_svm_vmrun, before fb79f566e4c9"
"""


def issue(**changes) -> KnownIssue:
    values = {
        "id": "i", "match": ("a[x=1]*",), "behaviour": "b", "reason": "r", "evidence": "e",
    }  # fmt: skip
    return KnownIssue(**{**values, **changes})


def written(tmp_path, text):
    path = tmp_path / "issues.toml"
    path.write_text(text)
    return path


def test_an_entry_is_read(tmp_path):
    (one,) = load(written(tmp_path, ENTRY))
    assert one.match == ("vmrun_needs_hsave*",)
    assert one.applies("vmrun_needs_hsave[npt=True]", "5.10.0-46-amd64", "emulated")
    assert not one.applies("vmrun_needs_hsave", "6.1.0-56-amd64", "emulated")


@pytest.mark.parametrize(
    ("pattern", "case", "matches"),
    [
        ("a[x=1]", "a[x=1]", True),
        ("a[x=1]", "ax", False),
        ("a*", "a[x=1,y=2]", True),
        ("*[x=1*]", "abc[x=1,y=2]", True),
        ("a", "ab", False),
    ],
)
def test_brackets_are_letters_and_only_the_star_is_wild(pattern, case, matches):
    assert issue(match=(pattern,)).applies(case, "6.1.0", "local") is matches


@pytest.mark.parametrize(
    ("prefix", "release", "matches"),
    [("6.1", "6.1.0-56-amd64", True), ("6.1", "6.12.117", False), ("6.12.1", "6.12.117", False)],
)
def test_a_prefix_ends_at_a_whole_number(prefix, release, matches):
    one = issue(match=("c",), kernels=(prefix,))
    assert one.applies("c", release, "local") is matches


def test_a_host_kind_narrows_it_down():
    one = issue(match=("c",), host="emulated")
    assert one.applies("c", "6.1", "emulated")
    assert not one.applies("c", "6.1", "local")


def test_an_issue_excuses_until_the_end_of_its_last_day(tmp_path):
    (one,) = load(written(tmp_path, ENTRY + "expires = 2027-01-31\n"))
    assert not one.has_expired(date(2027, 1, 31))
    assert one.has_expired(date(2027, 2, 1))
    assert not issue().has_expired(date(9999, 1, 1))


def test_the_first_that_applies_is_found():
    issues = [issue(id="one", match=("x",)), issue(id="two", match=("c",))]
    assert find(issues, "c", "6.1", "local").id == "two"
    assert find(issues, "d", "6.1", "local") is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[[issue]\n", "issues.toml"),
        ('[[issue]]\nid = "x"\n', "issue 1 (x): no match"),
        (ENTRY + 'kernel = "6.1"\n', "unknown key 'kernel'"),
        (ENTRY + ENTRY, "two issues have the id 'hsave-zero'"),
        (ENTRY.replace('["5.10"]', "5.10"), "kernels must be a text or a list of texts"),
        (ENTRY + 'expires = "2027-01-31"\n', "expires must be a date"),
        (ENTRY + "expires = 2027-01-31T10:00:00\n", "expires must be a date"),
    ],
)
def test_a_malformed_file_is_one_line_that_says_where(tmp_path, text, says):
    with pytest.raises(HarnessError) as raised:
        load(written(tmp_path, text))
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


def test_every_issue_of_the_tree_matches_a_case():
    cases = [case.id for _, declared in all_scenarios() for case in cases_of(declared)]
    assert unused(load(), cases) == []
    assert unused([issue(match=("renamed*",))], cases) != []
