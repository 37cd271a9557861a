"""Our envelope against Debezium's own engine, on the same transactions: record by record, field by field."""

from __future__ import annotations

import json
import struct
import threading
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from debezium_engine import PREFIX, record
from debezium_values import LARGE, TYPES

from headrace.change import Entry, TableSchema, shape_in
from headrace.config import load_project
from headrace.debezium import Envelope, Event
from headrace.payload import decode_rows
from headrace.pipeline import open_lanes
from headrace.testing.postgres import PostgresServer

Record = dict[str, Any]

DEFINED = """
CREATE TYPE mood AS ENUM ('sad', 'it''s ok');
CREATE DOMAIN posint AS int CHECK (value > 0);
CREATE DOMAIN email AS varchar;
CREATE DOMAIN dnum AS numeric(5,2);
CREATE TYPE pair AS (a int, b text);
CREATE TABLE plain (id int PRIMARY KEY, v text, n int);
CREATE TABLE keyless (x text, y int); ALTER TABLE keyless REPLICA IDENTITY FULL;
CREATE TABLE whole (k int PRIMARY KEY, v text, big text); ALTER TABLE whole REPLICA IDENTITY FULL;
ALTER TABLE whole ALTER big SET STORAGE EXTERNAL;
CREATE TABLE whole_keyless (x text, y numeric(6,2)); ALTER TABLE whole_keyless REPLICA IDENTITY FULL;
CREATE TABLE by_index (a int, b int NOT NULL, c text); CREATE UNIQUE INDEX i ON by_index (b);
ALTER TABLE by_index REPLICA IDENTITY USING INDEX i;
CREATE SCHEMA "Oth.er"; CREATE TABLE "Oth.er"."Tä ble" (p int, "Q" text, r date, PRIMARY KEY ("Q", p));
"""
DOMAINS = {"public.posint": "integer", "public.email": "character varying", "public.dnum": "numeric(5,2)"}

WORK = [
    "INSERT INTO plain VALUES (1, 'one', 1), (2, NULL, NULL)",
    "UPDATE plain SET v = 'two' WHERE id = 2",
    "UPDATE plain SET id = 3 WHERE id = 2",
    "DELETE FROM plain WHERE id = 3",
    "BEGIN; INSERT INTO keyless VALUES ('x', 1); INSERT INTO plain VALUES (4); "
    "INSERT INTO whole VALUES (1, 'v', repeat('y', 4000)); UPDATE whole SET v = 'w'; UPDATE whole SET k = 2; "
    "UPDATE plain SET n = 5; DELETE FROM whole; INSERT INTO keyless VALUES ('x', 2); COMMIT",
    "INSERT INTO whole_keyless VALUES ('a', 1.5)",
    "UPDATE whole_keyless SET y = 'NaN'",
    "DELETE FROM whole_keyless",
    "BEGIN; INSERT INTO plain VALUES (9, 'never'); ROLLBACK",
    "INSERT INTO by_index VALUES (1, 2, 'c')",
    "UPDATE by_index SET c = 'd'",
    "UPDATE by_index SET b = 3",
    "DELETE FROM by_index",
    """INSERT INTO "Oth.er"."Tä ble" VALUES (1, 'q', '2026-01-01')""",
    """UPDATE "Oth.er"."Tä ble" SET p = 2""",
    """DELETE FROM "Oth.er"."Tä ble" """,
    "SELECT pg_logical_emit_message(true, 'app', 'inside ü')",
    "BEGIN; INSERT INTO keyless VALUES ('z', 3); "
    "SELECT pg_logical_emit_message(true, 'app', '\\x00ff'::bytea); "
    "INSERT INTO keyless VALUES ('z', 4); COMMIT",
    "SELECT pg_logical_emit_message(false, 'app', 'outside')",
    "BEGIN; INSERT INTO keyless VALUES ('y', 2); TRUNCATE plain, keyless; "
    "INSERT INTO plain VALUES (7); COMMIT",
    *(f"INSERT INTO large{i} VALUES (1, {value})" for i, value in enumerate(LARGE.values())),
    *(f"UPDATE large{i} SET n = 1" for i in range(len(LARGE))),
    "UPDATE large0 SET id = 2",
    "INSERT INTO keyless VALUES ('last', 0)",
]


@pytest.fixture(scope="module", params=[16, 18])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[PostgresServer]:
    with PostgresServer(tmp_path_factory.mktemp("pg"), request.param) as server:
        yield server


def define(db: psycopg.Connection[Any]) -> None:
    db.execute(DEFINED.encode())
    for i, type_ in enumerate(TYPES):
        db.execute(f"CREATE TABLE typed{i} (id int PRIMARY KEY, v {type_})".encode())
        db.execute(f"ALTER TABLE typed{i} REPLICA IDENTITY FULL".encode())
    for i, type_ in enumerate(LARGE):
        db.execute(f"CREATE TABLE large{i} (id int PRIMARY KEY, v {type_}, n int)".encode())
        db.execute(f"ALTER TABLE large{i} ALTER v SET STORAGE EXTERNAL".encode())


def fill(db: psycopg.Connection[Any], first: int) -> int:
    """Insert every value of every type; returns how many rows there are."""
    count = 0
    for i, (type_, values) in enumerate(TYPES.items()):
        for k, value in enumerate([*values, None], first):
            db.execute(f"INSERT INTO typed{i} VALUES (%s, %s::{type_})".encode(), [k, value])
            count += 1
    return count


class Captured:
    """Our side: what the log holds, as events. No table changes its shape here."""

    def __init__(self, url: str, folder: Path, slot: str) -> None:
        (folder / "headrace.toml").write_text(
            f'[source.pg]\ntype = "postgres"\nurl = "{url}"\ntables = ["*.*"]\nslot = "{slot}"\n'
            'publication = "p"\n[destination]\ntype = "duckdb"\npath = "warehouse.duckdb"\n'
        )
        self.project = load_project(folder)
        (self.project.state / "log").mkdir(parents=True, exist_ok=True)
        self.offset = 0
        self.shapes: dict[Any, TableSchema] = {}

    def entries(self) -> list[Entry]:
        """Capture all that is committed, and return what is new in the log."""
        (lane,) = open_lanes(self.project)
        try:
            lane.capture(threading.Event(), until=lane.source.head())
            items = lane.log.read(self.offset, 1 << 40)
        finally:
            lane.close()
        self.offset = items[-1].offset
        for item in items:
            if shape := shape_in(item.entry.kind, item.entry.payload):
                self.shapes[shape.table] = shape
        return [item.entry for item in items]

    def events(self, kinds: set[str]) -> list[Event]:
        """Return the events of entries of these kinds, our own messages left out."""
        entries = [entry for entry in self.entries() if not _is_own(entry)]
        envelope = Envelope(PREFIX, "postgres", DOMAINS)
        commits: set[int] = set()
        for entry in entries:
            if entry.kind == "rows":
                commits |= set(decode_rows(entry.payload)["_commit"].to_pylist())
            elif entry.kind == "message":
                told = json.loads(entry.payload)
                commits.add(entry.last.commit if told["txid"] else told["lsn"])
        envelope.see(0, sorted(commits))
        return [event for entry in entries for event in self._made(envelope, entry) if entry.kind in kinds]

    def _made(self, envelope: Envelope, entry: Entry) -> list[Event]:
        match entry.kind:
            case "rows" | "copy":
                batch = decode_rows(entry.payload)
                if entry.kind == "copy":
                    assert set(batch["_lsn"].to_pylist()) == {entry.first.commit}
                return list(envelope.rows(self.shapes[entry.table], batch))
            case "truncate":
                return [envelope.truncate(entry)]
            case "message":
                return [envelope.message(entry)]
        return []


def _is_own(entry: Entry) -> bool:
    return entry.kind == "message" and json.loads(entry.payload).get("prefix") == "headrace"


def record_of(event: Event) -> Record:
    return json.loads(
        json.dumps(
            {
                "topic": event.topic,
                "key": event.key,
                "value": event.value,
                "headers": sorted(event.headers.items()),
            }
        )
    )


def comparable(told: Record) -> Record:
    """A record without who made it and when: versions, times of processing, the engine's own headers."""
    headers = sorted(header for header in told["headers"] if not header[0].startswith("__debezium.context."))
    value = told["value"] and {k: v for k, v in told["value"].items() if not k.startswith("ts_")}
    if value:
        value["source"] = {k: v for k, v in value["source"].items() if k != "version"}
        for image in (value.get("before"), value.get("after")):
            if image and told["topic"] == f"{PREFIX}.public.typed{_REAL}" and isinstance(image["v"], float):
                image["v"] = struct.pack("f", image["v"]).hex()  # Java 17 writes more digits than there are
    return {"topic": told["topic"], "key": told["key"], "value": value, "headers": headers}


_REAL = list(TYPES).index("real")


def by_topic(records: list[Record]) -> dict[str, list[Record]]:
    found = defaultdict(list)
    for told in records:
        found[told["topic"]].append(comparable(told))
    return found


def test_events_are_those_of_the_engine(server: PostgresServer, tmp_path: Path) -> None:
    ours = Captured(server.url, tmp_path, "ours")
    with psycopg.connect(server.url, autocommit=True) as db:
        define(db)
        ours.entries()
        db.execute("SELECT pg_create_logical_replication_slot('engine', 'pgoutput')")
        fill(db, 0)
        for statement in WORK:
            db.execute(statement.encode())
    made = [record_of(event) for event in ours.events({"rows", "truncate", "message"})]
    told = record(server, tmp_path, "engine", "p", len(made), "no_data")
    assert told[-1]["value"]["after"] == {"x": "last", "y": 0}
    expected, found = by_topic(told), by_topic(made)
    assert found.keys() == expected.keys()
    wrong = [
        (types_of(topic), theirs, mine)
        for topic in expected
        for theirs, mine in zip(expected[topic], found[topic], strict=True)
        if theirs != mine
    ]
    assert not wrong, "\n".join(f"{name}\n  {theirs}\n  {mine}" for name, theirs, mine in wrong[:20])
    assert {told["value"]["op"] for told in made if told["value"]} == {*"cudtm"}


def test_copied_values_are_those_of_the_engines_snapshot(server: PostgresServer, tmp_path: Path) -> None:
    with psycopg.connect(server.url, autocommit=True) as db:
        db.execute("CREATE DATABASE copied")
    url = server.url.removesuffix("postgres") + "copied"
    with psycopg.connect(url, autocommit=True) as db:
        define(db)
        count = fill(db, 0)
        made = [record_of(event) for event in Captured(url, tmp_path, "ours_copied").events({"copy"})]
    told = record(server, tmp_path, "snapshot", "p", count, "initial_only", database="copied")
    assert {record["value"]["op"] for record in made + told} == {"r"}
    expected, found = (
        {_row(one): comparable(one)["value"]["after"] for one in all_} for all_ in (told, made)
    )
    assert len(expected) == len(found) == count
    wrong = {row: (expected[row], found[row]) for row in expected if expected[row] != found[row]}
    # The engine's snapshot, unlike its stream, loses the era of dates and what is infinite.
    lost = [f"{i}" for i, value in enumerate(TYPES["date"]) if "BC" in value or "infinity" in value]
    assert {row: values for row, values in wrong.items() if not (row[0] == "date" and row[1] in lost)} == {}


def _row(told: Record) -> tuple[str, str]:
    return types_of(told["topic"]), str(told["key"]["id"])


def types_of(topic: str) -> str:
    name = topic.rpartition(".")[2]
    for start, types in (("typed", TYPES), ("large", LARGE)):
        if name.startswith(start):
            return list(types)[int(name.removeprefix(start))]
    return name
