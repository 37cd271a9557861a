"""COPY … TO STDOUT on real servers: values are those of the stream; what comes in the middle of a read."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pyarrow as pa
import pytest
from psycopg import pq
from test_values import BUILT_IN

from headrace.change import TableId
from headrace.config import Project, load_project
from headrace.protocols import Log
from headrace.sources.postgres import copier, copyout
from headrace.sources.postgres.connection import connect_copy
from headrace.sources.postgres.pgoutput import Decoder, Rows
from headrace.sources.postgres.reader import Reader
from headrace.sources.postgres.tables import read_states
from headrace.testing.postgres import PostgresServer
from headrace.verify import verify
from pipelines import running, until

NUMBERS = "SELECT id, repeat('x', 100) FROM public.numbers"
CELLS = [
    None, "", " ", "\\N", "\\", "\\\\", "\\.", ".", "\\n", "\\t", "\t", "\n", "\r\n", "\b\f\v", "a\tb\nc\\",
    "NULL", "null", "N", "\\x41", "\\101", "tail\\", "\\\t", "\\\n", "1234567\\", "12345678\t9", "\x01\x7f",
    "東京 🚰 é e\u0301", "\U0010ffff\ufeff\u2028", "x" * 300_000, "\\" * 100_000, "\t\n" * 100_000,
]  # fmt: skip


@pytest.fixture(scope="module", params=[16, 18])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[PostgresServer]:
    with PostgresServer(tmp_path_factory.mktemp("copyout") / "pg", request.param) as running:
        running.psql(
            "CREATE TABLE numbers (id int PRIMARY KEY); INSERT INTO numbers SELECT generate_series(1, 200000)"
        )
        yield running


@pytest.fixture(autouse=True)
def way(server: PostgresServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """Read directly from one server, and through psycopg from the other."""
    if server.version == 18:
        assert copyout.libpq() is not None, "what is installed has psycopg's native part"
        return "direct"
    monkeypatch.setattr(copyout, "libpq", lambda: None)
    return "through psycopg"


@pytest.fixture
def db(server: PostgresServer) -> Iterator[psycopg.Connection[Any]]:
    with closing(connect_copy(server.url)) as connection:
        yield connection


def rows_of(batches: list[pa.RecordBatch]) -> list[tuple[str | None, ...]]:
    return [tuple(row.values()) for batch in batches for row in batch.to_pylist()]


def stage_of(log: Log, table: str) -> str:
    state = read_states(log).get(TableId("public", table))
    return state.stage if state else ""


def streamed(server: PostgresServer, slot: str, publication: str) -> list[tuple[str | None, ...]]:
    """The rows that the stream brings, as the decoder has them."""
    decoder = Decoder()
    with closing(connect_copy(server.url)) as db:
        query = (
            f"SELECT data FROM pg_logical_slot_get_binary_changes('{slot}', NULL, NULL, "
            f"'proto_version', '1', 'publication_names', '{publication}')"
        )
        for (message,) in db.execute(query.encode()).fetchall():
            decoder.push(message)
        db.execute(f"SELECT pg_drop_replication_slot('{slot}')".encode())
    batches = [event.batch for event in decoder.take()[1] if isinstance(event, Rows)]
    return [row[4:] for row in rows_of(batches)]


def test_every_value_is_what_the_stream_sends(
    server: PostgresServer, db: psycopg.Connection[Any], way: str
) -> None:
    types = {"text": CELLS} | {
        type_: values
        for type_, values in BUILT_IN.items()
        if type_ != "text" and "mood" not in " ".join(values) and "Oth.er" not in " ".join(values)
    }
    columns = {f'"c {i}\t""{i}"': type_ for i, type_ in enumerate(types)}
    server.psql("DROP PUBLICATION IF EXISTS p; DROP TABLE IF EXISTS valued")
    with psycopg.connect(server.url, autocommit=True) as writer:
        defined = ", ".join(f"{name} {type_}" for name, type_ in columns.items())
        writer.execute(f"CREATE TABLE valued (id int PRIMARY KEY, {defined})".encode())
        writer.execute("CREATE PUBLICATION p FOR TABLE valued")
        writer.execute("SELECT pg_create_logical_replication_slot('values', 'pgoutput')")
        rows = max(map(len, types.values()))
        placed = ", ".join(f"%s::{type_}" for type_ in types)
        for n in range(rows + 1):
            cells = [values[n] if n < len(values) else None for values in types.values()]
            writer.execute(f"INSERT INTO valued VALUES (%s, {placed})".encode(), [n, *cells])
    names = ["id", *columns]
    query = f"SELECT {', '.join(names)} FROM public.valued ORDER BY id"
    copied = rows_of(list(copyout.copy_out(db, query, names, max_bytes=100_000)))
    assert [row[1] for row in copied] == [*CELLS, *[None] * (rows + 1 - len(CELLS))]
    sent = streamed(server, "values", "p")
    assert len(copied) == len(sent) == rows + 1
    for n, (ours, theirs) in enumerate(zip(copied, sent, strict=True)):
        for name, mine, other in zip(names, ours, theirs, strict=True):
            assert mine == other, (n, name, columns.get(name))


def test_batches_are_of_the_size_that_is_asked_for(db: psycopg.Connection[Any]) -> None:
    batches = list(copyout.copy_out(db, NUMBERS, ["id", "x"], max_bytes=1 << 20))
    assert sum(batch.num_rows for batch in batches) == 200_000
    assert all((1 << 20) <= batch.nbytes + batch.num_rows * 2 + 300 <= 5 << 18 for batch in batches[:-1])
    assert db.info.transaction_status == pq.TransactionStatus.IDLE
    assert list(copyout.copy_out(db, NUMBERS + " WHERE id < 0", ["id", "x"])) == []
    (empty,) = copyout.copy_out(db, "SELECT FROM public.numbers WHERE id < 4", [])
    assert empty.num_rows == 3


def test_a_large_value_is_one_batch(db: psycopg.Connection[Any]) -> None:
    query = "SELECT repeat(E'abcdefg\\\\', 12500000) UNION ALL SELECT 'next'"
    large, after = copyout.copy_out(db, query, ["v"])
    assert large.num_rows == 1
    assert large.column(0)[0].as_buffer().size == 100_000_000
    assert after.to_pylist() == [{"v": "next"}]


def test_a_row_that_the_server_cannot_send_is_its_error(db: psycopg.Connection[Any]) -> None:
    query = "SELECT 'first' UNION ALL SELECT repeat('\\', 600000000)"  # each is sent as two
    with pytest.raises(psycopg.Error) as refused:
        list(copyout.copy_out(db, query, ["v"]))
    assert refused.value.sqlstate == "54000"
    assert db.execute("SELECT 1").fetchone() == (1,)


def test_an_error_in_the_middle_keeps_its_sqlstate_and_its_connection(db: psycopg.Connection[Any]) -> None:
    db.execute("BEGIN")
    rows = copyout.copy_out(db, NUMBERS + " WHERE 1 / (id - 150000) < 2", ["id", "x"], max_bytes=1 << 18)
    read = 0
    with pytest.raises(psycopg.errors.DivisionByZero) as raised:  # noqa: PT012 - what comes before it counts
        for batch in rows:
            read += batch.num_rows
    assert raised.value.sqlstate == "22012"
    assert 100_000 < read < 150_000
    assert db.info.transaction_status == pq.TransactionStatus.INERROR
    db.rollback()
    assert db.execute("SELECT 1").fetchone() == (1,)


def test_an_error_at_the_beginning_keeps_its_sqlstate(db: psycopg.Connection[Any]) -> None:
    with pytest.raises(psycopg.errors.UndefinedColumn, match="nope"):
        next(copyout.copy_out(db, "SELECT nope FROM public.numbers", ["nope"]))
    assert db.execute("SELECT 1").fetchone() == (1,)


def test_a_backend_that_is_ended_in_the_middle_is_a_lost_connection(
    server: PostgresServer, db: psycopg.Connection[Any]
) -> None:
    rows = copyout.copy_out(db, NUMBERS, ["id", "x"], max_bytes=1 << 16)
    next(rows)
    server.psql(f"SELECT pg_terminate_backend({db.info.backend_pid})")
    with pytest.raises(psycopg.OperationalError):
        list(rows)
    assert db.broken


def test_a_read_that_is_left_closes_its_connection_and_the_next_has_another(server: PostgresServer) -> None:
    with psycopg.connect(server.url, autocommit=True) as holder, closing(Reader(server.url)) as reader:
        holder.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        (name,) = holder.execute("SELECT pg_export_snapshot()").fetchone() or ("",)
        for _ in range(2):
            with reader.under(name) as db, closing(copyout.copy_out(db, NUMBERS, ["id", "x"], 1000)) as rows:
                next(rows)
            assert db.closed
            assert not reader.is_lost
        with reader.under(name, statement_timeout="7s") as db:
            assert db.execute("SHOW statement_timeout").fetchone() == ("7s",)
            assert sum(batch.num_rows for batch in reader.rows(NUMBERS, ["id", "x"])) == 200_000
        assert db.info.transaction_status == pq.TransactionStatus.IDLE


def test_a_read_that_waits_is_interrupted(server: PostgresServer) -> None:
    with psycopg.connect(server.url, autocommit=True) as holder, closing(Reader(server.url)) as reader:
        holder.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        (name,) = holder.execute("SELECT pg_export_snapshot()").fetchone() or ("",)
        begin = time.monotonic()
        threading.Timer(0.5, reader.interrupt).start()
        with pytest.raises(psycopg.OperationalError), reader.under(name):
            list(reader.rows("SELECT id FROM public.numbers, pg_sleep(60)", ["id"]))
        assert time.monotonic() - begin < 10
        assert reader.is_lost


def project_of(server: PostgresServer, folder: Path, tables: str, settings: str) -> Project:
    """A project on a database of its own."""
    name = f"copied_{folder.name[-8:]}".replace("-", "_").lower()
    server.psql(f"CREATE DATABASE {name}")
    server.psql(tables, name)
    url = server.url.removesuffix("postgres") + name
    (folder / "headrace.toml").write_text(f'[source.shop]\nurl = "{url}"\nslot = "{name}"\n{settings}\n')
    return load_project(folder)


def test_a_table_whose_read_fails_fails_alone(server: PostgresServer, tmp_path: Path) -> None:
    project = project_of(
        server,
        tmp_path,
        "CREATE TABLE bad (id int PRIMARY KEY); INSERT INTO bad SELECT generate_series(1, 60000);"
        "CREATE TABLE fine (id int PRIMARY KEY); INSERT INTO fine SELECT generate_series(1, 60000)",
        'copy_workers = 1\nwhere = {"public.bad" = "1 / (id - 50000) < 2"}',
    )
    with running(project) as pipeline:
        log = pipeline.lanes[0].log
        until(lambda: stage_of(log, "fine") == "live", 60)
        until(lambda: stage_of(log, "bad") == "failed", 60)
        assert "division by zero" in read_states(log)[TableId("public", "bad")].reason


def test_a_table_whose_connection_ends_in_the_middle_is_read_again(
    server: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = project_of(
        server,
        tmp_path,
        "CREATE TABLE t (id int PRIMARY KEY, v text);"
        "INSERT INTO t SELECT n, repeat(n::text, 100) FROM generate_series(1, 60000) n",
        'chunk_bytes = "8MiB"',
    )
    ended: list[int] = []

    def end(point: str) -> None:
        if point == "source.copy.batch" and len(ended) < 3:
            with psycopg.connect(project.sources[0].url.reveal()) as administrator:
                ended.extend(
                    pid
                    for (pid,) in administrator.execute(
                        "SELECT pid FROM pg_stat_activity WHERE query LIKE 'COPY%' "
                        "AND datname = current_database() AND pg_terminate_backend(pid, 5000)"
                    )
                )

    monkeypatch.setattr(copier, "failpoint", end)
    with running(project) as pipeline:
        log = pipeline.lanes[0].log
        until(lambda: len(ended) >= 3 and stage_of(log, "t") in ("live", "failed"), 60)
        assert stage_of(log, "t") == "live"
        until(pipeline.lanes[0].idle, 60)
    report = verify(project)
    assert report.verified, [finding for finding in report.findings if not finding.ok]
