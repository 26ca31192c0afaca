"""`nsvm repro`: status, output and evidence, with colours given; and on an emulated host."""

import json

import pytest
from click.testing import CliRunner
from nsvm_process import load_json, nsvm

from harness.commands import repro
from harness.repro import evidence as recorded
from harness.repro.colour import Colour, Sight
from harness.repro.run import Ran
from harness.repro.table import load


class Pool:
    def __init__(self, choice, *, fresh, log):
        self.choice = choice

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def describe(self):
        return [{"kind": "emulated", "silicon": "QEMU", "kernel_release": "6.1.0-56-amd64"}]


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Return a function that runs reproducers, given as name=colour."""
    monkeypatch.setattr(repro, "HostPool", Pool)
    monkeypatch.setattr(recorded, "FILE", tmp_path / "evidence.json")
    monkeypatch.setattr(recorded.record, "__defaults__", (tmp_path / "evidence.json",))

    def start(*options, **colours):
        def bench_run(self, one):
            colour = Colour(colours[one.name.replace("-", "_")])
            return Ran(one, (Sight("case", colour, "GIF: expected 0"),))

        monkeypatch.setattr(repro.Bench, "run", bench_run)
        names = [name.replace("_", "-") for name in colours]
        where = ["--host", "emulated", "--results", str(tmp_path / "results")]
        return CliRunner().invoke(repro.command, ["run", *names, *where, *options])

    return start


@pytest.mark.parametrize(
    ("colours", "status"),
    [
        ({"gpat_shared": "red", "vmmcall_endless_ud": "green"}, 1),
        ({"gpat_shared": "red", "vmmcall_endless_ud": "broke"}, 1),
        ({"gpat_shared": "green"}, 0),
        ({"gpat_shared": "green", "vmmcall_endless_ud": "skip"}, 0),
        ({"gpat_shared": "other", "vmmcall_endless_ud": "green"}, 2),
        ({"gpat_shared": "broke"}, 2),
        ({"gpat_shared": "skip"}, 4),
    ],
)
def test_the_status_says_what_was_seen(run, colours, status):
    assert run(**colours).exit_code == status


def test_red_and_green_are_recorded_by_kernel_and_nothing_else_is(run, tmp_path):
    colours = {"gpat_shared": "red", "vmmcall_endless_ud": "green", "freed_in_smm": "other"}
    assert run("--record", "--kernel", "6.1:eager", **colours).exit_code == 1
    found = load_json(tmp_path / "evidence.json")
    assert {name: list(kernels) for name, kernels in found.items()} == {
        "gpat-shared": ["6.1.0-56-amd64:eager"],
        "vmmcall-endless-ud": ["6.1.0-56-amd64:eager"],
    }
    assert found["gpat-shared"]["6.1.0-56-amd64:eager"]["saw"] == "GIF: expected 0"


def test_without_record_no_evidence_is_written(run, tmp_path):
    run(gpat_shared="red")
    assert not (tmp_path / "evidence.json").exists()


def test_json_has_every_sight(run, tmp_path):
    run("--json", str(tmp_path / "ran.json"), gpat_shared="red")
    plain = load_json(tmp_path / "ran.json")
    assert plain["kernel"] == "6.1.0-56-amd64"
    assert plain["ran"] == [
        {
            "name": "gpat-shared",
            "colour": "red",
            "sights": [{"what": "case", "colour": "red", "saw": "GIF: expected 0"}],
        }
    ]


@pytest.mark.parametrize("arguments", [["run"], ["run", "--all", "gpat-shared"], ["run", "nope"]])
def test_a_wrong_call_is_an_error(arguments):
    assert CliRunner().invoke(repro.command, arguments).exit_code != 0


def test_the_list_has_them_all():
    done = CliRunner().invoke(repro.command, ["list", "--json"])
    assert [one["name"] for one in json.loads(done.output)] == list(load())


@pytest.mark.parametrize("name", load())
def test_each_can_be_shown(name):
    done = CliRunner().invoke(repro.command, ["show", name])
    assert done.exit_code == 0
    assert load()[name].claim in done.output


@pytest.mark.nightly
@pytest.mark.emulated
def test_a_bug_that_a_variant_puts_back_is_red(tmp_path):
    name = "hsave-not-set-before-vmrun"
    where = ["--results", tmp_path / "results"]
    assert nsvm("repro", "run", name, "--kernel", "6.1", *where).returncode == 0
    done = nsvm("repro", "run", name, "--kernel", f"6.1:{name}", *where)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"red    {name}" in done.stdout
