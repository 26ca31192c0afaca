"""The score of `nsvm mutants` as the report reads it."""

import json

import pytest

from harness.errors import HarnessError
from harness.host.kernel_build import Variant
from harness.report.bugs import load
from harness.repro.mutants import Mutant

SMM = Variant("rsm-bug", "Put back\n\nArea: SMM\n\n--- a/x\n")
EXIT = Variant("exit-bug", "Put back\n\nArea: #VMEXIT\n\n--- a/x\n")


def written(path, *mutants):
    path.write_text(json.dumps({"kernel": "6.1", "mutants": [m.to_plain() for m in mutants]}))
    return path


def test_it_is_what_the_command_writes(tmp_path):
    bugs = load(
        written(
            tmp_path / "m.json",
            Mutant(SMM, {"smi": "GIF: saw 1"}, "", peers={"smm_test": "failed"}),
            Mutant(SMM, {}, "gif differs", peers={}),
            Mutant(EXIT, {}, "", peers={}),
        )
    )
    assert bugs.kernel == "6.1"
    assert [bug.noticed for bug in bugs.bugs] == [True, True, False]
    assert bugs.areas == [("#VMEXIT", 0, 0, 1), ("SMM", 2, 1, 2)]
    assert bugs.has_selftests


def test_a_won_race_is_noticed(tmp_path):
    [bug] = load(written(tmp_path / "m.json", Mutant(SMM, {}, "", window="EFER"))).bugs
    assert bug.noticed
    assert bug.others == "EFER"
    assert bug.selftests is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"kernel": "6.1", "mutants": [{}]}'])
def test_another_file_is_refused_in_a_line(tmp_path, text):
    path = tmp_path / "m.json"
    path.write_text(text)
    with pytest.raises(HarnessError, match="not of nsvm mutants --json"):
        load(path)
