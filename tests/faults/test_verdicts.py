"""The verdict table over real errors, each provoked; and no fault of the world ends in the quarantine."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import apsw
import deltalake
import duckdb
import psycopg
import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from headrace.destinations import duckdb as duckdb_destination
from headrace.destinations.duckdb import DuckDBDestination
from headrace.destinations.postgres import PostgresDestination
from headrace.errors import Verdict, verdict_of
from headrace.protocols import Destination, Part, Slice
from headrace.secret import Secret
from headrace.testing.destinations import NUMBERS, row, slice_of, staged
from headrace.testing.postgres import PostgresServer
from headrace.transform import model as models

RETRY, QUARANTINE, SUSPEND = Verdict.RETRY, Verdict.QUARANTINE, Verdict.SUSPEND


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    with PostgresServer(tmp_path_factory.mktemp("verdicts") / "pg") as started:
        with psycopg.connect(started.url, autocommit=True) as db:
            db.execute("CREATE TABLE p (id int PRIMARY KEY, v int NOT NULL CHECK (v < 100))")
            db.execute("CREATE TABLE f (id int REFERENCES p); INSERT INTO p VALUES (1, 1), (2, 2)")
        yield started


def raised(act: Callable[[], object]) -> BaseException:
    with pytest.raises(BaseException) as caught:  # noqa: PT011 - its class is what is judged
        act()
    return caught.value


# ------------------------------------------------------------------------------------ Postgres


@pytest.mark.parametrize(
    ("statement", "state", "verdict"),
    [
        ("SELECT 1/0", "22012", QUARANTINE),
        ("SELECT 'x'::int", "22P02", QUARANTINE),
        ("SELECT 99999999999::int", "22003", QUARANTINE),
        ("SELECT '2001-02-30'::date", "22008", QUARANTINE),
        ("SELECT '\\xff'::bytea::text::json", "22P02", QUARANTINE),
        ("INSERT INTO p VALUES (1, 1)", "23505", QUARANTINE),
        ("INSERT INTO p VALUES (3, NULL)", "23502", QUARANTINE),
        ("INSERT INTO p VALUES (3, 100)", "23514", QUARANTINE),
        ("INSERT INTO f VALUES (9)", "23503", QUARANTINE),
        ("SELECT nothing FROM p", "42703", SUSPEND),
        ("SELECT * FROM nowhere", "42P01", SUSPEND),
        ("SELEC", "42601", SUSPEND),
        ("SET ROLE nobody; SELECT * FROM p", "42501", SUSPEND),
        ("SET statement_timeout = 50; SELECT pg_sleep(9)", "57014", RETRY),
        ("SET transaction_read_only = on; INSERT INTO p VALUES (9, 9)", "25006", RETRY),
        ("SET temp_file_limit = '64kB'; SET work_mem = '64kB'; "
         "SELECT count(*) FROM (SELECT FROM generate_series(1, 99999) ORDER BY random()) s", "53400", RETRY),
        ("SELECT pg_terminate_backend(pg_backend_pid())", "57P01", RETRY),
    ],
)  # fmt: skip
def test_what_postgres_says(server: PostgresServer, statement: str, state: str, verdict: Verdict) -> None:
    with psycopg.connect(server.url, autocommit=True) as db:
        db.execute("DO $$ BEGIN CREATE ROLE nobody; EXCEPTION WHEN duplicate_object THEN END $$")

        def act() -> None:
            db.execute("BEGIN")
            for part in statement.split("; "):
                db.execute(part.encode())

        error = raised(act)
    assert isinstance(error, psycopg.Error)
    assert (error.sqlstate, verdict_of(error)) == (state, verdict)


def test_two_who_wait_for_each_other_and_what_cannot_be_serial_pass(server: PostgresServer) -> None:
    with psycopg.connect(server.url) as one, psycopg.connect(server.url) as two:
        one.execute("UPDATE p SET v = 3 WHERE id = 1")
        two.execute("SET LOCAL deadlock_timeout = 50")
        two.execute("UPDATE p SET v = 3 WHERE id = 2")
        first: list[BaseException] = []

        def cross() -> None:
            try:
                one.execute("UPDATE p SET v = 3 WHERE id = 2")
            except psycopg.Error as error:
                first.append(error)

        waiting = threading.Thread(target=cross)
        waiting.start()
        time.sleep(0.3)
        try:
            two.execute("UPDATE p SET v = 3 WHERE id = 1")
        except psycopg.Error as error:
            first.append(error)
            two.rollback()
        waiting.join()
        (error,) = first
        assert (error.sqlstate, verdict_of(error)) == ("40P01", RETRY)  # type: ignore[attr-defined]
        one.rollback()
        two.rollback()
        one.isolation_level = two.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        one.execute("SELECT * FROM p")
        two.execute("UPDATE p SET v = 4 WHERE id = 1")
        two.commit()
        error = raised(lambda: one.execute("UPDATE p SET v = 5 WHERE id = 1"))
        assert (error.sqlstate, verdict_of(error)) == ("40001", RETRY)  # type: ignore[attr-defined]
        one.rollback()
        two.execute("LOCK TABLE p")
        one.execute("SET lock_timeout = 50")
        error = raised(lambda: one.execute("SELECT * FROM p"))
        assert (error.sqlstate, verdict_of(error)) == ("55P03", RETRY)  # type: ignore[attr-defined]


def test_a_server_that_is_away_or_full_passes(server: PostgresServer) -> None:
    assert verdict_of(raised(lambda: psycopg.connect("postgresql://127.0.0.1:1/x"))) is RETRY
    with psycopg.connect(server.url) as db:
        with socket.socket(fileno=os.dup(db.fileno())) as line:
            line.shutdown(socket.SHUT_RDWR)
        assert verdict_of(raised(lambda: db.execute("SELECT 1"))) is RETRY


# -------------------------------------------------------------------------------------- DuckDB


def transactions_in_conflict(db: duckdb.DuckDBPyConnection) -> None:
    db.execute("CREATE TABLE c (i INT); INSERT INTO c VALUES (1)")
    other = db.cursor()
    db.execute("BEGIN; UPDATE c SET i = 2")
    other.execute("BEGIN; UPDATE c SET i = 3")


def without_memory(db: duckdb.DuckDBPyConnection) -> None:
    db.execute("SET memory_limit = '10MB'; SET max_temp_directory_size = '0B'")
    db.execute("CREATE TABLE m AS SELECT n, repeat(n::VARCHAR, 100) AS t FROM range(1000000) r(n)")


def interrupted(db: duckdb.DuckDBPyConnection) -> None:
    threading.Timer(0.1, db.interrupt).start()
    db.execute("SELECT sum(a.n * b.n) FROM range(100000000) a(n), range(100000000) b(n)").fetchall()


@pytest.mark.parametrize(
    ("act", "kind", "verdict"),
    [
        ("SELECT 'x'::INT", duckdb.ConversionException, QUARANTINE),
        ("SELECT 100::TINYINT + 100::TINYINT", duckdb.OutOfRangeException, QUARANTINE),
        ("CREATE TABLE k (i INT UNIQUE); INSERT INTO k VALUES (1), (1)", duckdb.ConstraintException,
         QUARANTINE),
        ("SELECT nothing FROM range(1)", duckdb.BinderException, SUSPEND),
        ("SELECT * FROM nowhere", duckdb.CatalogException, SUSPEND),
        ("SELEC", duckdb.ParserException, SUSPEND),
        ("SELECT error('x')", duckdb.InvalidInputException, SUSPEND),
        ("ATTACH '/no/such/folder/x.duckdb'", duckdb.IOException, RETRY),
        ("COPY (SELECT 1) TO '/proc/version'", duckdb.IOException, RETRY),
        (transactions_in_conflict, duckdb.TransactionException, RETRY),
        (without_memory, duckdb.OutOfMemoryException, RETRY),
        (interrupted, duckdb.InterruptException, RETRY),
    ],
)  # fmt: skip
def test_what_duckdb_says(act: Any, kind: type[Exception], verdict: Verdict) -> None:
    with duckdb.connect() as db:
        error = raised(lambda: act(db) if callable(act) else db.execute(act).fetchall())
    assert isinstance(error, kind), error
    assert verdict_of(error) is verdict


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Another process has a DuckDB file open."""
    code = f"import duckdb, time; db = duckdb.connect({str(path)!r}); print(1, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        yield
        holder.kill()


def test_a_file_that_another_process_has_passes(tmp_path: Path) -> None:
    with held(tmp_path / "held.duckdb"):
        assert verdict_of(raised(lambda: duckdb.connect(str(tmp_path / "held.duckdb")))) is RETRY


# -------------------------------------------------------------- Arrow, Delta, SQLite and Python


@contextlib.contextmanager
def full_disk(left: int) -> Iterator[None]:
    """No file of this process can grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (left, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_what_arrow_and_python_say() -> None:
    assert verdict_of(raised(lambda: pa.allocate_buffer(1 << 60))) is RETRY
    assert verdict_of(raised(lambda: pa.memory_map("/no/such/file"))) is RETRY
    assert verdict_of(raised(lambda: bytearray(1 << 60))) is RETRY
    assert verdict_of(raised(lambda: socket.create_connection(("127.0.0.1", 1)))) is RETRY
    assert verdict_of(raised(lambda: Path("/proc/version").write_text("x"))) is RETRY
    # What is no fault of the world, and of no record that anybody knows.
    assert verdict_of(raised(lambda: pa.array(["x"]).cast(pa.int64()))) is SUSPEND
    assert verdict_of(raised(lambda: 1 // 0)) is SUSPEND


def test_what_delta_says(tmp_path: Path, unwritable: Any) -> None:
    path, rows = str(tmp_path / "t"), pa.table({"i": [1], "t": ["x" * 10]})
    write_deltalake(path, rows)
    with unwritable(tmp_path / "t"), unwritable(tmp_path / "t" / "_delta_log"):
        assert verdict_of(raised(lambda: write_deltalake(path, rows, mode="append"))) is RETRY
    incompressible = pa.table({"i": [1], "t": [os.urandom(1 << 20).hex()]})
    with full_disk(100_000):
        assert verdict_of(raised(lambda: write_deltalake(path, incompressible, mode="append"))) is RETRY
    assert verdict_of(raised(lambda: DeltaTable(str(tmp_path / "nowhere")))) is RETRY
    first, second = DeltaTable(path), DeltaTable(path)
    first.delete()
    error = raised(second.delete)
    assert isinstance(error, deltalake.exceptions.CommitFailedError)
    assert verdict_of(error) is RETRY
    error = raised(lambda: write_deltalake(path, pa.table({"other": [1.5]}), mode="append"))
    assert verdict_of(error) is SUSPEND, type(error)


def test_what_sqlite_says(tmp_path: Path) -> None:
    with contextlib.closing(apsw.Connection(str(tmp_path / "s.db"))) as db:
        db.execute("CREATE TABLE t (b)")
        other = apsw.Connection(str(tmp_path / "s.db"))
        db.execute("BEGIN IMMEDIATE")
        assert verdict_of(raised(lambda: other.execute("BEGIN IMMEDIATE"))) is RETRY
        db.execute("COMMIT")
        other.close()
        with full_disk(20_000):
            assert verdict_of(raised(lambda: db.execute("INSERT INTO t VALUES (zeroblob(1000000))"))) is RETRY
        assert verdict_of(raised(lambda: db.execute("SELECT nothing FROM t"))) is SUSPEND
    assert verdict_of(raised(lambda: apsw.Connection("/no/such/folder/s.db"))) is RETRY


# ------------------------------------------------- a fault amid a slice with good and bad rows

ROWS = [row(1, "1"), row(2, "bad"), row(3, "3"), row(4, "worse")]


def interfering(fault: Callable[[], object], *, rows: Any = ROWS) -> Slice:
    """A slice of which a good and a bad row are applied when the fault comes, and others follow."""
    changes = staged(NUMBERS, rows, 1)

    def parts() -> Iterator[Part]:
        yield Part(NUMBERS, NUMBERS.prepare(changes.slice(0, 2)), True)
        fault()
        yield Part(NUMBERS, NUMBERS.prepare(changes.slice(2)), True)

    return replace(slice_of(1, size=1), parts=parts())


def assert_nothing_came_of_it_and_then_all_does(destination: Destination, error: BaseException) -> None:
    assert verdict_of(error) is RETRY, repr(error)
    count = "SELECT count(*) FROM headrace.quarantine"
    asked = [f"{count} WHERE status <> 'x'", "SELECT sum(quarantined) FROM headrace.ledger"]
    records, ledger = destination.read(asked)
    assert (records.column(0)[0].as_py(), int(ledger.column(0)[0].as_py())) == (0, 0)
    progress = destination.progress("shop")
    assert progress is not None
    assert progress.offset == 1
    destination.apply(interfering(lambda: None))
    (keys,) = destination.read(["SELECT key, stage FROM headrace.quarantine ORDER BY key"])
    assert keys.to_pylist() == [{"key": "2", "stage": "transform"}, {"key": "4", "stage": "transform"}]


@pytest.mark.parametrize("fault", ["killed", "locked", "read only", "timeout", "restarted"])
def test_no_fault_of_postgres_makes_a_record(server: PostgresServer, fault: str) -> None:
    name = "w" + "".join(filter(str.isalpha, fault))
    with psycopg.connect(server.url, autocommit=True) as db:
        db.execute(f"CREATE DATABASE {name}".encode())
    url = server.url.removesuffix("postgres") + name
    timeout = 0.5 if fault == "timeout" else 60.0
    destination = PostgresDestination(Secret(url), lock_timeout=0.3, statement_timeout=timeout)
    destination.apply(slice_of(0, (NUMBERS, [row(9, "9")])))
    target = destination.table_of(NUMBERS.name)
    others: list[psycopg.Connection[Any]] = []

    def interfere() -> None:
        with psycopg.connect(url, autocommit=True) as db:
            if fault == "read only":
                db.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on".encode())
            if fault in ("killed", "read only"):
                db.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE datname = current_database() AND pid <> pg_backend_pid()"
                )
        if fault == "restarted":
            server.stop()
            server.start()

    if fault in ("locked", "timeout"):
        others.append(psycopg.connect(url))
        others[0].execute(f"LOCK TABLE {target}".encode())
    if fault == "timeout":
        destination = PostgresDestination(Secret(url), lock_timeout=0, statement_timeout=0.3)
    error = raised(lambda: destination.apply(interfering(interfere)))
    if fault == "read only":
        destination.close()
        error = raised(lambda: destination.apply(interfering(lambda: None)))
        with psycopg.connect(
            f"{url}?options=-c%20default_transaction_read_only%3Doff", autocommit=True
        ) as db:
            db.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only".encode())
        destination.close()
    for other in others:
        other.close()
    assert_nothing_came_of_it_and_then_all_does(destination, error)
    destination.close()


@pytest.mark.parametrize("fault", ["no memory", "full disk", "held"])
def test_no_fault_of_duckdb_makes_a_record(
    tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    destination = DuckDBDestination(tmp_path / "w.duckdb")
    destination.apply(slice_of(0, (NUMBERS, [row(9, "9")])))
    many = [*ROWS, *(row(n, str(n)) for n in range(10, 400_000))]
    if fault == "held":
        destination.close()
        with held(destination.path):
            error = raised(lambda: destination.apply(interfering(lambda: None)))
    elif fault == "full disk":
        with full_disk(300_000):
            error = raised(lambda: destination.apply(interfering(lambda: None, rows=many)))
    else:
        monkeypatch.setattr(duckdb_destination, "MEMORY", 1 << 20)
        starved = DuckDBDestination(tmp_path / "w.duckdb", spill=Path("/proc/no"))
        destination.close()
        error = raised(lambda: starved.apply(interfering(lambda: None, rows=many)))
        starved.close()
        monkeypatch.undo()
    assert_nothing_came_of_it_and_then_all_does(destination, error)
    destination.close()


def test_an_engine_with_little_memory_in_prepare_judges_by_halves_and_blames_no_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changes = staged(NUMBERS, [*ROWS, *(row(n, str(n) * 5) for n in range(10, 100_000))], 1)
    expected = NUMBERS.prepare(changes)
    with duckdb.connect() as starved:
        starved.execute("SET memory_limit = '1MB'; SET max_temp_directory_size = '0B'; SET threads = 1")
        monkeypatch.setattr(models, "engine", starved.cursor)
        made = NUMBERS.prepare(changes)
    assert made.records.drop_columns("preview").equals(expected.records.drop_columns("preview"))
    assert made.counts == expected.counts
