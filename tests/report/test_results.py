"""results.jsonl: what was recorded is there, whatever happens next."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import HostError
from harness.report.results import ResultsFile, read_results


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "results.jsonl"


def test_events_are_read_back_in_order_with_their_time(path):
    with ResultsFile(path) as file:
        file.write("run", argv=["a"])
        file.write("end", case="c", verdict="PASS")
    first, second = read_results(path)
    assert (first["event"], first["argv"]) == ("run", ["a"])
    assert (second["event"], second["case"], second["verdict"]) == ("end", "c", "PASS")
    assert first["time"] <= second["time"]


def test_every_event_is_in_the_file_at_once(path):
    with ResultsFile(path) as file:
        for number in range(3):
            file.write("note", number=number)
            assert len(read_results(path)) == number + 1


def test_a_process_that_is_killed_loses_nothing(path):
    script = (
        "import os, sys; from pathlib import Path\n"
        "from harness.report.results import ResultsFile\n"
        "ResultsFile(Path(sys.argv[1])).write('note', n=1); os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], timeout=60)
    assert done.returncode == -9
    assert [event["n"] for event in read_results(path)] == [1]


@given(whole=st.integers(0, 3), cut=st.integers(1, 20))
def test_half_a_last_line_is_left_out(tmp_path_factory, whole, cut):
    path = tmp_path_factory.mktemp("results") / "results.jsonl"
    line = json.dumps({"event": "note", "text": "äöü\n"}) + "\n"
    path.write_text(line * whole + line[:-cut])
    assert read_results(path) == [{"event": "note", "text": "äöü\n"}] * whole


@pytest.mark.parametrize("text", ["two\nlines", "\u2028 \x85 \x1c", "\udcff", '"\\'])
def test_any_text_is_one_line(path, text):
    with ResultsFile(path) as file:
        file.write("output", text=text)
    assert path.read_bytes().count(b"\n") == 1
    assert read_results(path)[0]["text"] == text


def test_a_value_that_json_does_not_know_is_shown(path):
    with ResultsFile(path) as file:
        file.write("note", value={1}, kind=object)
    assert read_results(path)[0]["value"] == "{1}"


def test_earlier_runs_are_kept_aside(path):
    for number in range(3):
        with ResultsFile(path) as file:
            file.write("run", number=number)
    names = {p.name: read_results(p)[0]["number"] for p in path.parent.iterdir()}
    assert names == {"results.1.jsonl": 0, "results.2.jsonl": 1, "results.jsonl": 2}


@pytest.mark.parametrize("place", ["/dev/null/x/results.jsonl", "/proc/self/none/results.jsonl"])
def test_a_place_that_cannot_be_written_is_one_clear_line(place):
    with pytest.raises(HostError, match=r"^cannot write results to \S+: [A-Z][^\n]*$"):
        ResultsFile(Path(place))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_is_one_clear_line_and_so_is_the_end(path):
    def run():
        with ResultsFile(path) as file:
            file.write("note", n=1)
            file._file.close()
            file._file = open("/dev/full", "a")  # noqa: SIM115
            file.write("note", n=2)

    with pytest.raises(HostError, match=r"cannot write results to \S+: No space left on device$"):
        run()
    assert [event["n"] for event in read_results(path)] == [1]
