"""The results store: every run in one SQLite file, whichever host it is from.

Tables (``PRAGMA user_version`` is SCHEMA_VERSION):

run          one line per run; `id` is of the run's first event, so that importing again changes
             nothing. `finished` is 0 for a run without an end: it died, or is still going on.
             `host` and `kernel` are what reports call them; argv, machine, choice (what was asked
             for) and complaints are JSON
environment  what a case ran on, as JSON, once however many cases ran on it; `id` is of its content
outcome      how one case ended, once; `repeat` counts from 1 with --repeat
evidence     longer texts (traceback, kernel log, ...) of outcomes that are not PASS or SKIP
measured     figures that cases noted; the names and units are those of `run_record.METRICS`

Times are seconds since the epoch, durations are seconds. A store of another version is refused.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from harness.errors import HostError
from harness.report.run_record import (
    CaseRecord,
    Measured,
    ResultsError,
    RunRecord,
    find_results,
    read_record,
)
from harness.report.verdict import Verdict

FILE = "nsvm.sqlite"

SCHEMA_VERSION = 1

_SCHEMA = """
CREATE TABLE run (
    id TEXT PRIMARY KEY, directory TEXT NOT NULL, started REAL NOT NULL, finished INTEGER NOT NULL,
    seconds REAL NOT NULL, version TEXT NOT NULL, revision TEXT NOT NULL, argv TEXT NOT NULL,
    machine TEXT NOT NULL, choice TEXT NOT NULL, complaints TEXT NOT NULL,
    host TEXT NOT NULL, kernel TEXT NOT NULL
) STRICT;
CREATE INDEX run_started ON run (started);
CREATE TABLE environment (id TEXT PRIMARY KEY, description TEXT NOT NULL) STRICT;
CREATE TABLE outcome (
    run TEXT NOT NULL REFERENCES run (id) ON DELETE CASCADE, "case" TEXT NOT NULL,
    repeat INTEGER NOT NULL, verdict TEXT NOT NULL, reason TEXT NOT NULL, known TEXT NOT NULL,
    claim TEXT NOT NULL, levels INTEGER NOT NULL, seconds REAL NOT NULL,
    environment TEXT REFERENCES environment (id),
    PRIMARY KEY (run, "case", repeat)
) STRICT;
CREATE TABLE evidence (
    run TEXT NOT NULL REFERENCES run (id) ON DELETE CASCADE, "case" TEXT NOT NULL,
    repeat INTEGER NOT NULL, title TEXT NOT NULL, text TEXT NOT NULL,
    PRIMARY KEY (run, "case", repeat, title)
) STRICT;
CREATE TABLE measured (
    run TEXT NOT NULL REFERENCES run (id) ON DELETE CASCADE, "case" TEXT NOT NULL,
    metric TEXT NOT NULL, value REAL NOT NULL
) STRICT;
CREATE INDEX measured_run ON measured (run);
"""

#: Another process may be writing: an import of a whole run takes a part of a second.
_BUSY_S = 30.0


class StoreError(HostError):
    """The store cannot be used; one line says why."""


class Store:
    """An open store; a context manager that closes it."""

    def __init__(self, path: Path | None) -> None:
        """Open the store, made if need be; None: in memory, for one report.

        Raises:
            StoreError: it cannot be opened or made, or is no store of this version.
        """
        self.path = path
        with self._reported():
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path or ":memory:", timeout=_BUSY_S, isolation_level=None)
            try:
                self._prepare()
            except BaseException:
                self._db.close()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    def add(self, record: RunRecord) -> None:
        """Put a run in; one that is there already is replaced by what is known of it now.

        Raises:
            StoreError: it cannot be written.
        """
        with self._writing() as db:
            db.execute("DELETE FROM run WHERE id = ?", [record.id])
            db.execute(f"INSERT INTO run VALUES ({_marks(13)})", _run_row(record))
            for case in record.cases:
                self._add_case(db, record.id, case)
            db.executemany(
                "INSERT INTO measured VALUES (?, ?, ?, ?)",
                [(record.id, m.case, m.metric, m.value) for m in record.measured],
            )

    def merge(self, other: Path) -> int:
        """Take over the runs of another store that this one does not have; return how many.

        Raises:
            StoreError: it is no store of this version.
        """
        with Store(other) as source:
            have = set(self.run_ids())
            new = [run for run in source.run_ids() if run not in have]
            for run in new:
                self.add(source.load(run, evidence=True))
        return len(new)

    def add_results(self, path: Path) -> int:
        """Import results: a results file, directories of runs, or another store; return how many.

        Raises:
            ResultsError, StoreError: there are none, or they cannot be read.
        """
        if path.is_file() and path.suffix == Path(FILE).suffix:
            return self.merge(path)
        files = find_results(path) if path.exists() else [path]
        records = [read_record(file) for file in files]
        for record in records:
            self.add(record)
        return len(records)

    def refresh(self) -> None:
        """Read again what has no end: it may have got one, or at least further, since.

        Raises:
            StoreError: the store cannot be written.
        """
        with self._reported():
            rows = self._db.execute("SELECT id, directory FROM run WHERE NOT finished").fetchall()
        for run, directory in rows:
            for record in _records_in(Path(directory)):
                if record.id == run:
                    self.add(record)

    def run_ids(self) -> list[str]:
        """Return all runs, oldest first."""
        with self._reported():
            return [row[0] for row in self._db.execute("SELECT id FROM run ORDER BY started, id")]

    def heads(self) -> list[tuple[str, str, str]]:
        """Return the id, host and kernel of all runs, oldest first."""
        with self._reported():
            return self._db.execute(
                "SELECT id, host, kernel FROM run ORDER BY started, id"
            ).fetchall()

    def load(self, run: str, *, evidence: bool = False) -> RunRecord:
        """Return a run; with its evidence if that is asked for.

        Raises:
            StoreError: there is no such run, or the store is damaged.
        """
        with self._reported():
            row = self._db.execute("SELECT * FROM run WHERE id = ?", [run]).fetchone()
            if row is None:
                raise StoreError(f"{self}: no run {run}")
            texts = self._evidence(run) if evidence else {}
            return RunRecord(
                row[0], Path(row[1]), row[2], bool(row[3]), row[4], row[5], row[6],
                tuple(json.loads(row[7])), json.loads(row[8]), json.loads(row[9]),
                tuple(json.loads(row[10])), list(self._cases(run, texts)),
                list(self._measured(run)),
            )  # fmt: skip

    def evidence_of(self, run: str, case: CaseRecord) -> dict[str, str]:
        """Return the longer texts of one outcome, by title."""
        with self._reported():
            return dict(
                self._db.execute(
                    'SELECT title, text FROM evidence WHERE run = ? AND "case" = ? AND repeat = ?',
                    [run, case.case, case.repeat],
                ).fetchall()
            )

    def __str__(self) -> str:
        return f"results store {self.path}" if self.path else "results store in memory"

    def _prepare(self) -> None:
        self._db.execute("PRAGMA foreign_keys = ON")
        if self._version() == SCHEMA_VERSION:
            return
        with self._writing() as db:
            # Asked again: two processes may make it at once, and the second finds it made.
            version = self._version()
            if version == SCHEMA_VERSION:
                return
            if version or db.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]:
                raise StoreError(f"{self}: its version is {version}, not {SCHEMA_VERSION}")
            for statement in _SCHEMA.split(";"):
                db.execute(statement)
            db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def _version(self) -> int:
        return int(self._db.execute("PRAGMA user_version").fetchone()[0])

    def _add_case(self, db: sqlite3.Connection, run: str, case: CaseRecord) -> None:
        environment = None
        if case.host is not None:
            description = json.dumps(case.host, sort_keys=True)
            environment = hashlib.sha256(description.encode()).hexdigest()[:16]
            db.execute(
                "INSERT OR IGNORE INTO environment VALUES (?, ?)", [environment, description]
            )
        db.execute(
            f"INSERT INTO outcome VALUES ({_marks(10)})",
            [run, case.case, case.repeat, case.verdict.value, case.reason, case.known, case.claim,
             case.levels, case.seconds, environment],
        )  # fmt: skip
        if case.verdict in (Verdict.PASS, Verdict.SKIP):
            return
        db.executemany(
            "INSERT INTO evidence VALUES (?, ?, ?, ?, ?)",
            [(run, case.case, case.repeat, *item) for item in case.evidence.items()],
        )

    def _cases(
        self, run: str, texts: Mapping[tuple[str, int], Mapping[str, str]]
    ) -> Iterator[CaseRecord]:
        hosts = {
            key: json.loads(text)
            for key, text in self._db.execute(
                "SELECT id, description FROM environment WHERE id IN"
                " (SELECT environment FROM outcome WHERE run = ?)",
                [run],
            )
        }
        rows = self._db.execute(
            'SELECT "case", verdict, reason, known, repeat, claim, levels, seconds, environment'
            " FROM outcome WHERE run = ? ORDER BY rowid",
            [run],
        )
        for case, verdict, reason, known, repeat, claim, levels, seconds, environment in rows:
            yield CaseRecord(
                case, Verdict(verdict), reason, known, repeat, claim, levels, seconds,
                hosts.get(environment), texts.get((case, repeat), {}),
            )  # fmt: skip

    def _evidence(self, run: str) -> dict[tuple[str, int], dict[str, str]]:
        found: dict[tuple[str, int], dict[str, str]] = {}
        query = 'SELECT "case", repeat, title, text FROM evidence WHERE run = ?'
        for case, repeat, title, text in self._db.execute(query, [run]):
            found.setdefault((case, repeat), {})[title] = text
        return found

    def _measured(self, run: str) -> Iterator[Measured]:
        query = 'SELECT "case", metric, value FROM measured WHERE run = ?'
        return (Measured(*row) for row in self._db.execute(query, [run]))

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """Give the database in a transaction: all of it, or nothing."""
        with self._reported():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.rollback()
                raise
            self._db.commit()

    @contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, UnicodeEncodeError) as e:
            raise StoreError(f"{self}: {e}") from e
        except OSError as e:
            raise StoreError(f"{self}: {e.strerror}") from e
        except (ValueError, TypeError, KeyError) as e:
            raise StoreError(f"{self}: damaged ({type(e).__name__}: {e})") from e


def _marks(count: int) -> str:
    return ", ".join("?" * count)


def _run_row(record: RunRecord) -> Sequence[Any]:
    return [
        record.id, str(record.directory), record.started, int(record.finished), record.seconds,
        record.version, record.revision, json.dumps(record.argv), json.dumps(record.machine),
        json.dumps(record.choice), json.dumps(record.complaints), record.host_name, record.kernel,
    ]  # fmt: skip


def _records_in(directory: Path) -> Iterator[RunRecord]:
    """Yield what can be read; the store keeps what it has of the rest."""
    if not directory.is_dir():
        return
    for file in sorted(directory.glob("results*.jsonl")):
        try:
            yield read_record(file)
        except ResultsError:
            continue
