"""Bundles, whole and broken."""

import json

import pytest

from harness.crosscheck.generator import sequence
from harness.crosscheck.record import BadBundle, Bundle, read_bundle, told
from harness.crosscheck.settings import Setting

DIFFERENCE = {"step": 1, "operation": "NOP", "name": "gif", "expected": True, "seen": False}
BUNDLE = Bundle(
    sequence(0, 0),
    Setting("6.1", {"vmrun_needs_hsave": "false"}),
    kernel="6.1.0",
    what="the model and the machine differ",
    difference=DIFFERENCE,
    evidence={"seed": 0},
)


def test_a_bundle_is_read_as_it_was_written(tmp_path):
    BUNDLE.write(tmp_path / "b.json")
    assert read_bundle(tmp_path / "b.json") == BUNDLE


def test_a_difference_is_told():
    assert told(DIFFERENCE) == "step 1, NOP: gif: the model says True, the machine False"
    numbers = DIFFERENCE | {"expected": 16, "seen": None}
    assert told(numbers).endswith("the model says 0x10, the machine None")


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"format": "other"}, "no bundle of nsvm crosscheck"),
        ({"version": 2}, "version 2; this harness knows 1"),
        ({"operations": None}, "no list of operations"),
        ({"operations": []}, "no operations"),
        ({"operations": [{"do": "Dance"}]}, "operation 0: no operation"),
        ({"knobs": {"setting": "9.9"}}, "no setting is called 9.9"),
        ({"knobs": {"setting": "6.1", "turned": {"moon": "1"}}}, "no knob is called moon"),
        ({"knobs": []}, "knobs is no object"),
        ({"knobs": {"setting": "6.1", "turned": {"x": 1}}}, "x is no text"),
        ({"difference": {"step": 1}}, "its difference lacks one of"),
        ({"kernel": 5}, "kernel is no text"),
        ({"evidence": "none"}, "evidence is no object"),
    ],
)
def test_a_broken_bundle_is_told_in_one_line(tmp_path, changes, what):
    path = tmp_path / "b.json"
    path.write_text(json.dumps(BUNDLE.to_plain() | changes))
    with pytest.raises(BadBundle) as caught:
        read_bundle(path)
    assert what in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00", "[" * 100_000])
def test_what_is_no_json_object_is_told_in_one_line(tmp_path, text):
    path = tmp_path / "b.json"
    path.write_text(text)
    with pytest.raises(BadBundle) as caught:
        read_bundle(path)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_told(tmp_path):
    with pytest.raises(BadBundle, match="cannot read"):
        read_bundle(tmp_path / "none.json")
    with pytest.raises(BadBundle, match="cannot write"):
        BUNDLE.write(tmp_path / "no" / "where.json")
