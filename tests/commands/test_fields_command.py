"""`nsvm fields`: on test kernels, with a wrong model, and on a host that dies of a cell."""

import json

import pytest
from click.testing import CliRunner
from nsvm_process import load_json, nsvm

from harness.commands import fields as command
from harness.errors import HostLost
from harness.fields.rows import ENTERED, LOST, TAKEN, Predicted, Row
from harness.host.session import CallResult

#: Cheap, and different on every kernel.
FIELDS = ("template", "asid", "event_inj", "cs.attrib", "nested_ctl")


def try_fields(*arguments):
    chosen = [word for name in FIELDS for word in ("--field", name)]
    return nsvm("fields", *chosen, *arguments)


@pytest.mark.emulated
def test_a_kernel_does_what_its_model_says(kernel, tmp_path):
    file = tmp_path / "fields.json"
    done = try_fields("--kernel", kernel, "--json", file)
    assert done.returncode == 0, done.stdout + done.stderr
    report = load_json(file)
    assert report["verdict"] == "PASS"
    assert report["differences"] == []
    assert report["values"] == len(report["rows"]) > 250
    assert {row["vmrun"] for row in report["rows"]} >= {"entered", "refused"}
    assert {row["set_state"] for row in report["rows"]} == {"ok", "EINVAL"}


@pytest.mark.emulated
def test_a_wrong_model_is_seen():
    done = nsvm(
        *("fields", "--kernel", "7.3", "--field", "event_inj"),
        *("--knobs", "7.3", "--knobs", "checks_event_inj=false"),
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "VMRUN: expected refused late (EVENTINJ.TYPE), saw refused" in done.stdout
    assert "KVM_SET_NESTED_STATE: expected ok, saw EINVAL" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--field", "cr5"], "the VMCB has no field cr5"),
        (["--json", "/nowhere/file"], "no directory /nowhere"),
    ],
)
def test_bad_input_is_one_line(arguments, says):
    done = nsvm("fields", "--kernel", "6.1", *arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


class DyingHost:
    """Answers as a host does, and dies of one value of one field."""

    deadly = ("save.tr.attrib", "bit 3")
    values = ("0", "bit 3", "bit 4")

    def __init__(self):
        self.starts = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def start(self):
        self.starts += 1
        return self

    def describe(self):
        words = ("kernel_release", "kernel_origin", "kind", "silicon")
        return dict(zip(words, ("6.1.0", "a test", "fake", "none"), strict=True))

    def call(self, target, *, timeout_s, on_event=None, **options):
        if target.endswith(":cells_here"):
            cells = [{"value": v, "changes": {options["field"]: 1}} for v in self.values]
            return CallResult("return", value=cells)
        for field in options["fields"]:
            values = options["only"] or self.values
            if field == self.deadly[0] and self.deadly[1] in values:
                raise HostLost("it fell silent")
            rows = [self.row(field, value).to_json() for value in values]
            on_event({"event": "emit", "data": {"field": field, "rows": rows}})
        return CallResult("return", value=0)

    def row(self, field, value):
        said = Predicted(ENTERED, (), TAKEN, ())
        return Row(field, value, {field: 1}, said, ENTERED, "SVM_EXIT_VMMCALL", TAKEN)


def test_a_cell_that_kills_the_host_is_found_and_the_rest_goes_on(monkeypatch, tmp_path):
    host = DyingHost()
    monkeypatch.setattr(command, "make_host", lambda *_, **__: host)
    file = tmp_path / "fields.json"
    names = ("save.tr.selector", "save.tr.attrib", "save.tr.limit")
    arguments = [word for name in names for word in ("--field", name)]
    done = CliRunner().invoke(command.command, [*arguments, "--json", str(file)])
    assert done.exit_code == 1, done.output
    report = json.loads(file.read_text())
    assert [(row["field"], row["value"]) for row in report["rows"]] == [
        (name, value) for name in names for value in host.values
    ]
    [lost] = [row for row in report["rows"] if row["vmrun"] == LOST]
    assert (lost["field"], lost["value"], lost["how"]) == (*host.deadly, "it fell silent")
    [difference] = report["differences"]
    assert "save.tr.attrib, bit 3" in difference["cell"]
