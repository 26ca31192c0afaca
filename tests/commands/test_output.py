"""What commands give out."""

import io
import json

import pytest
from rich.console import Console

from harness.commands.output import deliver, print_host, write_text
from harness.errors import HostError

HOST = {
    "kernel_release": "6.1.0",
    "kernel_origin": "/tmp/[bold]/a very long directory of somebody/arch/x86/boot/bzImage",
    "kind": "emulated",
    "silicon": "emulated (QEMU 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18), TCG, -cpu max,+svm,+npt)",
}


def test_a_host_is_two_whole_lines_as_they_are():
    said = io.StringIO()
    print_host(Console(file=said, width=80, highlight=False), HOST, 9)
    assert said.getvalue().splitlines() == [
        f"kernel   6.1.0  ({HOST['kernel_origin']})",
        f"host     emulated: {HOST['silicon']}",
    ]


@pytest.mark.parametrize(
    ("name", "shown", "out"), [(None, 1, False), ("x.json", 1, False), ("-", 0, True)]
)
def test_a_report_is_shown_unless_its_json_is(tmp_path, monkeypatch, capsys, name, shown, out):
    monkeypatch.chdir(tmp_path)
    calls = []
    file = None if name is None else type(tmp_path)(name)
    deliver(file, {"a": 1}, lambda: calls.append("shown"))
    assert len(calls) == shown
    assert bool(capsys.readouterr().out) is out
    if name == "x.json":
        assert json.loads((tmp_path / name).read_text()) == {"a": 1}


def test_a_file_that_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(HostError, match=r"^cannot write .*: Is a directory$"):
        write_text(tmp_path, "x")
