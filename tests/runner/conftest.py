"""Running scenarios through `nsvm run` on a pool of hosts whose fates are written down."""

import signal
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner
from fake_pool import HEAD, FakePool, scenario_source

from harness.commands import run as run_module
from harness.report.results import read_results


class Ran:
    """What one run left: its status, words, files and calls."""

    def __init__(self, result, directory, pool):
        assert result.exception is None or isinstance(result.exception, SystemExit), result
        self.status, self.output, self.pool = result.exit_code, result.output, pool
        self.events = read_results(directory / "results.jsonl")
        self.junit = ElementTree.parse(directory / "junit.xml").getroot()

    @property
    def ends(self):
        return {e["case"]: e for e in self.events if e["event"] == "end"}

    @property
    def verdicts(self):
        return {case: end["verdict"] for case, end in self.ends.items()}

    def testcase(self, name):
        [found] = [c for c in self.junit.iter("testcase") if c.get("name") == name]
        return found


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return a function that runs scenarios, given as name=fate, on a fake pool."""

    def start(*options, pool_options=None, sources=None, name="scenarios.py", text="", **fates):
        pools = []

        def make(choice, **arguments):
            pools.append(FakePool(choice, **arguments, **(pool_options or {})))
            return pools[-1]

        monkeypatch.setattr(run_module, "HostPool", make)
        file = tmp_path / name
        written = sources or [scenario_source(case, fate) for case, fate in fates.items()]
        file.write_text(text or "\n".join([HEAD, *written]))
        directory = tmp_path / "results"
        arguments = ["--host", "emulated", "--results", str(directory), *options, str(file)]
        result = CliRunner().invoke(run_module.command, arguments)
        return Ran(result, directory, pools[0])

    before = signal.getsignal(signal.SIGTERM)
    yield start
    signal.signal(signal.SIGTERM, before)
