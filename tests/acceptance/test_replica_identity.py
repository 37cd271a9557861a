"""Every replica identity, tables without a key among them: the destination is what the source is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import psycopg
import pytest

from headrace.config import Project, load_project
from headrace.errors import SourceGap, UserError
from headrace.pipeline import Pipeline
from headrace.testing.postgres import PostgresServer
from headrace.verify import verify

LONG = "repeat(md5({n}::text), 300)"  # past what a page holds, and stored apart: it is TOAST

DEFINITIONS = """
CREATE TABLE by_default (id integer PRIMARY KEY, long text, v text);
CREATE TABLE by_index (id integer PRIMARY KEY, code text NOT NULL UNIQUE, long text, v text);
ALTER TABLE by_index REPLICA IDENTITY USING INDEX by_index_code_key;
CREATE TABLE by_full (id integer PRIMARY KEY, long text, v text);
ALTER TABLE by_full REPLICA IDENTITY FULL;
CREATE TABLE two (a integer, b text, long text, v text, PRIMARY KEY (b, a));
CREATE TABLE parent (id integer PRIMARY KEY, v text);
CREATE TABLE child (id integer PRIMARY KEY, parent integer REFERENCES parent, v text);
CREATE TABLE grandchild (id integer PRIMARY KEY, child integer REFERENCES child, v text);
CREATE TABLE bag (a integer, b text, long text);
ALTER TABLE bag REPLICA IDENTITY FULL;
CREATE TABLE bags (a integer, b text) PARTITION BY LIST (a);
CREATE TABLE bags_1 PARTITION OF bags FOR VALUES IN (1);
CREATE TABLE bags_rest PARTITION OF bags DEFAULT;
ALTER TABLE bags REPLICA IDENTITY FULL;
ALTER TABLE bags_1 REPLICA IDENTITY FULL;
ALTER TABLE bags_rest REPLICA IDENTITY FULL;
ALTER TABLE by_default ALTER long SET STORAGE EXTERNAL;
ALTER TABLE by_index ALTER long SET STORAGE EXTERNAL;
ALTER TABLE by_full ALTER long SET STORAGE EXTERNAL;
ALTER TABLE two ALTER long SET STORAGE EXTERNAL;
ALTER TABLE bag ALTER long SET STORAGE EXTERNAL;
"""

TABLES = (
    "by_default", "by_index", "by_full", "two", "parent", "child", "grandchild", "bag", "bags",
)  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    with PostgresServer(tmp_path_factory.mktemp("identity") / "pg", 16) as running:
        yield running


@pytest.fixture(scope="module")
def project(server: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Half of the rows come by the copy, half by the stream."""
    run(server, DEFINITIONS, fill(0))
    project = made(tmp_path_factory.mktemp("project"), server.url)
    once(project)
    run(server, fill(100))
    once(project)
    return project


def made(folder: Path, url: str, more: str = "") -> Project:
    (folder / "headrace.toml").write_text(f'[source.pg]\nurl = "{url}"\n{more}')
    return load_project(folder)


def fill(base: int) -> str:
    rows = f"FROM generate_series({base}, {base + 9}) n"
    long = LONG.format(n="n")
    return f"""
    INSERT INTO by_default SELECT n, {long}, 'a' {rows};
    INSERT INTO by_index SELECT n, 'code ' || n, {long}, 'a' {rows};
    INSERT INTO by_full SELECT n, {long}, 'a' {rows};
    INSERT INTO two SELECT n, 'b', {long}, 'a' {rows};
    INSERT INTO parent SELECT n, 'p' {rows};
    INSERT INTO child SELECT n, n, 'c' {rows};
    INSERT INTO grandchild SELECT n, n, 'g' {rows};
    INSERT INTO bag SELECT n / 3, CASE n % 4 WHEN 0 THEN NULL WHEN 1 THEN 'it''s "x",null]' WHEN 2 THEN 'null'
      ELSE '' END, CASE WHEN n < {base + 2} THEN {LONG.format(n="1")} END {rows};
    INSERT INTO bag SELECT NULL, NULL, NULL {rows};
    INSERT INTO bags SELECT n % 3, NULL {rows};
    """


def run(server: PostgresServer, *statements: str, database: str = "postgres") -> None:
    url = server.url.removesuffix("postgres") + database
    with psycopg.connect(url, autocommit=True) as db:
        for statement in statements:
            db.execute(statement.encode())


def once(project: Project) -> None:
    Pipeline(load_project(project.root)).run_once()


def same_as_source(server: PostgresServer, project: Project, *tables: str) -> None:
    """Compare row by row what the source says with what the destination holds."""
    for table in tables:
        with psycopg.connect(server.url) as db:
            expected = db.execute(f"SELECT * FROM {table}".encode()).fetchall()
        assert sorted(found(project, table), key=repr) == sorted(expected, key=repr), table


def verified(project: Project) -> bool:
    return verify(load_project(project.root)).verified


def found(project: Project, table: str) -> list[tuple[Any, ...]]:
    with duckdb.connect(str(project.destination.path), read_only=True) as db:
        return db.execute(f"SELECT * EXCLUDE (_source, _source_key) FROM pg.{table}").fetchall()


def test_copied_and_streamed_rows_arrive_as_often_as_they_are(
    server: PostgresServer, project: Project
) -> None:
    same_as_source(server, project, *TABLES)


def test_keys_change_and_values_that_are_not_sent_stay(server: PostgresServer, project: Project) -> None:
    """Long values that an update leaves alone are not sent, whatever else it changes, or nothing at all."""
    for table in ("by_default", "by_full"):
        run(
            server,
            f"UPDATE {table} SET v = 'b' WHERE id IN (1, 101)",
            f"UPDATE {table} SET id = id + 1000 WHERE id IN (2, 102)",
            f"UPDATE {table} SET id = id + 1000, v = 'moved' WHERE id IN (1002, 3, 103)",
            f"UPDATE {table} SET v = v WHERE id IN (4, 104)",
            f"UPDATE {table} SET long = {LONG.format(n='9')} WHERE id IN (5, 105)",
            f"UPDATE {table} SET long = NULL WHERE id IN (6, 106)",
            f"UPDATE {table} SET id = -id WHERE id IN (5, 6)",
            f"BEGIN; UPDATE {table} SET id = 7777 WHERE id = 7; UPDATE {table} SET v = 'c' WHERE id = 7777; "
            f"UPDATE {table} SET id = 7 WHERE id = 7777; COMMIT",
        )
    run(
        server,
        "UPDATE by_index SET v = 'b' WHERE id IN (1, 101)",
        "UPDATE by_index SET code = code || '!' WHERE id IN (2, 102)",
        "UPDATE by_index SET id = id + 1000 WHERE id IN (3, 103)",
        "UPDATE by_index SET id = id + 1000, code = code || '?' WHERE id IN (4, 104)",
        "UPDATE two SET a = a + 1000 WHERE a IN (1, 101); UPDATE two SET b = 'c' WHERE a IN (2, 102)",
        "UPDATE two SET a = a + 2000, b = 'd', v = 'x' WHERE a IN (1001, 3, 103)",
        "UPDATE bag SET b = 'changed' WHERE long IS NOT NULL; UPDATE bag SET a = a WHERE long IS NOT NULL",
    )
    once(project)
    same_as_source(server, project, *TABLES)


def test_rows_go_and_come_again_in_one_transaction(server: PostgresServer, project: Project) -> None:
    for table in ("by_default", "by_full", "by_index"):
        code = ", code" if table == "by_index" else ""
        run(
            server,
            f"BEGIN; CREATE TEMP TABLE kept AS SELECT * FROM {table} WHERE id = 8; DELETE FROM {table} WHERE "
            f"id = 8; INSERT INTO {table} (id, v{code}) SELECT id, 'again'{code} FROM kept; COMMIT",
            f"BEGIN; DELETE FROM {table} WHERE id = 9; INSERT INTO {table} (id, v{code}) VALUES (9, 'x'"
            f"{', 9' if code else ''}); DELETE FROM {table} WHERE id = 9; COMMIT",
        )
    run(
        server,
        "BEGIN; DELETE FROM bag WHERE a IS NULL; INSERT INTO bag VALUES (NULL, NULL), (NULL, NULL); COMMIT",
        "BEGIN; INSERT INTO bag VALUES (5, 'x'); DELETE FROM bag WHERE b = 'x'; COMMIT",
    )
    once(project)
    same_as_source(server, project, *TABLES)


def test_equal_rows_are_counted(server: PostgresServer, project: Project) -> None:
    """One of several equal rows goes or changes; the others stay."""
    one_of = "ctid = (SELECT min(ctid) FROM bag WHERE {0}) AND {0}"
    nulls = one_of.format("a IS NULL AND b IS NULL")
    run(
        server,
        "INSERT INTO bag VALUES (1, 'same'), (1, 'same'), (1, 'same'), (1, 'NULL'), (1, NULL)",
        "DELETE FROM bag WHERE " + one_of.format("b = 'same'"),
        f"UPDATE bag SET a = 1 WHERE {nulls}",
        f"DELETE FROM bag WHERE {nulls}",
        "UPDATE bag SET b = 'same' WHERE b = 'NULL'; UPDATE bag SET b = NULL WHERE b = 'same' AND a = 1",
        "UPDATE bag SET a = a; INSERT INTO bag SELECT * FROM bag",
        "UPDATE bags SET a = a + 1 WHERE a IS NOT NULL; DELETE FROM bags WHERE a = 2",
    )
    once(project)
    same_as_source(server, project, *TABLES)
    run(server, "ALTER TABLE bag ADD COLUMN more text; DELETE FROM bag WHERE a = 1; UPDATE bag SET a = 2")
    run(server, "UPDATE bag SET more = 'x' WHERE b = ''")
    once(project)
    same_as_source(server, project, *TABLES)
    assert verified(project)


def test_a_truncate_reaches_every_table_in_its_turn(server: PostgresServer, project: Project) -> None:
    run(
        server,
        "BEGIN; INSERT INTO parent VALUES (500, 'before'); TRUNCATE parent CASCADE; "
        "INSERT INTO parent VALUES (1, 'after'); INSERT INTO child VALUES (1, 1, 'after'); COMMIT",
        "TRUNCATE child, by_full CASCADE; INSERT INTO child VALUES (2, 1, 'last')",
        "BEGIN; INSERT INTO bag VALUES (1, 'gone'); TRUNCATE bag, bags; INSERT INTO bag VALUES (1, 'here'); "
        "INSERT INTO bag VALUES (1, 'here'); COMMIT",
    )
    once(project)
    same_as_source(server, project, *TABLES)
    assert found(project, "grandchild") == []


MODEL = "SELECT a, b::INTEGER AS b FROM raw.pg.t WHERE a <> 'skip'"


def test_bad_rows_without_a_key_wait_and_are_redriven(server: PostgresServer, tmp_path: Path) -> None:
    project = separate(server, tmp_path, "redriven", "CREATE TABLE t (a text, b text)")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "t_clean.sql").write_text(MODEL)
    run(server, "ALTER TABLE t REPLICA IDENTITY FULL", database="redriven")
    run(server, "INSERT INTO t VALUES ('a', 'x'), ('a', 'x'), ('a', '1'), ('skip', '1')", database="redriven")
    once(project)
    more = "INSERT INTO t VALUES ('a', 'x'); DELETE FROM t WHERE ctid = (SELECT min(ctid) FROM t)"
    run(server, more, "UPDATE t SET b = '2' WHERE b = '1'", database="redriven")
    once(project)
    records = "SELECT count(*), any_value(key) FROM headrace.quarantine WHERE status = 'quarantined'"
    rows = "SELECT a, b FROM t_clean ORDER BY ALL"
    assert query(project, records) == [(2, '["a","x"]')]
    assert query(project, rows) == [("a", 2)]
    (tmp_path / "models" / "t_clean.sql").write_text(MODEL.replace("b::INTEGER", "TRY_CAST(b AS INTEGER)"))
    pipeline = Pipeline(load_project(tmp_path))
    (lane,) = pipeline.lanes
    assert lane.redrive("t_clean", ['["a","x"]']) == {"resolved": 2, "still_quarantined": 0}
    pipeline.close()
    assert query(project, rows) == [("a", 2), ("a", None), ("a", None)]
    assert verified(project)


def query(project: Project, sql: str) -> list[tuple[Any, ...]]:
    with duckdb.connect(str(project.destination.path), read_only=True) as db:
        return db.execute(sql).fetchall()


def separate(server: PostgresServer, folder: Path, database: str, definition: str) -> Project:
    """Make a database of its own."""
    run(server, f"CREATE DATABASE {database}")
    run(server, definition, database=database)
    return made(folder, server.url.removesuffix("postgres") + database, f'slot = "{database}"\n')


@pytest.mark.parametrize(
    ("name", "definition", "message", "remedy"),
    [
        ("no_key", "CREATE TABLE t (v text)", "it has no primary key", "REPLICA IDENTITY FULL"),
        (
            "nothing",
            "CREATE TABLE t (id int PRIMARY KEY); ALTER TABLE t REPLICA IDENTITY NOTHING",
            "its replica identity is NOTHING",
            "REPLICA IDENTITY DEFAULT",
        ),
        (
            "late",
            "CREATE TABLE t (id int PRIMARY KEY DEFERRABLE)",
            "deferrable, which is no replica identity",
            "REPLICA IDENTITY FULL",
        ),
        (
            "gone",
            "CREATE TABLE t (id int PRIMARY KEY, c int NOT NULL UNIQUE); ALTER TABLE t REPLICA IDENTITY "
            "USING INDEX t_c_key; ALTER TABLE t DROP CONSTRAINT t_c_key",
            "index of its replica identity is gone",
            "REPLICA IDENTITY DEFAULT",
        ),
        (
            "parted",
            "CREATE TABLE t (v int) PARTITION BY LIST (v); ALTER TABLE t REPLICA IDENTITY FULL; "
            "CREATE TABLE t_1 PARTITION OF t DEFAULT",
            "partitions that do not send whole old rows",
            "t_1 REPLICA IDENTITY FULL",
        ),
    ],
)
def test_tables_whose_publication_would_do_harm_are_refused(
    server: PostgresServer, tmp_path: Path, name: str, definition: str, message: str, remedy: str
) -> None:
    project = separate(server, tmp_path, f"refused_{name}", definition)
    with pytest.raises(UserError, match=message) as caught:
        once(project)
    assert remedy in caught.value.remedy
    assert '"!public.t"' in caught.value.remedy
    with psycopg.connect(project.sources[0].url.reveal()) as db:
        assert db.execute("SELECT count(*) FROM pg_publication").fetchone() == (0,)


@pytest.mark.parametrize("change", ["RENAME b TO c", "ADD COLUMN c int DEFAULT 5"])
def test_a_table_without_a_key_stops_where_its_rows_become_others(
    server: PostgresServer, tmp_path: Path, change: str
) -> None:
    definition = "CREATE TABLE t (a int, b text); ALTER TABLE t REPLICA IDENTITY FULL"
    name = "content_" + change.split(maxsplit=1)[0].lower() + change.rsplit(maxsplit=1)[-1].lower()
    project = separate(server, tmp_path, name, definition)
    run(server, "INSERT INTO t VALUES (1, 'x')", database=name)
    once(project)
    run(server, f"ALTER TABLE t {change}", "DELETE FROM t", database=name)
    with pytest.raises(SourceGap, match="has no key: its rows are known by their content"):
        once(project)
