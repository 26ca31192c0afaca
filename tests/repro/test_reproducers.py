import re

import pytest

from harness.commands.list import all_scenarios
from harness.host.kernel_build import VARIANTS
from harness.model.knobs import KNOBS
from harness.race.fields import field_named
from harness.repro import evidence as recorded
from harness.repro.evidence import Seen
from harness.repro.table import ReproError, choose, load
from harness.scenarios.case import cases_of

TABLE = load()
EVIDENCE = recorded.load()
SEEN = [(name, kernel, seen) for name, all_ in EVIDENCE.items() for kernel, seen in all_.items()]

ENTRY = """
[[reproducer]]
name = "hsave"
claim = "VMRUN needs VM_HSAVE_PA"
mechanism = "it is not looked at"
fix = "fb79f566e4c9"
since = "5.14"
kernels = ["5.10"]
cases = ["vmrun_without_hsave_is_refused"]
symptom = 'VMRUN'
"""


@pytest.fixture(scope="module")
def cases():
    return {case.id: case for _, declared in all_scenarios() for case in cases_of(declared)}


@pytest.mark.parametrize("one", TABLE.values(), ids=TABLE)
def test_what_shows_a_bug_exists(one, cases):
    assert [case for case in one.cases if case not in cases] == []
    assert [field_named(name).name for name in one.races] == list(one.races)
    if one.knob:
        assert one.bad == tuple(
            KNOBS[one.knob].key_of(KNOBS[one.knob].value_of(v)) for v in one.bad
        )
        assert one.knob in one.experiment.knobs


@pytest.mark.parametrize("one", TABLE.values(), ids=TABLE)
def test_what_may_end_the_host_is_marked(one, cases):
    if any(cases[case].scenario.unsafe for case in one.cases):
        assert one.unsafe


@pytest.mark.parametrize("one", TABLE.values(), ids=TABLE)
def test_variants_exist(one):
    assert [v for v in one.variants if not list(VARIANTS.glob(f"*/{v}.patch"))] == []


@pytest.mark.parametrize(("name", "kernel", "seen"), SEEN, ids=[f"{n}-{k}" for n, k, _ in SEEN])
def test_the_evidence_is_what_the_table_says(name, kernel, seen):
    one = TABLE[name]
    assert seen.colour == ("red" if one.has_bug(kernel) else "green")
    if seen.colour == "red" and one.cases:
        assert one.symptom_in(seen.saw)
    knob = one.knob and f"{one.experiment.name}: {one.knob}"
    assert seen.what in (*one.cases, knob, *(f"race for {field}" for field in one.races))


@pytest.mark.parametrize("one", TABLE.values(), ids=TABLE)
def test_every_bug_was_seen_in_red(one):
    assert recorded.kernels_of(EVIDENCE.get(one.name, {}), "red")


@pytest.mark.parametrize(
    ("kernel", "has"),
    [
        ("5.10.0-46-amd64", True),
        ("5.100.0-1-amd64", False),
        ("6.1.0-56-amd64", False),
        ("6.1.0-56-amd64:no-hsave", True),
        ("6.1.0-56-amd64:eager", False),
    ],
)
def test_a_kernel_has_a_bug_by_its_series_or_its_variant(tmp_path, kernel, has):
    text = ENTRY + 'variants = ["no-hsave"]\n'
    assert loaded(tmp_path, text)["hsave"].has_bug(kernel) is has


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("claim", "clam"), "no claim"),
        (("symptom = 'VMRUN'", ""), "no symptom"),
        (("symptom = 'VMRUN'", "symptom = '('"), "symptom: missing"),
        (("since", 'sicne = "1"\nsince'), "unknown key 'sicne'"),
        (("symptom = 'VMRUN'", 'symptom = "x"\nknob = "allocation"'), "give one of cases, knob"),
        (('cases = ["vmrun_without_hsave_is_refused"]\n', 'knob = "x"\nbad = ["y"]\n'), "no exper"),
        (('kernels = ["5.10"]\n', ""), "neither kernels nor variants"),
        (('["5.10"]', '"5.10"'), "kernels must be a list"),
        (("[[", ENTRY + "[["), "two reproducers have the name"),
        (("name =", "name"), "reproducers.toml: "),
    ],
)
def test_a_mistake_in_the_table_is_one_line(tmp_path, change, words):
    with pytest.raises(ReproError, match=re.escape(words)) as error:
        loaded(tmp_path, ENTRY.replace(*change, 1))
    assert "\n" not in str(error.value)


def test_a_name_that_does_not_exist_is_named():
    with pytest.raises(ReproError, match="no reproducer 'nope'"):
        choose(TABLE, ["nope"])


def test_evidence_of_the_same_kernel_is_replaced_and_other_is_kept(tmp_path):
    file = tmp_path / "evidence.json"
    old, new = Seen("red", "a", "b", "emulated"), Seen("green", "a", "c", "emulated")
    recorded.record({"x": {"6.1": old, "7.3": old}, "y": {"6.1": old}}, file)
    recorded.record({"x": {"6.1": new}}, file)
    assert recorded.load(file) == {"x": {"6.1": new, "7.3": old}, "y": {"6.1": old}}


def test_damaged_evidence_is_one_line(tmp_path):
    file = tmp_path / "evidence.json"
    file.write_text('{"x": {"6.1": {"colour": "red"}}}')
    with pytest.raises(ReproError, match=r"evidence\.json"):
        recorded.load(file)


def loaded(tmp_path, text):
    path = tmp_path / "reproducers.toml"
    path.write_text(text)
    return load(path)
