"""Running scenarios through `nsvm run` on a pool of hosts whose fates are written down."""

import signal
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner
from fake_pool import HEAD, FakePool, scenario_source

from harness.commands.run import command
from harness.report.results import read_results
from harness.runner import run as run_module


class Ran:
    """What one run left: its status, words, files and calls."""

    def __init__(self, result, directory, pools):
        assert result.exception is None or isinstance(result.exception, SystemExit), result
        self.status, self.output, self.stdout = result.exit_code, result.output, result.stdout
        self.pools, self.pool = pools, pools[0]
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

    def start(
        *options,
        pool=FakePool,
        pool_options=None,
        sources=None,
        name="scenarios.py",
        text="",
        jobs=1,
        **fates,
    ):
        pools = []

        def make(choice, **arguments):
            pools.append(pool(choice, **arguments, **(pool_options or {})))
            return pools[-1]

        monkeypatch.setattr(run_module, "HostPool", make)
        file = tmp_path / name
        written = sources or [scenario_source(case, fate) for case, fate in fates.items()]
        file.write_text(text or "\n".join([HEAD, *written]))
        directory = tmp_path / "results"
        where = ["--host", "emulated", "-j", str(jobs), "--results", str(directory)]
        arguments = [*where, *options, str(file)]
        result = CliRunner().invoke(command, arguments)
        return Ran(result, directory, pools)

    before = signal.getsignal(signal.SIGTERM)
    yield start
    signal.signal(signal.SIGTERM, before)
