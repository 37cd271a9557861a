"""Reading a slot in bulk: the same as streaming, in any mixture of both, whatever happens in between."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from headrace.change import Entry, Position, TableId
from headrace.config import SourceConfig, source_config
from headrace.errors import SourceUnavailable, UserError
from headrace.log.proof import verify
from headrace.log.sqlite import SQLiteLog
from headrace.payload import HEAD, decode_rows
from headrace.secret import Secret
from headrace.sources.postgres import bulk as bulk_module
from headrace.sources.postgres import follow as follow_module
from headrace.sources.postgres.bulk import _answers, _Query, _QueryFailed
from headrace.sources.postgres.connection import connect_bulk
from headrace.sources.postgres.groups import GroupBuilder
from headrace.sources.postgres.lsn import parse_lsn
from headrace.sources.postgres.preflight import inspect
from headrace.sources.postgres.slot import POINT
from headrace.sources.postgres.source import PostgresSource
from headrace.sources.postgres.tables import TableStates
from headrace.testing.postgres import PostgresServer

MIB = 1 << 20
CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_bulk
test_bulk.child(*sys.argv[2:])
"""


@pytest.fixture(scope="module", params=[16, 18])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[PostgresServer]:
    settings = {"max_replication_slots": "40"}
    folder, version = tmp_path_factory.mktemp("pg"), request.param
    with PostgresServer(folder, version, settings, bin_folder=DEBIAN if version == 15 else None) as server:
        yield server


DEBIAN = Path("/usr/lib/postgresql/15/bin")


@pytest.fixture
def url(server: PostgresServer, request: pytest.FixtureRequest) -> str:
    """A database of the test's own, with a table, its publication and a slot called like the test."""
    name = _name(request.node.originalname)
    server.psql(f"DROP DATABASE IF EXISTS {name}")
    server.psql(f"CREATE DATABASE {name}")
    url = server.url.removesuffix("postgres") + name
    with psycopg.connect(url, autocommit=True) as db:
        db.execute("CREATE TABLE t (id int PRIMARY KEY, a text, big text)")
        db.execute("CREATE PUBLICATION p FOR TABLE t WITH (publish_via_partition_root)")
        db.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [name])
    return url


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make peeks worthwhile for the backlogs of a test."""
    _make_small(monkeypatch.setattr)


def _make_small(setattr_: Any) -> None:
    for name, value in {"WORTHWHILE": 64 << 10, "SWITCH": 256 << 10, "FIRST_CHUNK": 512 << 10}.items():
        setattr_(bulk_module, name, value)
    setattr_(follow_module, "_LOOK_EVERY", 0.1)


def _name(test: str) -> str:
    return test.removeprefix("test_")[:40]


def config_of(url: str, slot: str = "", peek_temp_max: int = 64 * MIB, origin: str = "any") -> SourceConfig:
    slot = slot or url.rpartition("/")[2]
    return source_config(
        "shop",
        Secret(url),
        slot=slot,
        publication="p",
        heartbeat=0.2,
        peek_temp_max=peek_temp_max,
        origin=origin,
    )


def open_log(path: Path, config: SourceConfig) -> SQLiteLog:
    """A log that stands where the slot does, as after a copy."""
    log = SQLiteLog(path)
    if log.note(POINT) is None:
        with psycopg.connect(config.url.reveal(), autocommit=True) as db:
            query = "SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = %s"
            row = db.execute(query, [config.slot]).fetchone()
        assert row is not None
        at = Position(0, parse_lsn(row[0]), 0)
        log.append([Entry("message", None, at, at, 0, 0, 0, b"{}")])
        log.set_note("slot", config.slot)
        log.set_note(POINT, str(at.commit))
        TableStates(log).move([TableId("public", "t")], "live")
    return log


def capture(log: SQLiteLog, config: SourceConfig, until: int, groups: int = 0, max_bytes: int = MIB) -> bool:
    """Bring the log past LSN `until` (true), or stop with a group in hand that is not appended (false)."""
    source = PostgresSource(config, max_bytes, 0.02)
    deadline = time.monotonic() + 60
    with contextlib.closing(source.read(log)) as reading:  # type: ignore[type-var]
        for group in reading:
            entries = list(group)
            groups -= bool(entries)
            if entries and groups == 0:
                return False
            if entries:
                log.append(entries)
                reached = log.position()
                assert reached is not None
                source.confirm(reached)
                if reached.commit > until:
                    return True
            assert time.monotonic() < deadline
    raise AssertionError("a source has no end")


def child(folder: str, url: str, until: str) -> None:
    """What a process does that is killed on its way."""
    _make_small(setattr)
    config = config_of(url)
    capture(open_log(Path(folder) / "log.db", config), config, int(until), max_bytes=128 << 10)


def head(url: str) -> int:
    return PostgresSource(config_of(url), 1, 1).head()


def changes(log: SQLiteLog) -> list[tuple[Any, ...]]:
    """All changes that the log holds, one by one, in the order of the source."""
    found: list[tuple[Any, ...]] = []
    for item in log.read(1, 1 << 40):
        entry = item.entry
        if entry.kind in ("copy", "marker"):  # of a table that is copied again
            continue
        if entry.kind != "rows":
            found.append((*entry.first, entry.kind, entry.table, entry.schema_version, entry.payload))
            continue
        for row in decode_rows(entry.payload).to_pylist():
            cells = {key: value for key, value in row.items() if key not in HEAD and value is not None}
            at = (0, row["_commit"], row["_ordinal"], "rows", entry.table, entry.schema_version)
            found.append((*at, row["_op"], row["_txid"], row["_lsn"], row["_committed_at"], cells))
    return sorted(found, key=lambda change: change[:4])


def ids(log: SQLiteLog) -> list[int]:
    return [int(change[-1]["id"]) for change in changes(log) if change[3] == "rows" and change[6] == "c"]


def insert(db: psycopg.Connection[Any], first: int, count: int, per_transaction: int = 20) -> None:
    for start in range(first, first + count, per_transaction):
        db.execute(
            "INSERT INTO t SELECT g, 'a', repeat(md5(g::text), 3) FROM generate_series(%s::int, %s::int) g",
            [start, start + per_transaction - 1],
        )


def everything(db: psycopg.Connection[Any]) -> None:
    """A history with all that a slot may carry."""
    insert(db, 1, 2000)
    db.execute("INSERT INTO t SELECT g, 'toast', string_agg(md5((g * h)::text), '') FROM "
               "generate_series(5001, 5020) g, generate_series(1, 300) h GROUP BY g")  # fmt: skip
    db.execute("UPDATE t SET a = 'changed' WHERE id % 3 = 0 OR id > 5000")
    db.execute("SELECT pg_logical_emit_message(true, 'app', 'inside ü')")
    db.execute("SELECT pg_logical_emit_message(false, 'app', 'outside')")
    db.execute("ALTER TABLE t ADD COLUMN extra numeric DEFAULT 1.5")
    db.execute("UPDATE t SET id = id + 100000 WHERE id % 7 = 0")
    with db.transaction():
        db.execute("DELETE FROM t WHERE id < 100")
        with contextlib.suppress(psycopg.errors.UniqueViolation), db.transaction():
            db.execute("UPDATE t SET a = 'never seen' WHERE id < 200")
            db.execute("INSERT INTO t SELECT * FROM t LIMIT 1")
        db.execute("INSERT INTO t VALUES (-1, NULL, '', NULL)")
    db.execute("ALTER TABLE t REPLICA IDENTITY FULL")
    db.execute("UPDATE t SET a = NULL WHERE id > 5000")
    db.execute("TRUNCATE t")
    insert(db, 200_001, 2000)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("max_bytes", [16 << 10, MIB])
def test_bulk_gives_what_the_stream_gives(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_bytes: int
) -> None:
    bulk, stream = config_of(url), config_of(url, "streamed", peek_temp_max=0)
    logs = [open_log(tmp_path / "bulk.db", bulk), SQLiteLog(tmp_path / "stream.db")]
    with psycopg.connect(url, autocommit=True) as db:
        db.execute("SELECT pg_copy_logical_replication_slot(%s, 'streamed')", [bulk.slot])
        logs[1] = open_log(tmp_path / "stream.db", stream)
        everything(db)
        end = head(url)
        capture(logs[1], stream, end, max_bytes=max_bytes)
        monkeypatch.delattr(follow_module, "Stream")
        capture(logs[0], bulk, end, max_bytes=max_bytes)
        db.execute("SELECT pg_drop_replication_slot('streamed')")
    peeked, streamed = map(changes, logs)
    assert {change[3] for change in streamed} == {"rows", "schema", "message", "truncate"}
    assert len(streamed) > 5000
    through = min(peeked[-1][1], streamed[-1][1])  # each reader's own heartbeats come behind
    assert through > end
    assert [c for c in peeked if c[1] <= through] == [c for c in streamed if c[1] <= through]
    verify(logs[0])


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("server", [18], indirect=True)
def test_switches_lose_and_repeat_nothing(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer in bursts, a reader that is closed again and again with a group in its hands."""
    config = config_of(url)
    log = open_log(tmp_path / "log.db", config)
    streams = _count(monkeypatch, follow_module, "Stream")
    peeks = _count(monkeypatch, bulk_module.Bulk, "_peek")
    stop = threading.Event()
    written = 0

    def write() -> None:
        nonlocal written
        with psycopg.connect(url, autocommit=True) as db:
            while not stop.is_set():
                insert(db, written + 1, 6000, per_transaction=100)
                written += 6000
                db.execute("SELECT pg_log_standby_snapshot()")  # lets restart_lsn move, as time does
                stop.wait(0.4)

    writer = threading.Thread(target=write)
    writer.start()
    choice = random.Random(5)
    deadline = time.monotonic() + 3
    while time.monotonic() < deadline:
        with contextlib.suppress(SourceUnavailable):  # the server still holds the slot for who was here
            capture(log, config, 1 << 62, groups=choice.randrange(1, 12), max_bytes=128 << 10)
    stop.set()
    writer.join()
    end = head(url)
    done = False
    while not done:
        with contextlib.suppress(SourceUnavailable):
            done = capture(log, config, end)
    assert ids(log) == list(range(1, written + 1))
    verify(log)
    assert len(streams) > 1
    assert len(peeks) > 1


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("server", [16], indirect=True)
def test_a_kill_inside_a_chunk_loses_and_repeats_nothing(url: str, tmp_path: Path) -> None:
    config = config_of(url)
    open_log(tmp_path / "log.db", config).close()
    with psycopg.connect(url, autocommit=True) as db:
        insert(db, 1, 12_000)
    end = head(url)
    here = str(Path(__file__).parent)
    for at, point in ((3, "log.append.commit"), (4, "log.append.committed")):
        environment = os.environ | {"HEADRACE_FAILPOINTS": f"{point}=kill@{at}"}
        command = [sys.executable, "-c", CHILD, here, str(tmp_path), url, str(end)]
        killed = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert killed.returncode == -9, killed.stderr
    log = open_log(tmp_path / "log.db", config)
    before = len(ids(log))
    assert 0 < before < 12_000
    done = False
    while not done:
        with contextlib.suppress(SourceUnavailable):
            done = capture(log, config, end - 1)
    assert ids(log) == list(range(1, 12_001))
    verify(log)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("server", [16], indirect=True)
def test_a_long_transaction_does_not_make_it_quadratic(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(url, peek_temp_max=2 * MIB)
    log = open_log(tmp_path / "log.db", config)
    peeks = _count(monkeypatch, bulk_module, "plan")
    with psycopg.connect(url, autocommit=True) as db, psycopg.connect(url) as slow:
        slow.execute("INSERT INTO t VALUES (-1, 'slow', '')")
        begin = parse_lsn(db.execute("SELECT pg_current_wal_insert_lsn()::text").fetchone()[0])  # type: ignore[index]
        insert(db, 1, 30_000, per_transaction=100)
        middle = head(url)
        capture(log, config, middle)
        slow.commit()
        capture(log, config, head(url))
    read = [(standing, upto) for (standing, *_), upto in peeks if upto is not None and upto <= middle]
    chunks = {(standing.confirmed, upto): upto - standing.restart for standing, upto in read}
    assert len(chunks) > 1, "in several chunks"
    assert all(standing.restart <= begin for standing, _ in read), "the open transaction holds it"
    assert sum(chunks.values()) <= 3 * (middle - begin) + MIB
    assert any(upto is None and standing.end - standing.confirmed > MIB for (standing, *_), upto in peeks)
    assert sorted(ids(log)) == [-1, *range(1, 30_001)]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("server", [18], indirect=True)
def test_a_transaction_larger_than_the_room_is_streamed(
    url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "headrace.capture")
    config = config_of(url, peek_temp_max=2 * MIB)
    log = open_log(tmp_path / "log.db", config)
    with psycopg.connect(url, autocommit=True) as db:
        insert(db, 1, 20_000, per_transaction=20_000)
        end = head(url)
    capture(log, config, end)
    assert ids(log) == list(range(1, 20_001))
    assert 1 <= sum("0 messages" in message for message in caplog.messages) <= 2, (
        "it was tried, not again and again"
    )


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("server", [16], indirect=True)
def test_a_large_transaction_is_made_while_it_is_taken(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(url)
    log = open_log(tmp_path / "log.db", config)
    pieces = _count(monkeypatch, GroupBuilder, "_piece")
    monkeypatch.delattr(follow_module, "Stream")
    with psycopg.connect(url, autocommit=True) as db:
        insert(db, 1, 20_000, per_transaction=20_000)
    source = PostgresSource(config, 64 << 10, 0.02)
    with contextlib.closing(source.read(log)) as reading:
        for group in reading:
            before, entries = len(pieces), 0
            for entry in group:
                entries += entry.kind == "rows"
                assert entry.kind != "rows" or len(pieces) - before <= entries + 1, (
                    "no more than it is asked for"
                )
            if entries > 10:
                break
    assert entries > 10


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("server", [18], indirect=True)
def test_while_it_is_open_whether_the_server_lost_something_it_is_streamed(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However far behind: a stream that is given up before it has told would be begun again for ever."""
    config = config_of(url)
    log = open_log(tmp_path / "log.db", config)
    monkeypatch.setattr(follow_module, "_LOOK_EVERY", 0.0)
    streams = _count(monkeypatch, follow_module, "Stream")
    with psycopg.connect(url, autocommit=True) as db:
        insert(db, 1, 1000)
        with pytest.MonkeyPatch.context() as forgetful:
            forgetful.setattr(PostgresSource, "confirm", lambda *_: None)
            capture(log, config_of(url, peek_temp_max=0), head(url))
        log.set_note("server_run", "an earlier one")
        streams.clear()
        insert(db, 1001, 8000)
        capture(log, config, head(url))
    assert streams[0][0][1] == 0, "from where the slot stands"
    assert all(after > 0 for (_, after), _ in streams[1:])
    assert log.note("server_run") != "an earlier one"
    assert ids(log) == list(range(1, 9001))


@pytest.mark.usefixtures("small")
def test_origins_are_filtered_in_peeks(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(url, origin="none")
    log = open_log(tmp_path / "log.db", config)
    monkeypatch.delattr(follow_module, "Stream")
    with psycopg.connect(url, autocommit=True) as db:
        db.execute("SELECT pg_replication_origin_create(%s)", [config.slot])
        db.execute("SELECT pg_replication_origin_session_setup(%s)", [config.slot])
        insert(db, 1, 1000)
        db.execute("SELECT pg_replication_origin_session_reset()")
        insert(db, 1001, 1000)
    capture(log, config, head(url))
    assert ids(log) == list(range(1001, 2001))


@pytest.mark.parametrize("server", [15], indirect=True)
def test_a_server_without_origins_is_refused_before_anything_is_read(url: str, tmp_path: Path) -> None:
    config = config_of(url, origin="none")
    words = 'origin = "none" needs Postgres 16, the server is 15'
    (finding,) = [finding for finding in inspect(config) if words in finding.what]
    assert finding.level == "fail"
    assert not [finding for finding in inspect(config_of(url)) if words in finding.what]
    log = open_log(tmp_path / "log.db", config)
    with psycopg.connect(url, autocommit=True) as db:
        insert(db, 1, 1000)
    with pytest.raises(UserError, match=words):
        capture(log, config, 0)
    assert ids(log) == []


@pytest.mark.usefixtures("small")
def test_a_result_past_the_servers_limit_is_asked_for_in_smaller_chunks(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server holds the bound where it lets us set one: compressed values are larger than their WAL."""
    config = config_of(url, peek_temp_max=2 * MIB)
    log = open_log(tmp_path / "log.db", config)
    peeks = _count(monkeypatch, bulk_module, "plan")
    with psycopg.connect(url, autocommit=True) as db:
        for number in range(1, 201):
            db.execute("INSERT INTO t VALUES (%s, 'a', repeat('x', 100000))", [number])
            db.execute("SELECT pg_logical_emit_message(false, 'filler', repeat('y', 5000))")
        end = head(url)
    capture(log, config, end)
    assert ids(log) == list(range(1, 201))
    assert max(ratio for (_, _, ratio, *_), _ in peeks if ratio is not None) >= 4 * bulk_module.UNMEASURED


@pytest.mark.usefixtures("small")
def test_a_role_that_may_only_replicate(
    server: PostgresServer,
    url: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It needs no more than REPLICATION; without EXECUTE it streams, and the check says so."""
    caplog.set_level(logging.INFO, "headrace.capture")
    server.psql(
        "DO $$ BEGIN CREATE ROLE reader LOGIN REPLICATION; EXCEPTION WHEN duplicate_object THEN END $$"
    )
    config = config_of(url.replace("postgres@", "reader@"))
    peeks = _count(monkeypatch, bulk_module.Bulk, "_peek")
    log = open_log(tmp_path / "log.db", config)
    with psycopg.connect(url, autocommit=True) as db:
        insert(db, 1, 4000)
        capture(log, config, head(url) - 1)
        assert peeks
        found = [finding for finding in inspect(config) if "in bulk" in finding.what]
        assert [finding.level for finding in found] == ["ok"]
        peeks.clear()
        db.execute("REVOKE EXECUTE ON FUNCTION pg_logical_slot_peek_binary_changes FROM PUBLIC")
        insert(db, 4001, 4000)
        capture(log, config, head(url) - 1)
    assert not peeks
    assert sum("read by streaming alone" in message for message in caplog.messages) == 1
    assert ids(log) == list(range(1, 8001))
    (finding,) = [finding for finding in inspect(config) if "in bulk" in finding.what]
    assert finding.level == "warn"
    with psycopg.connect(url, autocommit=True) as db:
        for statement in finding.remedy.rstrip(";").split(";"):
            db.execute(statement.encode())
    assert [f.level for f in inspect(config) if "in bulk" in f.what] == ["ok"]


@pytest.mark.parametrize("server", [18], indirect=True)
def test_a_peek_ends_when_its_reader_does(url: str) -> None:
    query = "SELECT 'x'::bytea FROM pg_sleep(60)"
    running = "SELECT pid FROM pg_stat_activity WHERE query LIKE '%%'||%s||'%%' AND pid <> pg_backend_pid()"
    running += " AND state = 'active'"
    with psycopg.connect(url, autocommit=True) as db, connect_bulk(url) as connection:
        with _Query(connection, query) as peek:
            batches = peek.batches()
            assert [len(next(batches)) for _ in range(2)] == [0, 0], "the reader is asked twice a second"
            assert db.execute(running, [query]).fetchall()
            begin = time.monotonic()
        assert time.monotonic() - begin < 10
        assert not db.execute(running, [query]).fetchall()
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
            assert cursor.fetchone() == (1,), "the connection is as good as before"


def test_a_connection_that_breaks_is_told_from_a_query_that_fails(url: str) -> None:
    with psycopg.connect(url, autocommit=True) as db:
        for query, lost in (("SELECT pg_sleep(60)::text::bytea", True), ("SELECT 1 / 0", False)):
            with connect_bulk(url) as connection, _Query(connection, query) as peek:
                batches = peek.batches()
                if lost:
                    next(batches)
                    db.execute(
                        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                        "WHERE datname = current_database() AND pid <> pg_backend_pid()"
                    )
                with pytest.raises(_QueryFailed):
                    list(batches)
                assert _answers(connection) == (not lost)


def _count(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[tuple[Any, Any]]:
    """Note the arguments and the outcome of every call of a function of a module."""
    real, calls = getattr(module, name), []  # type: ignore[var-annotated]

    def noted(*arguments: Any, **named: Any) -> Any:
        outcome = real(*arguments, **named)
        calls.append((arguments, outcome))
        return outcome

    monkeypatch.setattr(module, name, noted)
    return calls
