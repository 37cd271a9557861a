"""Whatever takes changes away from a source is noticed, at the start and while it runs, and stops it."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest
from harness import make_project

from headrace.change import STREAMED, Entry, TableId
from headrace.config import Project, load_project
from headrace.errors import RESYNC, HeadraceError, SourceGap, SourceUnavailable, UserError
from headrace.log.sqlite import SQLiteLog
from headrace.payload import decode_rows
from headrace.pipeline import Pipeline
from headrace.sources.postgres import takeover, watchman
from headrace.sources.postgres.connection import connect, connect_replication
from headrace.sources.postgres.fingerprint import publication_fingerprint
from headrace.sources.postgres.identity import parse_history, read_server
from headrace.sources.postgres.source import PostgresSource
from headrace.sources.postgres.stream import Stream
from headrace.sources.postgres.tables import read_states
from headrace.sources.postgres.watchman import Watchman
from headrace.testing.postgres import PostgresServer
from pipelines import until

SCHEMA = """
CREATE TABLE t (id int PRIMARY KEY, v text);
CREATE TABLE u (id int PRIMARY KEY, v text);
INSERT INTO t SELECT n, 'copied' FROM generate_series(1, 5) n;
"""
Db = psycopg.Connection[tuple[Any, ...]]


@pytest.fixture(scope="module", params=[16, 18])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[PostgresServer]:
    with PostgresServer(tmp_path_factory.mktemp("gaps") / "pg", request.param) as running:
        yield running


def make_source(server: PostgresServer, folder: Path, name: str) -> tuple[Project, str]:
    """Give a project with tables t and u, both copied; database and slot are called `name`."""
    server.psql(f"CREATE DATABASE {name}")
    url = server.url.removesuffix("postgres") + name
    with psycopg.connect(url, autocommit=True) as db:
        db.execute(SCHEMA)
    more = 'schema_changes = { table_added = "freeze" }\n'
    project = make_project(folder, url, slot=name, more=more)
    capture(project)
    return project, url


def capture(project: Project) -> None:
    """Bring everything that is committed now into the log, and confirm it."""
    (project.state / "log").mkdir(parents=True, exist_ok=True)
    source = PostgresSource(project.sources[0], 8 << 20, 0.0)
    log = SQLiteLog(project.state / "log" / "shop.db")
    try:
        head = source.head()
        for group in source.read(log):
            if entries := list(group):
                log.append(entries)
                source.confirm(entries[-1].last)
            position = log.position()
            done = all(state.stage == "live" for state in read_states(log).values())
            if position and position.commit > head and done:
                break
    finally:
        source.close()
        log.close()


def captured(project: Project, table: str = "t") -> list[str]:
    """The ids of a table's streamed changes in the log, in order."""
    rows = (e for e in _entries(project) if e.kind == "rows" and e.table == TableId("public", table))
    return [cell for entry in rows for cell in decode_rows(entry.payload).column("id").to_pylist()]


def refused(project: Project, words: str, kind: type[HeadraceError] = SourceGap) -> str:
    """A start is refused with these words and the remedy, and the log stays as it is."""
    before = captured(project)
    with pytest.raises(kind, match=words) as caught:
        capture(project)
    assert RESYNC.format(source="shop") in caught.value.remedy
    assert captured(project) == before
    return str(caught.value)


def insert(url: str, *ids: int) -> None:
    with psycopg.connect(url, autocommit=True) as db:
        for number in ids:
            db.execute("INSERT INTO t VALUES (%s, 'streamed')", [number])


# ------------------------------------------------------------------------------------- publication

PUB = "ALTER PUBLICATION headrace_shop"
REMADE = "WITH (publish_via_partition_root = true)"

PUBLICATION_GAPS = {
    "DROP PUBLICATION headrace_shop": "headrace_shop is gone",
    f"{PUB} DROP TABLE t": r"public\.t is no longer in it",
    f"{PUB} DROP TABLE t; {PUB} ADD TABLE t": "taken out and put back",
    f"{PUB} SET (publish = 'insert, truncate')": "update is off, delete is off",
    f"{PUB} SET (publish_via_partition_root = false)": "via_root is off",
    f"DROP PUBLICATION headrace_shop; CREATE PUBLICATION headrace_shop FOR TABLE t, u {REMADE}": "made again",
    f"{PUB} SET TABLE t WHERE (id > 3), u": "taken out and put back|a new row filter",
    f"{PUB} SET TABLE t (id), u": "taken out and put back|with the columns id, not with all columns",
    f"{PUB} DROP TABLE t; ALTER TABLE t RENAME TO t2": r"public\.t is called public\.t2 now, and is not in",
}


def test_an_altered_publication_is_a_gap_at_start(server: PostgresServer, tmp_path: Path) -> None:
    project, url = make_source(server, tmp_path, "altered")
    note = _note(project, "publication")
    for statement, words in PUBLICATION_GAPS.items():
        # All in one transaction that is rolled back: the next case finds the source as it was.
        with psycopg.connect(url) as db, db.transaction(force_rollback=True):
            db.execute(statement.encode())
            with pytest.raises(SourceGap, match=words) as caught:
                _check_publication(db, project)
        assert caught.value.remedy == RESYNC.format(source="shop")
    assert _note(project, "publication") == note
    with psycopg.connect(url, autocommit=True) as db:
        db.execute(f"{PUB} DROP TABLE t".encode())
    refused(project, "no longer in it")


@pytest.mark.parametrize("server", [18], indirect=True)
def test_what_changes_nothing_of_the_publication_is_no_gap(
    server: PostgresServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    project, url = make_source(server, tmp_path, "harmless")
    with psycopg.connect(url, autocommit=True) as db:
        db.execute("CREATE ROLE other SUPERUSER")
        for statement in (
            "CREATE TABLE w (id int PRIMARY KEY)",
            f"{PUB} ADD TABLE w",
            "ALTER PUBLICATION headrace_shop OWNER TO other",
            "ALTER TABLE t ADD COLUMN added int",
            "DROP TABLE u",
        ):
            db.execute(statement.encode())
            capture(project)
    assert "was altered" not in caplog.text
    with psycopg.connect(url, autocommit=True) as db:
        db.execute(f"{PUB} SET (publish = 'insert')".encode())
        db.execute(f"{PUB} SET (publish = 'insert, update, delete, truncate')".encode())
    for _ in range(2):
        capture(project)
    assert caplog.text.count("was altered, and is what it was") == 1


def test_all_tables_and_tables_of_a_schema_are_published(server: PostgresServer, tmp_path: Path) -> None:
    with psycopg.connect(server.url) as db, db.transaction(force_rollback=True):
        db.execute("CREATE SCHEMA whole; CREATE TABLE whole.a (id int); CREATE TABLE whole.b (id int)")
        db.execute("CREATE TABLE p (id int) PARTITION BY HASH (id)")
        db.execute("CREATE TABLE p0 PARTITION OF p FOR VALUES WITH (MODULUS 1, REMAINDER 0)")
        db.execute("CREATE PUBLICATION one FOR TABLES IN SCHEMA whole, TABLE p")
        db.execute("CREATE PUBLICATION every FOR ALL TABLES WITH (publish_via_partition_root = true)")
        for name, expected in (("one", ["p", "whole.a", "whole.b"]), ("every", ["p", "whole.a", "whole.b"])):
            found = publication_fingerprint(db, name)
            assert found is not None
            assert sorted(member.table.label for member in found.members) == expected


def _note(project: Project, key: str) -> str | None:
    log = SQLiteLog(project.state / "log" / "shop.db", read_only=True)
    try:
        return log.note(key)
    finally:
        log.close()


def _check_publication(db: Db, project: Project) -> None:
    from headrace.sources.postgres.fingerprint import check_publication

    log = SQLiteLog(project.state / "log" / "shop.db")
    try:
        check_publication(db, project.sources[0], log)
    finally:
        log.close()


def test_tables_that_nobody_asked_for_are_dropped_with_one_warning(
    server: PostgresServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    project, url = make_source(server, tmp_path, "uninvited")
    with psycopg.connect(url, autocommit=True) as db:
        db.execute("CREATE TABLE w (id int PRIMARY KEY)")
        db.execute(f"{PUB} ADD TABLE w".encode())
        for number in range(10, 13):
            db.execute("INSERT INTO w VALUES (%s)", [number])
            db.execute("INSERT INTO t VALUES (%s)", [number])
        db.execute("TRUNCATE w")
    capture(project)
    assert captured(project) == ["10", "11", "12"]
    assert captured(project, "w") == []
    assert caplog.text.count("public.w is in the publication but not captured") == 1


# ----------------------------------------------------------------------------------- slot and server


def test_a_slot_that_is_not_ours_is_a_gap(server: PostgresServer, tmp_path: Path) -> None:
    project, url = make_source(server, tmp_path, "slots")
    made = {
        "SELECT pg_create_physical_replication_slot('slots')": (url, "it is a physical one"),
        "SELECT pg_create_logical_replication_slot('slots', 'pgoutput', false, true)": (url, "two_phase"),
        "SELECT pg_create_logical_replication_slot('slots', 'pgoutput')": (
            server.url,
            "it belongs to the database postgres",
        ),
    }
    for statement, (where, words) in made.items():
        with psycopg.connect(url, autocommit=True) as db:
            db.execute("SELECT pg_drop_replication_slot('slots')")
        with psycopg.connect(where, autocommit=True) as db:
            db.execute(statement.encode())
            refused(project, words)
            if where != url:
                db.execute("SELECT pg_drop_replication_slot('slots')")
    assert "the log holds commits up to" in refused(project, "the slot slots is gone")


def test_another_database_is_refused(server: PostgresServer, tmp_path: Path) -> None:
    project, _ = make_source(server, tmp_path, "original")
    project = make_project(tmp_path, server.url, slot="original")
    refused(project, "another database", UserError)


@pytest.mark.parametrize("server", [16], indirect=True)
def test_a_restored_state_folder_is_a_gap(server: PostgresServer, tmp_path: Path) -> None:
    project, url = make_source(server, tmp_path / "project", "older")
    subprocess.run(["cp", "-a", str(project.state), str(tmp_path / "backup")], check=True)
    with Running(project), psycopg.connect(url, autocommit=True) as db:
        until(lambda: _reader(db, "older"))
        query = "SELECT confirmed_flush_lsn FROM pg_replication_slots WHERE slot_name = 'older'"
        before = db.execute(query).fetchall()
        insert(url, 10)
        until(lambda: db.execute(query).fetchall() > before)
    subprocess.run(["rm", "-r", str(project.state)], check=True)
    subprocess.run(["cp", "-a", str(tmp_path / "backup"), str(project.state)], check=True)
    refused(project, "the state folder is older than it")


def test_a_restored_server_is_a_gap(tmp_path: Path) -> None:
    """Disk copies and recoveries of one server: what the log holds and the server has lost is noticed."""
    server = PostgresServer(tmp_path / "pg")
    copy = tmp_path / "copy"
    with server:
        project, url = make_source(server, tmp_path / "project", "restored")
        server.stop()
        subprocess.run(["cp", "-a", str(server.data), str(copy)], check=True)
        server.start()
        insert(url, *range(10, 30))
        capture(project)
        server.kill()
        server.start()
        insert(url, 30)
        capture(project)  # a crash is no gap
        assert captured(project) == [str(n) for n in range(10, 31)]

        _restore(server, copy)
        assert "log holds commits up to" in refused(project, "WAL ends at .* restored to an earlier state")

        with psycopg.connect(url, autocommit=True) as db:
            for _ in range(60):
                db.execute("INSERT INTO u SELECT coalesce(max(id), 0) + 1, repeat('x', 900) FROM u")
        for _ in range(2):  # nothing was confirmed the first time, which would hide it
            refused(project, "the server has none there and goes on with one at")

        _restore(server, copy, recovery=True)
        refused(project, "timeline 2 forked from timeline 1 at")


def test_what_a_restarted_server_sends_again_changes_nothing(tmp_path: Path) -> None:
    """Shapes included: a table is sent again as it was then, not as it is now."""
    with PostgresServer(tmp_path / "pg") as server:
        project, url = make_source(server, tmp_path / "project", "again")
        insert(url, 10)
        server.psql("ALTER TABLE t ADD COLUMN w text", "again")
        insert(url, 11)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PostgresSource, "confirm", lambda *_: None)
            capture(project)
        before = _entries(project)
        server.stop("immediate")
        server.start()
        insert(url, 12)
        capture(project)
        assert captured(project) == ["10", "11", "12"]
        entries = _entries(project)
        assert entries[: len(before)] == before
        streamed = [entry.last for entry in entries if entry.kind in STREAMED]
        assert streamed == sorted(streamed)
        assert "schema" not in {entry.kind for entry in entries[len(before) :]}


def _entries(project: Project) -> list[Entry]:
    log = SQLiteLog(project.state / "log" / "shop.db", read_only=True)
    try:
        return [logged.entry for logged in log.read(0, 1 << 30)]
    finally:
        log.close()


def _restore(server: PostgresServer, copy: Path, *, recovery: bool = False) -> None:
    server.stop("immediate")
    subprocess.run(["rm", "-r", str(server.data)], check=True)
    subprocess.run(["cp", "-a", str(copy), str(server.data)], check=True)
    if recovery:
        server.settings["restore_command"] = "false"
        (server.data / "recovery.signal").touch()
        subprocess.run(
            ["chown", f"--reference={server.data}", str(server.data / "recovery.signal")], check=True
        )
    server.start()
    until(lambda: server.psql("SELECT pg_is_in_recovery()") == "f", 20, "the server takes writes")


def test_an_upgraded_server_is_a_gap(tmp_path: Path) -> None:
    with PostgresServer(tmp_path / "old", 16) as old, PostgresServer(tmp_path / "new", 18) as new:
        make_source(old, tmp_path / "project", "upgraded")
        new.psql("CREATE DATABASE upgraded")
        url = new.url.removesuffix("postgres") + "upgraded"
        project = make_project(tmp_path / "project", url, slot="upgraded")
        refused(project, "runs Postgres 18 .* was filled from Postgres 16")


def test_a_timeline_history_is_read() -> None:
    text = "1\t0/3000110\tno recovery target specified\n\n# x\n2\t1/A0\tbefore 2024-01-01 00:00:00+00\n"
    assert parse_history(text) == {1: 0x3000110, 2: 0x1000000A0}


# -------------------------------------------------------------------------------------- while running


class Running:
    """A pipeline in a thread, with what it ended with."""

    def __init__(self, project: Project) -> None:
        self.pipeline = Pipeline(load_project(project.root))
        self.ended: BaseException | None = None
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            self.pipeline.run()
        except BaseException as error:
            self.ended = error

    def __enter__(self) -> Running:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.pipeline.stop.set()
        self._thread.join(30)

    def stopped(self, words: str) -> None:
        """Capture alone stops with these words; the pipeline ends once all it had brought is applied."""
        until(lambda: self.pipeline.status()["stopped"], 30, words)
        stopped = self.pipeline.status()["stopped"]
        assert list(stopped) == ["shop.capture"]
        assert words in stopped["shop.capture"]
        self._thread.join(30)
        assert isinstance(self.ended, SourceGap)


def _reader(db: Db, slot: str) -> int | None:
    query = "SELECT active_pid FROM pg_replication_slots WHERE slot_name = %s"
    return db.execute(query, [slot]).fetchall()[0][0]


@pytest.mark.parametrize("server", [18], indirect=True)
def test_the_publication_is_altered_while_running(
    server: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchman, "WATCH_EVERY", 0.3)
    project, url = make_source(server, tmp_path, "watched")
    with Running(project) as running, psycopg.connect(url, autocommit=True) as db:
        until(lambda: _reader(db, "watched"))
        time.sleep(1)
        assert running.pipeline.status()["stopped"] == {}
        insert(url, 10)
        until(lambda: captured(project) == ["10"])
        db.execute(f"{PUB} DROP TABLE t".encode())
        running.stopped("public.t is no longer in it")


def test_a_stream_that_is_not_the_slots_reader_or_on_another_server_is_given_up(
    server: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchman, "WATCH_EVERY", 0.0)
    project, url = make_source(server, tmp_path, "reader")
    log = SQLiteLog(project.state / "log" / "shop.db", read_only=True)
    with closing(Stream(project.sources[0], 0)) as stream, connect(url) as db, closing(log):
        facts = read_server(db)
        guard = Watchman(db, project.sources[0], log, facts, stream)
        until(lambda: _reader(db, "reader") == stream.backend)
        guard.check_if_due()
        db.execute("SELECT pg_terminate_backend(%s, 5000)", [stream.backend])
        with pytest.raises(SourceUnavailable, match=f"not by our stream \\(pid {stream.backend}\\)"):
            guard.check_if_due()
        stream.timeline += 1
        with pytest.raises(SourceUnavailable, match="another server than the checks"):
            Watchman(db, project.sources[0], log, facts, stream)


@pytest.mark.parametrize("server", [16], indirect=True)
def test_a_table_that_is_renamed_is_followed_and_none_of_its_rows_is_missed(
    server: PostgresServer, tmp_path: Path
) -> None:
    """The stream brings rows under the new name before anybody has looked; the second time the table has its
    first name back by then, and what came between is in no other place than a copy."""
    project, url = make_source(server, tmp_path, "renamed")
    with Running(project) as running, psycopg.connect(url, autocommit=True) as db:
        until(lambda: _reader(db, "renamed"))
        (lane,) = running.pipeline.lanes

        def ids(table: str) -> list[str]:
            tables = lane.staging.schemas(lane.staging.through())
            of = TableId("public", table)
            is_applied = f"shop.{table}" in {m.name for m in lane.models()} and lane.idle()
            if of not in tables or not is_applied:
                return []
            (rows,) = lane.destination.read([f"SELECT id::VARCHAR AS id FROM shop.{table} ORDER BY id"])
            return list(rows["id"].to_pylist())

        db.execute("ALTER TABLE t RENAME TO t2; INSERT INTO t2 VALUES (6)")
        until(lambda: ids("t2") == [*"123456"], 30, "under its new name")
        db.execute("ALTER TABLE t2 RENAME TO t3; INSERT INTO t3 VALUES (7)")
        db.execute("ALTER TABLE t3 RENAME TO t2; INSERT INTO t2 VALUES (8)")
        until(lambda: ids("t2") == [*"12345678"], 30, "after a name that it had for a while")
        db.execute("DELETE FROM t2 WHERE id < 8")
        until(lambda: ids("t2") == ["8"], 30, "it goes on")
        assert not running.pipeline.status()["stopped"]
        states = {table.name: state for table, state in read_states(lane.log).items()}
        assert (states["t"].stage, states["t"].reason) == ("removed", "called public.t2 now")


@pytest.mark.parametrize("server", [16], indirect=True)
def test_another_reader_moves_the_slot_between_two_connections(
    server: PostgresServer, tmp_path: Path
) -> None:
    project, url = make_source(server, tmp_path, "stolen")
    with Running(project) as running, psycopg.connect(url, autocommit=True) as db:
        until(lambda: _reader(db, "stolen"))

        def steal() -> bool:
            db.execute(
                "SELECT pg_terminate_backend(active_pid, 5000) FROM pg_replication_slots "
                "WHERE slot_name = 'stolen'"
            )
            db.execute("INSERT INTO t SELECT max(id) + 1 FROM t")
            try:
                db.execute("SELECT pg_replication_slot_advance('stolen', pg_current_wal_lsn())")
            except psycopg.errors.ObjectInUse:
                return False
            return True

        until(steal)
        running.stopped("another reader moved it")


def test_the_slot_is_invalidated_while_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"max_slot_wal_keep_size": "1MB", "max_wal_size": "32MB", "min_wal_size": "32MB"}
    for version, words in ((16, "thrown away"), (18, "thrown away (max_slot_wal_keep_size)")):
        with PostgresServer(tmp_path / f"pg{version}", version, settings) as server:
            project, url = make_source(server, tmp_path / f"project{version}", "invalid")
            with monkeypatch.context() as patch:
                patch.setattr(PostgresSource, "confirm", lambda *_: None)
                with Running(project) as running, psycopg.connect(url, autocommit=True) as db:
                    until(lambda db=db: _reader(db, "invalid"))
                    for _ in range(4):
                        db.execute("SELECT pg_logical_emit_message(false, 'x', 'y'), pg_switch_wal()")
                        db.execute("CHECKPOINT")
                    running.stopped(words)


# ------------------------------------------------------------------------------------------ half-open


@pytest.mark.parametrize("server", [18], indirect=True)
@pytest.mark.parametrize(("holder", "ended"), [("headrace", True), ("another", False)])
def test_a_stale_reader_of_ours_is_ended_after_a_while(
    server: PostgresServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    holder: str,
    ended: bool,
) -> None:
    monkeypatch.setattr(takeover, "TAKE_OVER_AFTER", 2.0)  # 3 s with the project's heartbeat
    slot = f"held_by_{holder}"
    project, url = make_source(server, tmp_path, slot)
    insert(url, 10)
    with closing(connect_replication(f"{url}?options=-c%20wal_sender_timeout%3D0")) as held:
        held.pgconn.exec_(f"SET application_name = '{holder}'".encode())
        held.pgconn.exec_(
            f"START_REPLICATION SLOT {slot} LOGICAL 0/0 "
            "(proto_version '1', publication_names 'headrace_shop')".encode()
        )
        with Running(project) as running, psycopg.connect(url, autocommit=True) as db:
            silent = held.pgconn.backend_pid
            began = time.monotonic()
            until(lambda: "active for PID" in str(running.pipeline.status()["waiting"]))
            until(lambda: _reader(db, slot) != silent or time.monotonic() - began > 6)
            assert (_reader(db, slot) != silent) == ended
            if ended:
                assert time.monotonic() - began > 2
                until(lambda: captured(project) == ["10"])
    assert caplog.text.count("that backend is ended") == ended
