"""`nsvm race`, with races in emulated hosts.

What is asserted of windows does not hang on a rate: on a kernel that has one, a hit is waited for
(a few hundred attempts bring dozens), and on one that has none there is nothing to hit.
"""

import pytest
from nsvm_process import Nsvm, load_json

from harness.commands import race as command
from harness.race.fields import field_named

PATIENCE_S = 120


def run(*arguments):
    with Nsvm("race", *arguments) as process:
        return process.end()


def test_unknown_field_is_one_line():
    status, output = run("--field", "CR9", "--kernel", "5.10")
    assert status == 2
    assert output.startswith("nsvm: no field is called CR9; there are EFER, ")
    assert len(output.splitlines()) == 1


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "soon"])
def test_useless_time_is_refused(seconds):
    status, output = run("--seconds", seconds, "--kernel", "5.10")
    assert status == 2
    assert "--seconds" in output
    assert "Traceback" not in output


def tally(**values):
    return {
        "window_by_table": False,
        "check_by_table": True,
        "hits": 0,
        "attempts": 7,
        "unchecked": "",
        **values,
    }


@pytest.mark.parametrize(
    ("values", "contradicts", "says"),
    [
        ({}, False, "none, as the table says"),
        ({"hits": 1}, True, "WINDOW, and the table says none"),
        ({"hits": 1, "window_by_table": True}, False, "window, as the table says"),
        ({"window_by_table": True}, False, "the table says window; not seen in 7 attempts"),
        ({"hits": 1, "window_by_table": None}, False, "the table does not reach this kernel"),
        ({"window_by_table": None}, False, "the table does not reach this kernel"),
        ({"unchecked": "ran"}, True, "NOT IN THE TABLE: ran"),
        ({"unchecked": "ran", "check_by_table": False}, False, "which the table says: ran"),
    ],
)
def test_verdict_is_the_table_against_what_was_seen(values, contradicts, says):
    row = tally(**values)
    assert command._contradicts(row) is contradicts
    assert says in command._says(row)


@pytest.mark.emulated
@pytest.mark.parametrize("by", ["vcpu", "host"])
def test_race_finds_the_windows_that_the_table_names(kernel, tmp_path, by):
    file = tmp_path / "race.json"
    fields = ("EFER", "DR6", "DR7", "CS", "intercepts")
    release = kernel.kernel.release
    # Fields with a window end at the first hit; the others take all the time there is.
    for wanted, seconds in ((True, PATIENCE_S), (False, 2)):
        names = [name for name in fields if field_named(name).expects_window(release) is wanted]
        if not names:
            continue
        chosen = [word for name in names for word in ("--field", name)]
        options = ("--first", "--seconds", seconds, "--by", by, "--json", file)
        status, output = run(*chosen, *options, "--kernel", kernel)
        assert status == 0, output
        report = load_json(file)
        assert report["host"]["kernel_release"] == release
        assert set(report["fields"]) == set(names)
        for row in report["fields"].values():
            expect_row(row, wanted, output)


def expect_row(row, window, output):
    assert row["verdict"] == "PASS", output
    if row["unchecked"]:
        assert (row["field"], row["check_by_table"]) == ("CS", False), output
        return
    assert row["attempts"] > 0, output
    assert (row["hits"] > 0) is window, output
    if window:
        first = row["first_evidence"]
        before, after = (bytes.fromhex(first[f"vmcb12_{when}"]) for when in ("before", "after"))
        assert len(before) == len(after) == 4096
        assert first["proof"]
