"""Where the results of a run go."""

import pytest

from harness.errors import HostError
from harness.runner.hosts import HostChoice
from harness.runner.run import Run, RunOptions


def directory(**options):
    choice = HostChoice("emulated", None, None)
    return Run(RunOptions(choice=choice, **options)).directory


def test_two_runs_of_one_second_have_a_directory_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = [directory() for _ in range(5)]
    assert len(set(made)) == 5
    assert all(path.is_dir() for path in made)


def test_a_directory_that_cannot_be_made_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").write_text("a file\n")
    with pytest.raises(HostError, match=r"cannot make results/\d+T\d+Z: Not a directory"):
        directory()
