"""Transactions that the server streams before they commit, from a real server to the log."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import psycopg
import pytest
from harness import make_project

from headrace.change import Entry, TableSchema
from headrace.errors import SourceUnavailable
from headrace.lane import Lane
from headrace.log.proof import verify
from headrace.payload import decode_rows
from headrace.pipeline import open_lanes
from headrace.sources.postgres import spool
from headrace.sources.postgres.events import Transaction
from headrace.sources.postgres.groups import GroupBuilder
from headrace.sources.postgres.slot import durable_commit
from headrace.sources.postgres.spool import StreamedTransactions
from headrace.testing.postgres import PostgresServer

SETTINGS = {"logical_decoding_work_mem": "64kB", "max_prepared_transactions": "4"}
WIDE = "repeat(md5(i::text), 30)"  # about 1 kB
Row = dict[str, str | None]


@pytest.fixture(scope="module", params=[16, 18])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[PostgresServer]:
    folder = Path(tmp_path_factory.mktemp("pg"))
    # 16 streams each change by itself, 18 what is more than 64 kB.
    streaming = {"debug_logical_replication_streaming": "immediate"} if request.param == 16 else {}
    with PostgresServer(folder, request.param, SETTINGS | streaming) as server:
        yield server


class Captured:
    """A database of its own, captured to a log; its tables are t and u."""

    def __init__(self, server: PostgresServer, folder: Path, more: str = "", log: str = "") -> None:
        name = f"d{next(_NUMBERS)}"
        server.psql(f"CREATE DATABASE {name}")
        self.url = server.url.removesuffix("postgres") + name
        self.db = psycopg.connect(self.url, autocommit=True)
        for table in "tu":
            self.db.execute(f"CREATE TABLE {table} (id int PRIMARY KEY, v text)")
        self.project = make_project(folder, self.url, slot=f"slot_{name}", more=f"{more}{log}")
        (self.project.state / "log").mkdir(mode=0o700, parents=True, exist_ok=True)
        self.lane = self.open()
        self.catch_up()

    def open(self) -> Lane:
        return open_lanes(self.project)[0]

    def catch_up(self) -> None:
        """Bring all that is committed now to the log."""
        self.lane.capture(threading.Event(), until=self.lane.source.head())

    def session(self) -> psycopg.Connection[Any]:
        return psycopg.connect(self.url)

    def entries(self) -> list[Entry]:
        verify(self.lane.log)
        return [logged.entry for logged in self.lane.log.read(0, 1 << 40)]

    def changes(self) -> list[tuple[Any, ...]]:
        """Every row of the stream: table, operation, commit, ordinal, id."""
        return [
            (entry.table.name, *row)
            for entry in self.entries()
            if entry.kind == "rows" and entry.table
            for row in _columns(entry, "_op", "_commit", "_ordinal", "id")
            if row[0] != "r"
        ]

    def folded(self, table: str) -> dict[str, Row]:
        """What a table holds according to the log."""
        rows: dict[str, Row] = {}
        for entry in self.entries():
            if entry.table is None or entry.table.name != table:
                continue
            if entry.kind == "truncate":
                rows.clear()
            elif entry.kind == "rows":
                _fold(rows, entry)
        return rows

    def held(self, table: str) -> dict[str, Row]:
        """What it holds at the source."""
        found = self.db.execute(f"SELECT to_jsonb(t) FROM {table} t").fetchall()
        return {
            str(row["id"]): {k: None if v is None else str(v) for k, v in row.items()} for (row,) in found
        }

    def close(self) -> None:
        self.lane.close()
        self.db.close()


_NUMBERS = iter(range(1000))


def _columns(entry: Entry, *names: str) -> list[tuple[Any, ...]]:
    batch = decode_rows(entry.payload)
    return list(zip(*(batch[name].to_pylist() for name in names), strict=True))


def _fold(rows: dict[str, Row], entry: Entry) -> None:
    for row in decode_rows(entry.payload).to_pylist():
        cells = {name: value for name, value in row.items() if not name.startswith("_")}
        if row["_op"] == "d" or row.get("_before"):
            rows.pop(dict(row.get("_before") or {}).get("id", row["id"]), None)
        if row["_op"] != "d":
            assert row["_op"] == "u" or row["id"] not in rows, "an insert came twice"
            rows[row["id"]] = cells


@contextmanager
def captured(server: PostgresServer, folder: Path, more: str = "", log: str = "") -> Iterator[Captured]:
    here = Captured(server, folder, more, log)
    try:
        yield here
    finally:
        here.close()


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The xids of streamed transactions that committed; all of them on disk, block by block."""
    seen: list[int] = []
    commit = StreamedTransactions.commit

    def noted(self: StreamedTransactions, xid: int, *rest: int) -> None:
        seen.append(xid)
        commit(self, xid, *rest)

    monkeypatch.setattr(StreamedTransactions, "commit", noted)
    monkeypatch.setattr(spool, "MEMORY", 10_000)
    monkeypatch.setattr(spool, "_MAX_TAILS", 0)
    return seen


def insert(db: psycopg.Connection[Any], table: str, first: int, last: int) -> None:
    db.execute(f"INSERT INTO {table} SELECT i, {WIDE} FROM generate_series({first}, {last}) i")


SMALL_GROUPS = '[log]\nmax_group_bytes = "64KiB"\n'


def test_interleaved_transactions_come_in_the_order_of_their_commits(
    server: PostgresServer, tmp_path: Path, streamed: list[int]
) -> None:
    with captured(server, tmp_path, log=SMALL_GROUPS) as here:
        one, two, three = (here.session() for _ in range(3))
        with one, two, three:
            for step in range(3):
                for number, session in enumerate((one, two, three)):
                    start = number * 1000 + step * 100
                    insert(session, "t", start + 1, start + 100)
            two.commit()
            here.db.execute("INSERT INTO t VALUES (9000, 'small')")
            one.commit()
            three.rollback()
        here.catch_up()
        commits = [(commit, [*rows]) for commit, rows in groupby(here.changes(), key=lambda row: row[2])]
        assert [commit for commit, _ in commits] == sorted({commit for commit, _ in commits})
        assert [len(rows) for _, rows in commits] == [300, 1, 300]
        for _, rows in commits:
            assert [row[3] for row in rows] == list(range(1, len(rows) + 1))
        assert commits[0][1][0][4] == "1001"
        assert here.folded("t") == here.held("t")
        assert len(streamed) >= 2


@pytest.mark.parametrize("seed", [1, 2])
def test_what_is_rolled_back_leaves_nothing(
    server: PostgresServer, tmp_path: Path, streamed: list[int], seed: int
) -> None:
    """Savepoints nested, released, rolled back and gone on with, with DDL and TRUNCATE among them."""
    choice = random.Random(seed)
    with captured(server, tmp_path, log=SMALL_GROUPS) as here:
        for _ in range(4):
            sessions = {table: here.session() for table in "tu"}
            depth = dict.fromkeys(sessions, 0)
            for _ in range(30):
                table = choice.choice("tu")
                depth[table] = _something(choice, sessions[table], table, depth[table])
            for session in sessions.values():
                session.rollback() if choice.random() < 0.25 else session.commit()
                session.close()
        here.catch_up()
        for table in "tu":
            folded, held = here.folded(table), here.held(table)
            wide = set().union(*held.values()) if held else set()
            assert {k: {c: row.get(c) for c in wide} for k, row in folded.items()} == held
            newest = here.lane.log.schemas()
            shape = next(s for t, s in newest.items() if t.name == table)
            assert wide <= {column.name for column in shape.columns}
        assert streamed


def _something(choice: random.Random, db: psycopg.Connection[Any], table: str, depth: int) -> int:
    """Take one random step inside a transaction; returns how many savepoints are open then."""
    at = choice.randrange(400)
    does = choice.choices(
        ["insert", "update", "key", "delete", "savepoint", "back", "release", "ddl", "truncate"],
        [8, 3, 1, 2, 5, 4, 2, 1, 1],
    )[0]
    if does == "insert":
        db.execute(
            f"INSERT INTO {table} (id, v) SELECT i, {WIDE} FROM generate_series(%s::int, %s) i "
            "ON CONFLICT DO NOTHING",
            [at, at + choice.choice([0, 90])],
        )
    elif does == "update":
        db.execute(f"UPDATE {table} SET v = v || 'x' WHERE id BETWEEN %s AND %s", [at, at + 30])
    elif does == "key":
        db.execute(f"UPDATE {table} SET id = id + 10000 * (1 + id / 10000) WHERE id = %s", [at])
    elif does == "delete":
        db.execute(f"DELETE FROM {table} WHERE id BETWEEN %s AND %s", [at, at + 30])
    elif does == "savepoint":
        db.execute(f"SAVEPOINT s{depth + 1}")
        return depth + 1
    elif does in ("back", "release") and depth:
        to = choice.randint(1, depth)
        db.execute(f"{'ROLLBACK TO' if does == 'back' else 'RELEASE'} s{to}")
        return to if does == "back" else to - 1
    elif does == "ddl":
        db.execute(f"ALTER TABLE {table} ADD COLUMN c{choice.randrange(10**9)} int")
        db.execute(f"INSERT INTO {table} (id) VALUES (%s) ON CONFLICT DO NOTHING", [at + 500])
    elif does == "truncate":
        db.execute(f"TRUNCATE {table}")
    return depth


def test_a_change_of_shape_that_is_rolled_back_is_none(
    server: PostgresServer, tmp_path: Path, streamed: list[int]
) -> None:
    with captured(server, tmp_path) as here:
        with here.session() as db:
            insert(db, "t", 1, 100)
            insert(db, "u", 1, 10)
            db.execute("SAVEPOINT s")
            db.execute("ALTER TABLE t ADD COLUMN never int")
            insert(db, "u", 301, 400)
            db.execute("INSERT INTO t VALUES (1000, 'x', 5)")
            insert_wide = f"INSERT INTO t (id, v) SELECT i, {WIDE} FROM generate_series(1001, 1100) i"
            db.execute(insert_wide)
            db.execute("ROLLBACK TO s")
            insert(db, "t", 101, 200)
            insert(db, "u", 11, 100)
            db.execute("ALTER TABLE u ADD COLUMN later int")
            db.execute("INSERT INTO u VALUES (101, 'x', 5)")
            db.execute("SAVEPOINT s")
            db.execute("ALTER TABLE t ADD COLUMN never int")
            insert_wide = insert_wide.replace("1001, 1100", "2001, 2100")
            db.execute(insert_wide)
            db.execute("ROLLBACK TO s")
        here.db.execute("INSERT INTO t VALUES (201, 'y')")
        here.catch_up()
        shapes = [TableSchema.from_json(e.payload) for e in here.entries() if e.kind == "schema"]
        names = [(s.table.name, [c.name for c in s.columns]) for s in shapes if s.version > 1]
        assert names == [("u", ["id", "v", "later"])]
        assert len(here.changes()) == 302
        assert here.folded("t") == here.held("t")
        assert streamed


def test_what_a_server_cannot_stream_is_awaited_as_a_whole(
    server: PostgresServer, tmp_path: Path, streamed: list[int]
) -> None:
    with captured(server, tmp_path, log=SMALL_GROUPS) as here:
        with here.session() as db:
            insert(db, "t", 1, 100)
            db.execute("SAVEPOINT s")
            db.execute("ALTER TABLE t ADD COLUMN never int")
            db.execute(f"INSERT INTO t (id, v) SELECT i, {WIDE} FROM generate_series(301, 400) i")
            db.execute("ROLLBACK TO s")
            insert(db, "t", 101, 200)
            db.execute("ALTER TABLE t ADD COLUMN later int")
            db.execute("INSERT INTO t VALUES (201, 'x', 5)")
        here.catch_up()
        assert streamed == []
        assert {row["later"] for row in here.held("t").values()} == {None, "5"}
        assert here.folded("t")["201"] == here.held("t")["201"]
        assert len(here.changes()) == 201


def test_truncates_and_messages_have_their_place_in_the_transaction(
    server: PostgresServer, tmp_path: Path, streamed: list[int]
) -> None:
    with captured(server, tmp_path) as here:
        with here.session() as db:
            insert(db, "t", 1, 100)
            db.execute("TRUNCATE t, u")
            db.execute("SELECT pg_logical_emit_message(true, 'app', 'half')")
            db.execute("SAVEPOINT s")
            db.execute("TRUNCATE t")
            db.execute("SELECT pg_logical_emit_message(true, 'app', 'never')")
            insert(db, "t", 1, 100)
            db.execute("ROLLBACK TO s")
            insert(db, "t", 1, 100)
        here.catch_up()
        mine = [entry for entry in here.entries() if entry.last.commit == here.changes()[-1][2]]
        assert [(e.kind, e.first.ordinal, e.last.ordinal) for e in mine] == [
            ("rows", 1, 100),
            ("truncate", 101, 101),
            ("truncate", 101, 101),
            ("message", 102, 102),
            ("rows", 103, 202),
        ]
        assert streamed


def test_messages_outside_of_transactions_are_entries_in_their_place(
    server: PostgresServer, tmp_path: Path
) -> None:
    with captured(server, tmp_path) as here:
        for number, word in enumerate(("a", "b", "c")):
            here.db.execute("INSERT INTO t VALUES (%s)", [number])
            here.db.execute("SELECT pg_logical_emit_message(false, 'app', %s)", [word])
        here.catch_up()
        here.catch_up()
        commits = [row[2] for row in here.changes()]
        messages = [entry for entry in here.entries() if b'"app"' in entry.payload]
        assert [json.loads(entry.payload)["content"] for entry in messages] == ["a", "b", "c"]
        places = [entry.last.commit for entry in messages]
        both = [place for pair in zip(commits, places, strict=True) for place in pair]
        assert both == sorted(set(both))
        assert all(entry.last.ordinal == 0 and entry.table is None for entry in messages)
        assert all(entry.committed_at > 1_600_000_000_000_000 for entry in messages)


def test_a_message_alone_is_confirmed(server: PostgresServer, tmp_path: Path) -> None:
    with captured(server, tmp_path) as here:
        here.db.execute("SELECT pg_logical_emit_message(false, 'app', 'last')")
        before = durable_commit(here.lane.log)
        stop = threading.Event()
        thread = threading.Thread(target=here.lane.capture, args=(stop,))
        thread.start()
        deadline = time.monotonic() + 20
        slot = here.project.sources[0].slot
        query = "SELECT confirmed_flush_lsn - '0/0'::pg_lsn FROM pg_replication_slots WHERE slot_name = %s"
        while time.monotonic() < deadline:
            row = here.db.execute(query, [slot]).fetchone()
            position = durable_commit(here.lane.log)
            assert row is not None
            if position > before and int(row[0]) >= position:
                break
            time.sleep(0.05)
        stop.set()
        thread.join()
        assert [e.kind for e in here.entries() if b'"last"' in e.payload] == ["message"]
        assert int(row[0]) >= position
        here.db.execute("INSERT INTO t VALUES (1)")
        here.catch_up()
        assert [e for e in here.entries() if b'"last"' in e.payload][1:] == []
        assert here.folded("t") == here.held("t")


def test_prepared_transactions_come_when_they_commit(
    server: PostgresServer, tmp_path: Path, streamed: list[int]
) -> None:
    with captured(server, tmp_path) as here:
        for number, size in enumerate((100, 1)):
            for ends in ("kept", "dropped"):
                with here.session() as db:
                    start = number * 1000 + (500 if ends == "kept" else 0)
                    insert(db, "t", start + 1, start + size)
                    db.execute(f"PREPARE TRANSACTION '{here.project.sources[0].slot}_{ends}_{number}'")
        here.catch_up()
        assert here.changes() == []
        for number in range(2):
            here.db.execute(f"ROLLBACK PREPARED '{here.project.sources[0].slot}_dropped_{number}'")
            here.db.execute(f"COMMIT PREPARED '{here.project.sources[0].slot}_kept_{number}'")
        here.catch_up()
        assert len(here.changes()) == 101
        assert here.folded("t") == here.held("t")


@contextmanager
def from_elsewhere(here: Captured) -> Iterator[psycopg.Connection[Any]]:
    """A session whose transactions have an origin, named as the slot is."""
    name = here.project.sources[0].slot
    with here.session() as db:
        db.execute("SELECT pg_replication_origin_create(%s)", [name])
        db.execute("SELECT pg_replication_origin_session_setup(%s)", [name])
        db.commit()  # a server tells the origin of a streamed transaction by its first change
        yield db
        db.execute("SELECT pg_replication_origin_session_reset()")


def test_origins_are_filtered_at_the_server(server: PostgresServer, tmp_path: Path) -> None:
    with captured(server, tmp_path, more='origin = "none"\n') as here:
        with from_elsewhere(here) as db:
            insert(db, "t", 1, 100)
            db.commit()
            insert(db, "t", 101, 101)
        insert(here.db, "t", 201, 300)
        here.catch_up()
        assert [int(row[4]) for row in here.changes()] == list(range(201, 301))


def test_a_transaction_knows_its_origin(
    server: PostgresServer, tmp_path: Path, streamed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Transaction] = []
    build = GroupBuilder.build

    def noted(self: GroupBuilder, transactions: Any, *rest: Any) -> Any:
        seen.extend(transactions)
        return build(self, transactions, *rest)

    monkeypatch.setattr(GroupBuilder, "build", noted)
    with captured(server, tmp_path) as here:
        with from_elsewhere(here) as db:
            insert(db, "t", 1, 100)
            db.commit()
            insert(db, "t", 101, 103)
            db.commit()
        insert(here.db, "t", 201, 290)
        here.catch_up()
        assert here.folded("t") == here.held("t")
        name = here.project.sources[0].slot
        changes = [(t.rows, t.origin) for t in seen if t.rows > 1]  # without messages
        assert changes == [(100, name), (3, name), (90, "")]
        assert len(streamed) >= 2


def test_restarts_lose_and_double_nothing(
    server: PostgresServer, tmp_path: Path, streamed: list[int]
) -> None:
    with captured(server, tmp_path, log=SMALL_GROUPS) as here, here.session() as db:
        insert(db, "t", 1, 200)
        here.catch_up()  # stops while the transaction is being streamed
        insert(db, "t", 201, 400)
        here.lane.close()
        here.lane = here.open()
        here.catch_up()
        insert(db, "t", 401, 600)  # a server streams nothing that lies before where it starts
        db.commit()
        groups = here.lane.source.read(here.lane.log)
        taken = 0
        for group in groups:  # its owner fails in the middle of the group
            for _ in group:
                taken += 1
                if taken > 3:
                    break
            if taken > 3:
                break
        groups.close()
        assert taken > 3
        assert here.changes() == []
        here.catch_up()
        assert here.folded("t") == here.held("t")
        assert len(here.changes()) == 600
        assert streamed


def test_a_full_spool_is_announced_and_then_refused(
    server: PostgresServer, tmp_path: Path, streamed: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    with captured(server, tmp_path, more='spool_max = "1MiB"\n') as here, here.session() as db:
        random_text = "(SELECT string_agg(md5(random()::text), '') FROM generate_series(1, 300 + i * 0))"
        db.execute(f"INSERT INTO t SELECT i, {random_text} FROM generate_series(1, 400) i")
        with pytest.raises(SourceUnavailable, match="as much as spool_max allows") as caught:
            here.catch_up()
        assert "raise spool_max in [source.shop]" in caught.value.remedy
        assert "SPOOL of source shop" in caplog.text
        db.rollback()
        here.db.execute("INSERT INTO t VALUES (1)")
        here.catch_up()
        assert here.folded("t") == here.held("t")


@pytest.mark.parametrize("server", [18], indirect=True)
def test_a_long_append_keeps_the_connection(
    server: PostgresServer, tmp_path: Path, streamed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with captured(server, tmp_path, log=SMALL_GROUPS) as here:
        here.db.execute("ALTER ROLE postgres SET wal_sender_timeout = '1500ms'")
        try:
            insert(here.db, "t", 1, 500)
            insert(here.db, "u", 1, 5000)
            append = here.lane.log.append
            slept = []

            def slow(entries: Any) -> Any:
                def paced() -> Iterator[Entry]:
                    for number, entry in enumerate(entries):
                        if number == 1 and not slept:
                            slept.append(time.sleep(2.5))
                        yield entry

                return append(paced())

            monkeypatch.setattr(here.lane.log, "append", slow)
            here.catch_up()
            assert slept
            assert here.folded("t") == here.held("t")
            assert here.folded("u") == here.held("u")
        finally:
            here.db.execute("ALTER ROLE postgres RESET wal_sender_timeout")
