"""The results store: what goes in comes out, once, whoever puts it in."""

import sqlite3
import threading
from dataclasses import replace

import pytest
from nights import begin, end, note, write_run

from harness.report.run_record import ResultsError, read_record
from harness.report.store import Store, StoreError


@pytest.fixture
def record(tmp_path):
    events = [
        begin("a"),
        note("a", "bytes per vCPU", on=1),
        end("a"),
        end("a", "FAIL", "no", repeat=2, traceback="text"),
        end("b", "MISS", host=None),
    ]
    return read_record(write_run(tmp_path / "run", events))


def test_what_is_put_in_comes_out(tmp_path, record):
    with Store(tmp_path / "s.sqlite") as store:
        store.add(record)
    with Store(tmp_path / "s.sqlite") as store:
        assert store.run_ids() == [record.id]
        assert store.load(record.id, evidence=True) == record
        assert store.evidence_of(record.id, record.cases[1]) == {"traceback": "text"}


def test_importing_again_changes_nothing(tmp_path, record):
    with Store(None) as store:
        assert store.add_results(tmp_path) == store.add_results(tmp_path) == 1
        assert len(store.run_ids()) == 1
        assert len(store.load(record.id).cases) == 3


def test_directories_below_and_files_kept_aside_are_imported(tmp_path):
    for name in ("one", "deep/two"):
        write_run(tmp_path / name, [end("a")], machine=name)
    (write_run(tmp_path / "x", [end("a")]) / "results.jsonl").rename(tmp_path / "results.1.jsonl")
    with Store(None) as store:
        assert store.add_results(tmp_path) == 3


def test_another_store_is_merged(tmp_path, record):
    with Store(tmp_path / "other.sqlite") as other:
        other.add(record)
        other.add(replace(record, id="second"))
    with Store(None) as store:
        store.add(record)
        assert store.add_results(tmp_path / "other.sqlite") == 1
        assert store.load("second", evidence=True).cases == record.cases


def test_a_run_without_an_end_is_read_again(tmp_path):
    run = write_run(tmp_path / "run", [begin("a")], finished=False)
    with Store(tmp_path / "s.sqlite") as store:
        store.add_results(run)
        write_run(run, [begin("a"), end("a")])
        store.refresh()
        [found] = [store.load(run_id) for run_id in store.run_ids()]
    assert found.finished
    assert found.cases[0].word == "PASS"


def test_what_was_recorded_stays_when_its_directory_is_gone(tmp_path):
    run = write_run(tmp_path / "run", [end("a")], finished=False)
    with Store(tmp_path / "s.sqlite") as store:
        store.add_results(run)
        (run / "results.jsonl").unlink()
        store.refresh()
        assert len(store.load(store.run_ids()[0]).cases) == 1


def test_several_at_once(tmp_path, record):
    errors = []

    def put(number):
        try:
            with Store(tmp_path / "s.sqlite") as store:
                store.add(replace(record, id=f"run{number}"))
        except StoreError as e:
            errors.append(e)

    threads = [threading.Thread(target=put, args=[n]) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    with Store(tmp_path / "s.sqlite") as store:
        assert len(store.run_ids()) == 8


def test_half_a_run_is_never_in(tmp_path, record):
    twice = replace(record, cases=[*record.cases, record.cases[0]])
    with Store(tmp_path / "s.sqlite") as store:
        with pytest.raises(StoreError, match="UNIQUE"):
            store.add(twice)
        assert store.run_ids() == []


def other_version(path):
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()


def foreign(path):
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE mine (x)")
    db.close()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: path.write_text("no database" * 100), "not a database"),
        (lambda path: path.mkdir(), "unable to open"),
        (other_version, "version is 99"),
        (foreign, "version is 0"),
    ],
)
def test_what_is_no_store_is_one_line_and_untouched(tmp_path, make, says):
    path = tmp_path / "s.sqlite"
    make(path)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(StoreError, match=says) as raised:
        Store(path)
    assert "\n" not in str(raised.value)
    assert before is None or path.read_bytes() == before


def test_nothing_to_import_is_one_line(tmp_path):
    with Store(None) as store:
        for path in (tmp_path, tmp_path / "none"):
            with pytest.raises(ResultsError, match=r"results\.jsonl"):
                store.add_results(path)
