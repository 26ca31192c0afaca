"""The machine's lock: one run alone, or any number of those that share it; never both."""

import fcntl
import json
import multiprocessing
import os

import pytest

from harness.commands.peers import local_kvm
from harness.host import machine_lock as module
from harness.host.machine_lock import Busy, local_path, machine_lock, shared_machine_lock

DEADLINE_S = 60
EVE = {"who": "eve@far", "command": "nsvm send l2-npt"}
BOB = {"who": "bob@far", "command": "nsvm receive"}
RUN = {"who": "run@far", "command": "nsvm run", "run": "r1"}


def hold(path, owner, shares, has_it, enough, dies):
    how = shared_machine_lock if shares else machine_lock
    with how(path, owner):
        has_it.set()
        enough.wait(DEADLINE_S)
        if dies:
            os._exit(0)


@pytest.fixture
def other(tmp_path):
    """Return a function that has another process hold the lock; it gives one that ends that."""
    context = multiprocessing.get_context("spawn")
    made = []

    def begin(owner, *, shares, path=tmp_path / "lock", dies=False):
        has_it, enough = context.Event(), context.Event()
        arguments = (path, owner, shares, has_it, enough, dies)
        process = context.Process(target=hold, args=arguments)
        made.append((process, enough))
        process.start()
        assert has_it.wait(DEADLINE_S)

        def end():
            enough.set()
            process.join(DEADLINE_S)
            assert process.exitcode == 0

        return end

    yield begin
    for process, enough in made:
        enough.set()
        process.join(DEADLINE_S)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "lock"


def test_two_share_it_and_no_run_begins_until_both_have_ended(path, other):
    ends = [other(EVE, shares=True), other(BOB, shares=True)]
    said = r"^in use by eve@far \(nsvm send l2-npt\) and bob@far \(nsvm receive\); lock /.*/lock$"
    with pytest.raises(Busy, match=said), machine_lock(path, RUN, patience_s=0):
        pass
    ends[0]()
    with (
        pytest.raises(Busy, match=r"^in use by bob@far \(nsvm receive\); lock "),
        machine_lock(path, RUN, patience_s=0),
    ):
        pass
    ends[1]()
    assert path.read_text() == ""
    with machine_lock(path, RUN, patience_s=0) as stale:
        assert stale == {}


def test_nobody_shares_it_with_a_run(path, other):
    end = other(RUN, shares=False)
    with (
        pytest.raises(Busy, match=r"in use by run@far \(nsvm run\)"),
        shared_machine_lock(path, EVE, patience_s=0),
    ):
        pass
    end()
    with shared_machine_lock(path, EVE, patience_s=0):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert path.read_text() == ""


def test_what_a_run_left_that_died_is_still_told_to_the_next_run(path, other):
    """Those who share the lock in between clean nothing up."""
    other(RUN, shares=False, dies=True)()
    with shared_machine_lock(path, EVE), shared_machine_lock(path, BOB):
        pass
    with machine_lock(path, BOB) as stale:
        assert (stale["who"], stale["run"]) == ("run@far", "r1")
    assert path.read_text() == ""


def test_who_died_with_a_share_left_nothing_to_clean_up_and_is_not_named(path, other):
    other(BOB, shares=True, dies=True)()
    assert "bob@far" in path.read_text()
    end = other(EVE, shares=True)
    with (
        pytest.raises(Busy, match=r"^in use by eve@far \(nsvm send l2-npt\); lock "),
        machine_lock(path, RUN, patience_s=0),
    ):
        pass
    end()
    with machine_lock(path, RUN, patience_s=0) as stale:
        assert stale == {}


def test_a_share_within_a_run_of_the_same_process_is_part_of_it(path):
    with machine_lock(path, RUN), shared_machine_lock(path, EVE, patience_s=0):
        assert json.loads(path.read_text())["who"] == "run@far"


def test_lines_that_are_none_are_nobody_known(path):
    path.write_text('no json\n\n[1]\n{"shares": true}\n{"shares": true, "pid": "x"}\n')
    with path.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with (
            pytest.raises(Busy, match=r"^in use by somebody who wrote no proper line and "),
            shared_machine_lock(path, EVE, patience_s=0),
        ):
            pass


@pytest.fixture
def own_machine(monkeypatch, path):
    monkeypatch.setenv(module.VARIABLE, str(path))
    assert local_path() == path


@pytest.mark.usefixtures("own_machine", "kvm")
@pytest.mark.kvm
def test_both_ends_of_a_migration_may_be_on_one_machine_and_not_beside_a_run(path, other):
    # A run of another process is refused so, too; here these two themselves are in its way.
    with (
        local_kvm(),
        local_kvm(),
        pytest.raises(Busy, match="in use by "),
        machine_lock(path, RUN, patience_s=0),
    ):
        pass
    end = other(RUN, shares=False)
    with pytest.raises(Busy, match=r"in use by run@far \(nsvm run\)"), local_kvm():
        pass
    end()
    with local_kvm():
        pass
