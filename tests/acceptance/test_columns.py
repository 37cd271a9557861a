"""Columns left out, columns hashed and conditions on rows: in force before the log, and never to the
application's harm."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import psycopg
import pytest

from headrace.config import Project, load_project
from headrace.errors import SourceGap, UserError
from headrace.log.sqlite import SQLiteLog
from headrace.payload import decode_rows
from headrace.pipeline import Pipeline
from headrace.sources.postgres.clauses import Clause, held_clauses
from headrace.sources.postgres.preflight import inspect
from headrace.testing.postgres import INSTALLS, PostgresServer
from headrace.verify import verify

SALT = "a salt that is long enough"
SETTINGS = f"""
exclude = ["public.*.secret"]
hash = ["public.*.email", "public.persons.id"]
hash_salt = "{SALT}"
chunk_bytes = "64KiB"
[source.shop.where]
"public.orders" = "shop <> 'test' AND created_at >= '2024-01-01'"
"""
DEFINITIONS = """
CREATE TABLE users (id int PRIMARY KEY, email text, secret text, v text);
ALTER TABLE users ALTER email SET STORAGE EXTERNAL;
CREATE TABLE whole (id int PRIMARY KEY, email text, secret text);
ALTER TABLE whole REPLICA IDENTITY FULL;
CREATE TABLE bag (email text, secret text, flag boolean);
ALTER TABLE bag REPLICA IDENTITY FULL;
CREATE TABLE persons (id numeric PRIMARY KEY, v text);
CREATE TABLE readers (email text PRIMARY KEY, v text);
CREATE TABLE numbers (id int PRIMARY KEY, v text);
CREATE TABLE orders (id int PRIMARY KEY, created_at timestamptz, shop text);
ALTER TABLE orders REPLICA IDENTITY FULL;
"""


@pytest.fixture(scope="module", params=sorted(INSTALLS))
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[PostgresServer]:
    with PostgresServer(tmp_path_factory.mktemp("columns") / "pg", request.param) as running:
        yield running


def run(server: PostgresServer, *statements: str, database: str = "postgres") -> None:
    url = server.url.removesuffix("postgres") + database
    with psycopg.connect(url, autocommit=True) as db:
        for statement in statements:
            db.execute(statement.encode())


def made(folder: Path, server: PostgresServer, settings: str, database: str = "postgres") -> Project:
    url = server.url.removesuffix("postgres") + database
    (folder / "headrace.toml").write_text(
        f'[source.shop]\nurl = "{url}"\nslot = "{database}"\n{settings}\n[log]\ngroup_linger = "0ms"\n'
    )
    return load_project(folder)


def once(project: Project) -> Project:
    project = load_project(project.root)
    Pipeline(project).run_once()
    return project


def found(project: Project, sql: str) -> list[tuple[Any, ...]]:
    with duckdb.connect(str(project.destination.path), read_only=True) as db:
        return db.execute(sql).fetchall()


def clauses(project: Project) -> dict[str, Clause | None]:
    with psycopg.connect(project.sources[0].url.reveal()) as db:
        return {table.name: clause for table, clause in held_clauses(db, "headrace_shop").items()}


def digest(text: str) -> str:
    return hashlib.sha256((SALT + text).encode()).hexdigest()


def fill(base: int) -> str:
    """Whatever must not be seen begins with `hidden`, whatever is seen as its hash only with `plain`."""
    rows = f"FROM generate_series({base}, {base + 4}) n"
    return f"""
    INSERT INTO users SELECT n, 'plain ' || n || repeat('é', 3000), 'hidden ' || n, 'v' {rows};
    INSERT INTO whole SELECT n, 'plain ' || n, 'hidden ' || n {rows};
    INSERT INTO bag SELECT 'plain', 'hidden ' || n, n % 2 = 0 {rows};
    INSERT INTO persons SELECT n + 0.50, 'v' {rows};
    INSERT INTO readers SELECT 'plain ' || m, repeat('v', 200) FROM generate_series({base}, {base} + 999) m
      ON CONFLICT DO NOTHING;
    INSERT INTO numbers SELECT m, repeat('v', 200) FROM generate_series({base}, {base} + 999) m
      ON CONFLICT DO NOTHING;
    INSERT INTO orders SELECT n, '2023-12-30'::timestamptz + (n % 5) * interval '1 day',
      CASE WHEN n % 5 = 4 THEN 'test' ELSE 'real' END {rows};
    """


@pytest.mark.parametrize("server", [18], indirect=True)
def test_what_is_left_out_or_hashed_is_in_no_file(server: PostgresServer, tmp_path: Path) -> None:
    run(server, DEFINITIONS, fill(0))
    project = once(made(tmp_path, server, SETTINGS))
    run(
        server,
        fill(100),
        "UPDATE users SET v = 'w', secret = 'hidden too' WHERE id IN (1, 101)",
        "DELETE FROM users WHERE id IN (2, 102)",
        "UPDATE users SET email = 'plain again', id = id + 1000 WHERE id IN (3, 103)",
        "UPDATE whole SET secret = 'hidden more'; UPDATE whole SET id = -id, email = NULL WHERE id = 101",
        "UPDATE bag SET flag = NULL WHERE flag AND secret < 'hidden 102'; DELETE FROM bag WHERE NOT flag",
        "UPDATE persons SET id = id + 1 WHERE id = 104.50; DELETE FROM persons WHERE id = 0.50",
        "UPDATE orders SET shop = 'test' WHERE id = 3; UPDATE orders SET shop = 'real' WHERE id = 4",
        "UPDATE orders SET created_at = '2020-01-01' WHERE id = 102; DELETE FROM orders WHERE id = 103",
    )
    once(project)
    assert not [finding for finding in verify(load_project(tmp_path)).findings if not finding.ok]
    long = "é" * 3000
    assert sorted(found(project, "SELECT id, email, v FROM shop.users")) == sorted(
        [(n, digest(f"plain {n}{long}"), "w" if n in (1, 101) else "v") for n in (0, 1, 4, 100, 101, 104)]
        + [(n + 1000, digest("plain again"), "v") for n in (3, 103)]
    )
    assert found(project, "SELECT email FROM shop.whole WHERE id = -101") == [(None,)]
    assert found(project, "SELECT flag, count(*), any_value(email) FROM shop.bag GROUP BY 1 ORDER BY 1") == [
        (True, 4, digest("plain")),
        (None, 2, digest("plain")),
    ]
    assert found(project, "SELECT count(DISTINCT email) FROM shop.readers") == [(1100,)]
    ids = {digest(f"{n}.50") for n in (1, 2, 3, 4, 100, 101, 102, 103, 105)}
    assert {row[0] for row in found(project, "SELECT id FROM shop.persons")} == ids
    assert found(project, "SELECT id FROM shop.orders ORDER BY 1") == [(2,), (4,)]
    _holds_nothing_of(project, (b"hidden", b"plain", SALT.encode()))


def _holds_nothing_of(project: Project, secrets: tuple[bytes, ...]) -> None:
    files = [path for path in project.root.rglob("*") if path.is_file() and path.suffix != ".toml"]
    texts = [path.read_bytes() for path in files]
    log = SQLiteLog(project.state / "log" / "shop.db", read_only=True)
    for item in log.read(0, 1 << 30):
        payload = item.entry.payload
        is_rows = item.entry.kind in ("rows", "copy")
        texts.append(repr(decode_rows(payload).to_pydict()).encode() if is_rows else payload)
    chunks = [table.name for _, table, _, _, mark in log.copy_marks() if mark.kind == "chunk"]
    assert chunks.count("readers") == 1, "bounds would tell keys"
    assert chunks.count("numbers") > 1
    log.close()
    raw = [path for path in files if path.suffix == ".parquet"]
    assert raw
    with duckdb.connect() as db:
        texts += [repr(db.read_parquet(str(path)).fetchall()).encode() for path in raw]
    assert sum(len(text) for text in texts) > 10_000
    for text in texts:
        assert not [secret for secret in secrets if secret in text]


def test_the_publication_leaves_out_what_it_can_without_harm(
    server: PostgresServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(server, "CREATE DATABASE cut")
    run(server, DEFINITIONS, fill(0), database="cut")
    project = made(tmp_path, server, SETTINGS, "cut")
    said = {finding.what for finding in inspect(project.sources[0], fresh=True)}
    assert {
        "columns left out: public.bag.secret, public.users.secret, public.whole.secret",
        "7 tables selected, each with a key but 1, whose equal rows are counted",
    } <= said
    once(project)
    held = clauses(project)
    assert held["users"] == Clause(("id", "email", "v"))
    assert held["whole"] == held["bag"] == held["persons"] == Clause()  # FULL takes no list of columns
    assert held["orders"] is not None
    assert "created_at" in held["orders"].where
    assert found(project, "SELECT id FROM shop.orders ORDER BY 1") == [(2,), (3,)]
    # What the application does goes on, also after the settings have changed.
    settings = SETTINGS.replace('"public.*.secret"', '"public.users.v", "public.bag.secret"').replace(
        "'2024-01-01'", "'2023-01-01'"
    )
    project = made(tmp_path, server, settings, "cut")
    for base in (50, 100):
        every = "; ".join(
            f"UPDATE {table} SET id = id + 50" for table in ("users", "whole", "persons", "orders")
        )
        run(
            server,
            every,
            "UPDATE bag SET flag = false; DELETE FROM orders WHERE shop = 'test'",
            database="cut",
        )
        once(project)
        # Two of them were never sent: they came by the copy that the new condition calls for.
        ids = found(project, "SELECT id FROM shop.orders ORDER BY 1")
        assert ids == [(base + n,) for n in range(4)]
    assert clauses(project)["users"] == Clause(("id", "email", "secret"))
    assert "2023" in str(clauses(project)["orders"])
    assert caplog.text.count("It is copied again beside its stream.") == 1
    assert found(project, "SELECT count(*), count(secret) FROM shop.users") == [(5, 5)]


def test_a_column_that_a_table_gains_is_published_and_said(
    server: PostgresServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(server, "CREATE DATABASE gains")
    run(server, "CREATE TABLE t (id int PRIMARY KEY, secret text)", database="gains")
    project = once(made(tmp_path, server, 'exclude = ["*.*.secret"]', "gains"))
    run(
        server,
        "ALTER TABLE t ADD COLUMN more text, ADD COLUMN other_secret text",
        "INSERT INTO t VALUES (1, 'x', 'unseen')",
        database="gains",
    )
    with caplog.at_level(logging.WARNING, "headrace.alert"):
        once(project)
    assert "PUBLICATION of public.t changed from columns id of all rows" in caplog.text
    run(
        server,
        "INSERT INTO t VALUES (2, 'x', 'seen'); UPDATE t SET more = 'seen' WHERE id = 1",
        database="gains",
    )
    once(project)
    assert found(project, "SELECT id, more FROM shop.t ORDER BY 1") == [(1, "seen"), (2, "seen")]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ('exclude = ["public.*.id"]', r"leaves out id, which is of the key of public\.users"),
        ('exclude = ["public.users.secert"]', r'no column public\.users\.secert; did you mean'),
        ('where = {"public.user" = "true"}', r'no table public\.user .*did you mean "public\.users"'),
        ('where = {"public.users" = "v = \'x\'"}', r"reads v, outside of the table's replica identity"),
        ('where = {"public.users" = "nope = 1"}', r'does not take .* column "nope" does not exist'),
        ('where = {"public.users" = "random() > id"}', r"does not take"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_kept_are_refused_before_anything_is_made(
    server: PostgresServer, tmp_path: Path, settings: str, message: str
) -> None:
    run(server, "DROP DATABASE IF EXISTS refused", "CREATE DATABASE refused")
    run(server, "CREATE TABLE users (id int PRIMARY KEY, secret text, v text)", database="refused")
    project = made(tmp_path, server, settings, "refused")
    failures = [finding.what for finding in inspect(project.sources[0]) if finding.level == "fail"]
    assert any(re.search(message, what) for what in failures), failures
    with pytest.raises(UserError, match=message):
        once(project)
    assert clauses(project) == {}


@pytest.mark.parametrize("server", [18], indirect=True)
def test_a_key_that_is_hashed_in_another_way_stops_the_source(server: PostgresServer, tmp_path: Path) -> None:
    run(server, "CREATE DATABASE salts")
    run(server, "CREATE TABLE persons (id text PRIMARY KEY, v text)", database="salts")
    run(server, "INSERT INTO persons VALUES ('a', 'x')", database="salts")
    project = once(made(tmp_path, server, SETTINGS.split("[source", maxsplit=1)[0], "salts"))
    for settings in ("", SETTINGS.split("[source", maxsplit=1)[0].replace(SALT, SALT + "!")):
        run(server, "UPDATE persons SET v = v || 'y'", database="salts")
        with pytest.raises(SourceGap, match="hashed in another way"):
            once(made(tmp_path, server, settings, "salts"))
    once(made(tmp_path, server, SETTINGS.split("[source", maxsplit=1)[0], "salts"))
    assert found(project, "SELECT id, v FROM shop.persons") == [(digest("a"), "xyy")]


@pytest.mark.parametrize("server", [16], indirect=True)
def test_where_the_server_knows_no_clauses_columns_are_left_out_on_our_side(
    server: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Postgres 14, whose catalog has no columns for them."""
    monkeypatch.setattr("headrace.sources.postgres.clauses.CLAUSES_SINCE", 999_999)
    run(server, "DROP DATABASE IF EXISTS older", "CREATE DATABASE older")
    run(server, "CREATE TABLE users (id int PRIMARY KEY, secret text, v text)", database="older")
    settings = 'exclude = ["*.*.secret"]\n'
    with pytest.raises(UserError, match="Postgres before 15 publishes no conditions"):
        once(made(tmp_path, server, settings + "where = {'public.*' = 'true'}", "older"))
    project = once(made(tmp_path, server, settings, "older"))
    run(server, "INSERT INTO users VALUES (1, 'hidden', 'x')", database="older")
    once(project)
    with psycopg.connect(project.sources[0].url.reveal()) as db:
        assert db.execute("SELECT prattrs FROM pg_publication_rel").fetchall() == [(None,)]
    assert found(project, "SELECT * EXCLUDE (_source, _source_key) FROM shop.users") == [(1, "x")]
