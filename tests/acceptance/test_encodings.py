"""Databases whose text is not UTF-8: converted where its meaning is known, kept as bytes where not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import psycopg
import pytest

from headrace.config import Project, load_project
from headrace.pipeline import Pipeline, open_lanes
from headrace.server import read_rows
from headrace.sources.postgres.preflight import inspect
from headrace.sources.postgres.undecodable import original
from headrace.testing.postgres import PostgresServer
from headrace.verify import verify
from pipelines import raw
from projects import here

DEBIAN = Path("/usr/lib/postgresql/15/bin")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    with PostgresServer(tmp_path_factory.mktemp("pg"), 15, bin_folder=DEBIAN) as server:
        yield server


def project_in(server: PostgresServer, folder: Path, name: str, encoding: str) -> Project:
    """A project on a new database of an encoding."""
    server.psql(
        f"CREATE DATABASE {name} ENCODING '{encoding}' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'"
    )
    url = server.url.removesuffix("postgres") + name
    (folder / "headrace.toml").write_text(
        f'[source.pg]\ntype = "postgres"\nurl = "{url}"\nslot = "{name}"\n'
        '[destination]\ntype = "duckdb"\npath = "warehouse.duckdb"\n'
    )
    return load_project(folder)


def database(project: Project) -> psycopg.Connection[Any]:
    """A connection that writes bytes as they are."""
    url = project.sources[0].url.reveal()
    return psycopg.connect(url, autocommit=True, client_encoding="SQL_ASCII")


def once(project: Project) -> None:
    Pipeline(load_project(project.root)).run_once()


@pytest.mark.parametrize(
    ("encoding", "stored", "text"),
    [
        ("LATIN1", b"\xe4\xfc\xdf \xa0\xff", "äüß \u00a0ÿ"),
        ("WIN1252", b"\x80 \x93q\x94", "€ “q”"),
        ("EUC_JP", b"\xc5\xec\xb5\xfe", "東京"),
    ],
)
def test_text_of_a_known_encoding_is_converted(
    server: PostgresServer, tmp_path: Path, encoding: str, stored: bytes, text: str
) -> None:
    project = project_in(server, tmp_path, f"in_{encoding.lower()}", encoding)
    with database(project) as db:
        db.execute("SET client_encoding = " + encoding)
        db.execute("CREATE TABLE t (k text PRIMARY KEY, v text)")
        db.execute("ALTER TABLE t REPLICA IDENTITY FULL")
        db.execute(b"INSERT INTO t VALUES ('a" + stored + b"', '" + stored + b"')")
        once(project)
        db.execute(b"INSERT INTO t VALUES ('b" + stored + b"', '" + stored + b"')")
        db.execute("UPDATE t SET v = v || '!' WHERE k LIKE 'a%'")
    once(project)
    changes = [(row["_op"], row["k"], row["v"]) for row in raw(project, "t")]
    assert changes == [
        ("r", "a" + text, text), ("c", "b" + text, text), ("u", "a" + text, text + "!")
    ]  # fmt: skip
    assert [finding for finding in verify(project).findings if not finding.ok] == []


def test_bytes_that_are_no_text_are_kept_and_told_apart(server: PostgresServer, tmp_path: Path) -> None:
    cells = [
        b"\xe4\xfc",
        b"\xff",
        b"\xc3",
        b"\xed\xa0\x80",
        b"ok\xfe",
        "größe".encode(),
        b"plain",
        b"\\xff",
        b"",
    ]
    project = project_in(server, tmp_path, "in_ascii", "SQL_ASCII")
    assert [f.level for f in inspect(project.sources[0]) if "SQL_ASCII" in f.what] == ["warn"]
    with database(project) as db:
        db.execute("CREATE TABLE t (k text, n integer, v text, vs text[], PRIMARY KEY (k, n))")
        for n in (1, 2):
            for cell in cells:
                literal = b"'" + cell + b"'"
                db.execute(
                    b"INSERT INTO t VALUES (" + literal + b", " + b"%d" % n + b", " + literal + b", ARRAY["
                    + literal + b", NULL])"
                )  # fmt: skip
            if n == 1:
                once(project)
        db.execute("UPDATE t SET n = 3 WHERE n = 1")
        db.execute("ALTER TABLE t REPLICA IDENTITY FULL")
        db.execute("UPDATE t SET v = NULL WHERE n = 2")
        db.execute("DELETE FROM t WHERE n = 3 AND k < 'p'")
    once(project)
    rows = raw(project, "t")
    for op, n in (("r", "1"), ("c", "2"), ("u", "3")):
        of = [row for row in rows if row["_op"] == op and row["n"] == n]
        assert [original(row["k"]) for row in of] == cells
        assert [original(row["v"]) for row in of] == cells
        assert all(row["vs"] is not None for row in of)
    emptied = [row for row in rows if row["_op"] == "u" and row["n"] == "2"]
    assert [original(dict(row["_before"])["v"]) for row in emptied] == cells
    assert {original(row["k"]) for row in rows if row["_op"] == "d"} == {c for c in cells if c < b"p"}
    with duckdb.connect(str(project.destination.path), read_only=True) as db:
        arrived = {original(row[0]) for row in db.execute("SELECT k FROM pg.t WHERE n = 2").fetchall()}
        marked = db.execute("SELECT count(*) FROM pg.t WHERE n = 2 AND starts_with(k, chr(0))").fetchone()
    assert arrived == set(cells)
    assert marked == (5,)
    assert [finding for finding in verify(project).findings if not finding.ok] == []


def test_a_logical_message_that_is_no_text_is_kept(server: PostgresServer, tmp_path: Path) -> None:
    project = project_in(server, tmp_path, "in_messages", "UTF8")
    with database(project) as db:
        db.execute("CREATE TABLE t (k text PRIMARY KEY)")
        once(project)
        db.execute("SELECT pg_logical_emit_message(true, 'app', '\\x00ff'::bytea)")
    once(project)
    (lane,) = open_lanes(project, read_only=True)
    said = [item.entry.payload for item in lane.log.read(0, 1 << 30) if item.entry.kind == "message"]
    assert any(b'"\\u0000\\\\x00ff"' in payload for payload in said)


def test_a_column_whose_name_is_no_text_holds_up_nothing_but_its_table(
    server: PostgresServer, tmp_path: Path
) -> None:
    project = project_in(server, tmp_path, "in_names", "SQL_ASCII")
    with database(project) as db:
        for table in ("good", "bad"):
            db.execute(f"CREATE TABLE {table} (k int PRIMARY KEY, v text)")
        once(project)
        db.execute(b'ALTER TABLE bad RENAME v TO "v\xff"')
        for k in (1, 2):
            for table in ("good", "bad"):
                db.execute(f"INSERT INTO {table} VALUES ({k}, 'x')")
        once(project)
        assert len(raw(project, "good")) == 2
        assert raw(project, "bad") == []
        query = "SELECT DISTINCT status, reason, model FROM headrace.quarantine"
        ((status, reason, model),) = read_rows(project, query)[1]
        assert (status, reason, model) == ("quarantined", "decode.message", "pg.bad")
        ((issues, records),) = read_rows(
            project, "SELECT count(DISTINCT issue), count(*) FROM headrace.quarantine WHERE op = 'c'"
        )[1]
        assert (issues, records) == (1, 2)
        db.execute(b'ALTER TABLE bad RENAME "v\xff" TO v')
        assert here("tables", "resync", "bad", cwd=tmp_path).code == 0
        once(project)
    assert len(raw(project, "bad")) == 2
    assert [
        tuple(row) for row in read_rows(project, "SELECT DISTINCT status FROM headrace.quarantine")[1]
    ] == [("superseded",)]
    assert [finding for finding in verify(project).findings if not finding.ok] == []
