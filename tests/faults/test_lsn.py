"""Every change carries its place in the WAL, as the server itself reports it, however it is read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import test_bulk
from test_bulk import capture, config_of, everything, head, insert, open_log

from headrace.log.sqlite import SQLiteLog
from headrace.payload import decode_rows
from headrace.sources.postgres import follow
from headrace.sources.postgres.lsn import parse_lsn
from headrace.sources.postgres.spool import StreamedTransactions
from headrace.testing.postgres import PostgresServer


@pytest.fixture(scope="module", params=[16, 18])
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that streams what is larger than 64 kB, with a history that three slots have before them."""
    settings = {"logical_decoding_work_mem": "64kB"}
    with PostgresServer(tmp_path_factory.mktemp("pg"), request.param, settings) as server:
        with psycopg.connect(server.url, autocommit=True) as db:
            db.execute("CREATE TABLE t (id int PRIMARY KEY, a text, big text)")
            db.execute("CREATE PUBLICATION p FOR TABLE t WITH (publish_via_partition_root)")
            for slot in ("streamed", "whole", "bulk", "told"):
                db.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [slot])
        yield server.url


def write(url: str) -> None:
    with psycopg.connect(url, autocommit=True) as db, psycopg.connect(url) as other:
        everything(db)
        other.execute("INSERT INTO t VALUES (-7, 'between', '')")
        with db.transaction():
            insert(db, 300_001, 3000, per_transaction=1000)
            db.execute("SELECT pg_logical_emit_message(true, 'app', 'inside')")
            with db.transaction(force_rollback=True):
                db.execute("DELETE FROM t WHERE id > 0")
            other.execute("UPDATE t SET a = 'between' WHERE id = -7")
            other.commit()
            db.execute("TRUNCATE t")
            insert(db, 400_001, 3000, per_transaction=1000)


Place = tuple[str, int, int]
"""Kind of a change, its LSN, its transaction's id."""


def told_by_the_server(url: str) -> list[Place]:
    """What a peek tells of each change, without what it is."""
    options = "'proto_version', '1', 'publication_names', 'p', 'messages', 'true'"
    peek = f"pg_logical_slot_peek_binary_changes('told', NULL, NULL, {options})"
    kinds = {b"I": "c", b"U": "u", b"D": "d", b"T": "t", b"M": "m"}
    with psycopg.connect(url) as db:
        rows = db.execute(f"SELECT lsn::text, xid::text, data FROM {peek}".encode()).fetchall()
    places = []
    for lsn, xid, data in rows:
        if (kind := kinds.get(data[:1])) and b"headrace\0" not in data:
            outside = kind == "m" and data[1] == 0
            places.append((kind, parse_lsn(lsn), 0 if outside else int(xid)))
    return sorted(places)


def held_by(log: SQLiteLog) -> list[Place]:
    places: list[Place] = []
    for item in log.read(1, 1 << 40):
        entry: Any = item.entry
        if entry.kind == "rows":
            batch = decode_rows(entry.payload)
            assert batch.schema.names[:6] == ["_op", "_commit", "_ordinal", "_committed_at", "_txid", "_lsn"]
            places += zip(*(batch[name].to_pylist() for name in ("_op", "_lsn", "_txid")), strict=True)
        elif entry.kind in ("truncate", "message"):
            told = json.loads(entry.payload)
            if told.get("prefix") != "headrace":
                places.append((entry.kind[0], told["lsn"], told["txid"]))
    return sorted(places)


def test_every_change_has_the_lsn_that_the_server_tells(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"streamed": 0, "whole": 0, "bulk": test_bulk.MIB << 6}
    configs = {name: config_of(url, name, peek_temp_max=room) for name, room in names.items()}
    logs = {name: open_log(tmp_path / f"{name}.db", config) for name, config in configs.items()}
    write(url)
    end = head(url)
    blocks: list[int] = []
    start = StreamedTransactions.start
    monkeypatch.setattr(StreamedTransactions, "start", lambda *of: blocks.append(of[1]) or start(*of))
    capture(logs["streamed"], configs["streamed"], end)
    assert len(blocks) > 3, "the server streamed"
    blocks.clear()
    stream = follow.Stream
    monkeypatch.setattr(follow, "Stream", lambda *of, **_: stream(*of, streaming=False))
    capture(logs["whole"], configs["whole"], end)
    test_bulk._make_small(monkeypatch.setattr)
    monkeypatch.delattr(follow, "Stream")
    capture(logs["bulk"], configs["bulk"], end)
    assert not blocks
    expected = told_by_the_server(url)
    assert {kind for kind, *_ in expected} == {*"cudtm"}
    assert len(expected) > 10_000
    assert any(txid == 0 for *_, txid in expected)
    for log in logs.values():
        assert held_by(log) == expected
